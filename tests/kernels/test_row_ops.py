"""The ops that move rows once (norm, rope, KV write, activation, gemv, weights out of their codes,
block copies): each agrees with its reference on its grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbengine.kernels import lab
from nbengine.kernels.op import Case, Op
from nbengine.kernels.ops import (
    copy_blocks,
    dequantize,
    gated_mlp,
    gemv,
    kv_cache_write,
    quantized_gemv,
    rms_norm,
    rope,
    swap_blocks,
)
from nbengine.kernels.program import Program

ROW_OPS = (
    copy_blocks,
    dequantize,
    gated_mlp,
    gemv,
    kv_cache_write,
    quantized_gemv,
    rms_norm,
    rope,
    swap_blocks,
)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(module.OP, case, id=f"{module.OP.name}-{case.name}")
        for module in ROW_OPS
        for case in module.cases()
    ],
)
def test_agrees_with_its_reference(
    program_for: Callable[[Op], Program], op: Op, case: Case
) -> None:
    lab.verify(op, program_for(op), [case])
