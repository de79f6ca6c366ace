"""rms_norm in CuTe DSL: it compiles without a GPU, and on one agrees with the reference."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nbengine.kernels.lab import bench, verify
from nbengine.kernels.ops import OPS
from tests.gpu import needs_gpu

needs_cutlass = pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None, reason="needs nvidia-cutlass-dsl (the extra cute)"
)


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is not None, reason="it is installed")
def test_without_the_package_the_message_says_what_to_install():
    with pytest.raises(ImportError, match=r"rms_norm as 'cute' .* pip install 'nbengine\[cute\]'"):
        verify("rms_norm", "cute", device="cpu")


@needs_cutlass
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "with_residual"), [(80, False), (4096, True), (16384, True), (10, True), (5, False)]
)
def test_it_compiles_for_hopper_without_a_gpu(monkeypatch, dtype, size, with_residual):
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    from nbengine.kernels.cute import rms_norm

    rms_norm._compiled.cache_clear()
    assert callable(rms_norm._compiled(dtype, size, with_residual))
    rms_norm._compiled.cache_clear()


@needs_cutlass
@needs_gpu
def test_on_a_gpu_it_agrees_with_the_reference_on_the_grid():
    result = verify("rms_norm", "cute")
    assert set(result.errors) == {case.name for case in OPS["rms_norm"].cases()}


@needs_cutlass
@needs_gpu
def test_on_a_gpu_it_is_captured_and_measured_beside_the_cuda_c_one():
    (row,) = bench("rms_norm", "cute", list(OPS["rms_norm"].bench_cases())[1:2]).rows
    assert row.speedup is not None and row.speedup > 0
