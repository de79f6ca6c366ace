"""The op table: every op of the engine by its name, one file each."""

from nbengine.kernels.op import Op
from nbengine.kernels.ops import paged_attention_decode, rms_norm

OPS: dict[str, Op] = {op.name: op for op in (paged_attention_decode.OP, rms_norm.OP)}
