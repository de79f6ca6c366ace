"""`nbengine.kernels` as a user meets it, without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbengine.kernels import CompileError, load

TEXT = """
template <typename T>
__global__ void scale(T* out, const T* x, int n, float factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] * static_cast<T>(factor);
}
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_load_takes_a_path_or_text_and_emulates_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "my.cu").write_text(TEXT)
    for source in (TEXT, tmp_path / "my.cu", str(tmp_path / "my.cu")):
        kernel = load(source, "scale<float>")
        x, out = torch.arange(100.0), torch.full((100,), torch.nan)
        kernel[2, 64](out, x, 100, 3.0)
        assert torch.equal(out, x * 3)


def test_load_of_a_file_that_is_not_there_names_it() -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.cu"):
        load("absent.cu", "f")


def test_importing_the_package_needs_neither_cuda_nor_ipython() -> None:
    code = """
import sys
sys.modules.update({"cuda": None, "IPython": None})
import nbengine.kernels
from nbengine.kernels import compiler, launcher, report
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load_refuses_a_kernel_that_the_source_does_not_have() -> None:
    with pytest.raises(CompileError, match="no __global__ function stretch; it has: scale"):
        load(TEXT, "stretch<float>")
