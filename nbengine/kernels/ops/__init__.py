"""The op table: every op of the engine by its name, one file each."""

from nbengine.kernels.op import Op
from nbengine.kernels.ops import rms_norm

OPS: dict[str, Op] = {op.name: op for op in (rms_norm.OP,)}
