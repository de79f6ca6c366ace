"""The ops that move rows once (norm, rope, KV write, activation, gemv, block copies): each agrees
with its reference on its grid, and compiles to code without spills for every architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbengine.kernels import lab
from nbengine.kernels.op import Case, Op
from nbengine.kernels.ops import (
    copy_blocks,
    gated_mlp,
    gemv,
    kv_cache_write,
    rms_norm,
    rope,
    swap_blocks,
)
from nbengine.kernels.program import Program
from nbengine.kernels.source import Source

ROW_OPS = (copy_blocks, gated_mlp, gemv, kv_cache_write, rms_norm, rope, swap_blocks)


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


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    "expression",
    [
        "copy_blocks",
        "gated_mlp<__nv_bfloat16, Silu, 18944, 256>",
        "gated_mlp<float, GeluTanh, 1536, 256>",
        "gemv<__nv_bfloat16, 4, 1, 1, 6>",
        "gemv<__half, 8, 2, 2, 4>",
        "gemv<__nv_bfloat16, 4, 4, 2, 4>",
        "gemv_float<float, 4, 16>",
        "kv_cache_write<__nv_bfloat16, float, 128, 16, 8, 128, true>",
        "kv_cache_write<__half, __half, 80, 32, 8, 128, false>",
        "rms_norm<__nv_bfloat16, 3584, 448, 1, true>",
        "rms_norm<float, 16384, 512, 1, true>",
        "rms_norm<__half, 128, 16, 8, false>",
        "rope<__nv_bfloat16, float, 128, 128>",
        "rope<float, float, 256, 128>",
        "swap_blocks<256>",
    ],
)
def test_compiles_without_spills(expression: str, architecture: str) -> None:
    compiler = pytest.importorskip("nbengine.kernels.compiler")
    source = Source.of_op(expression.partition("<")[0].removesuffix("_float") + ".cu")
    try:
        found = compiler.compile(source, expression, architecture)
    except compiler.ToolchainMissing as missing:
        pytest.skip(str(missing))
    assert found.warnings == ()
    assert found.resources.spill_load_bytes == found.resources.spill_store_bytes == 0
