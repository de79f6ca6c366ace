"""`nbengine.kernels` as a user meets it, without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbengine.errors import InvalidField
from nbengine.kernels import CompileError, load
from nbengine.kernels.lab import verify

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


def test_text_may_be_one_line() -> None:
    kernel = load("__global__ void set(float* x) { x[0] = 3; }", "set", device="cpu")
    x = torch.zeros(1)
    kernel[1, 1](x)
    assert x.item() == 3
    with pytest.raises(CompileError, match="it has: set"):
        load("__global__ void set(float* x) { x[0] = 3; }" + 300 * " ", "get", device="cpu")


def test_a_device_without_kernels_and_a_gpu_that_is_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:3", torch.device("cuda")):
        with pytest.raises(InvalidField, match=r"torch sees no NVIDIA GPU here; on \"cpu\""):
            load(TEXT, "scale<float>", device=device)
        with pytest.raises(InvalidField, match="torch sees no NVIDIA GPU"):
            verify("rms_norm", device=device)
    with pytest.raises(InvalidField, match="device='mps': kernels run on an NVIDIA GPU"):
        load(TEXT, "scale<float>", device="mps")
    with pytest.raises(InvalidField, match="device='mps'"):
        verify("rms_norm", device="mps")


def test_a_null_character_is_refused_at_its_place(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"kernel\.cu:2:4: error: a null character"):
        load("// é\n é\0__global__ void f() {}", "f")
    (tmp_path / "f.cuh").write_text("int a;\0")
    (tmp_path / "f.cu").write_text('#include "f.cuh"\n')
    with pytest.raises(CompileError, match=r"f\.cuh:1:7: error: a null character"):
        load(tmp_path / "f.cu", "f")


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
