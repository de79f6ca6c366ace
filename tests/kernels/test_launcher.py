"""What the launcher gives to the driver, seen by a driver that only writes it down; and, where there
is a GPU, the same launches for real."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest
import torch

from nbengine.kernels import LaunchError, Source
from nbengine.kernels.launcher import CudaKernel, CudaProgram, KernelError
from nbengine.kernels.report import Limits, limits_of
from tests.gpu import needs_gpu

SCALE = Source(
    """
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
__global__ void scale(T* out, const T* x, int n, float factor) {
  const long long i = 1ll * blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] * static_cast<T>(factor);
}

__global__ void sizes(bool a, short b, long long c, unsigned char d, double e, float* f) {}

__global__ void block_sum(float* out, const float* x) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < blockDim.x; ++i) sum += shared[i];
    out[0] = sum;
  }
}

__global__ void write_far(float* out) { out[1ll << 40] = 1.0f; }
""",
    "scale.cu",
)


class RecordingDriver:
    """Stands for `launcher.Driver`, with tensors on the CPU; reads the arguments at the launch, as
    the driver does."""

    def __init__(self, formats: str = "", status: int = 0) -> None:
        self.formats, self.status = formats, status
        self.launches: list[dict[str, Any]] = []
        self.allowed: list[int] = []
        self.entered: list[int] = []
        self.finished: list[int] = []
        self.failing_finish = 0

    def load(self, code: bytes, symbol: str, index: int) -> str:
        assert code[:4] == b"\x7fELF"
        return symbol

    def enter(self, index: int) -> None:
        self.entered.append(threading.get_ident())

    def max_threads(self, function: str) -> int:
        return 512

    def limits(self, index: int) -> Limits:
        return Limits(shared_bytes=102_000, block_shared_bytes=100_000, warps=48, blocks=16)

    def allow_shared_bytes(self, function: str, dynamic_bytes: int) -> None:
        self.allowed.append(dynamic_bytes)

    def current_device(self) -> int:
        return 0

    def stream(self, index: int) -> int:
        return 0x57

    def launch(self, function: str, *rest: int) -> tuple[int]:
        *config, pointers, extra = rest
        values = []
        for index, kind in enumerate(self.formats):
            (address,) = struct.unpack("P", ctypes.string_at(pointers + 8 * index, 8))
            assert address % struct.calcsize(kind) == 0
            values.append(struct.unpack(kind, ctypes.string_at(address, struct.calcsize(kind)))[0])
        self.launches.append({"function": function, "config": config, "values": values})
        assert extra == 0
        return (self.status,)

    def finish(self, stream: int) -> int:
        self.finished.append(stream)
        return self.failing_finish

    def described(self, status: int) -> str:
        return f"error {status}"


def kernel_on(driver: RecordingDriver, expression: str) -> CudaKernel:
    program = CudaProgram(
        SCALE,
        "cpu",
        driver=driver,  # type: ignore[arg-type]
        architecture="sm_90",
    )
    kernel = program.kernel(expression)
    assert isinstance(kernel, CudaKernel)
    return kernel


def test_the_driver_gets_the_grid_the_stream_and_the_arguments() -> None:
    driver = RecordingDriver("PPif")
    kernel = kernel_on(driver, "scale<float>")
    x, out = torch.ones(1000), torch.empty(1000)
    kernel[(4, 2), 256, 1024](out, x, 1000, 0.5)
    (launch,) = driver.launches
    assert launch["function"] == kernel.cubin.symbol
    assert launch["config"] == [4, 2, 1, 256, 1, 1, 1024, 0x57]
    assert launch["values"] == [out.data_ptr(), x.data_ptr(), 1000, 0.5]


def test_arguments_are_packed_in_their_types_and_none_is_a_null_pointer() -> None:
    driver = RecordingDriver("?hqBdP")
    kernel_on(driver, "sizes")[1, 1](True, -3, -(2**62), 255, 1e300, None)
    assert driver.launches[0]["values"] == [True, -3, -(2**62), 255, 1e300, 0]


def test_each_thread_has_its_own_arguments_and_is_given_the_context() -> None:
    driver = RecordingDriver("PPif")
    kernel = kernel_on(driver, "scale<float>")
    tensors = [torch.empty(4) for _ in range(4)]

    def launch(tensor: torch.Tensor) -> None:
        for _ in range(200):
            kernel[1, 4](tensor, tensor, 4, 1.0)

    threads = [threading.Thread(target=launch, args=(tensor,)) for tensor in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.launches) == 800
    assert all(launch["values"][0] == launch["values"][1] for launch in driver.launches)
    assert {thread.ident for thread in threads} <= set(driver.entered)


def test_more_than_48_kb_of_shared_memory_is_allowed_once_before_the_launch() -> None:
    driver = RecordingDriver("PP")
    kernel = kernel_on(driver, "block_sum")
    x = torch.ones(8)
    kernel[1, 8, 48 * 1024](x, x)
    assert driver.allowed == []
    for _ in range(3):
        kernel[1, 8, 64 * 1024](x, x)
        kernel[1, 8, 50 * 1024](x, x)
    assert driver.allowed == [64 * 1024]


def test_shared_memory_beyond_the_device_and_blocks_beyond_the_kernel_are_refused() -> None:
    kernel = kernel_on(RecordingDriver(), "block_sum")
    with pytest.raises(LaunchError, match=r"100001 bytes .* 0 to 100,000"):
        kernel[1, 8, 100_001]
    with pytest.raises(LaunchError, match=r"513 threads.* at most 512"):
        kernel[1, 513]


def test_a_refused_launch_names_the_kernel_and_its_grid() -> None:
    kernel = kernel_on(RecordingDriver("PP", status=701), "block_sum")
    x = torch.ones(8)
    with pytest.raises(KernelError, match=r"block_sum in scale.cu, grid \(3, 1, 1\), .* error 701"):
        kernel[3, 8](x, x)


def test_only_debug_waits_for_the_kernel_and_raises_what_it_failed_with() -> None:
    driver = RecordingDriver("PP")
    kernel = kernel_on(driver, "block_sum")
    x = torch.ones(8)
    kernel[1, 8](x, x)
    assert driver.finished == []
    kernel.program.debug = True
    kernel[1, 8](x, x)
    assert driver.finished == [0x57]
    driver.failing_finish = 700
    with pytest.raises(KernelError, match=r"block_sum.*block \(8, 1, 1\).*error 700"):
        kernel[1, 8](x, x)


def test_an_empty_grid_launches_nothing() -> None:
    driver = RecordingDriver()
    kernel_on(driver, "scale<float>")[0, 256](None, None, 0, 1.0)
    assert driver.launches == []


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_a_kernel_computes_on_the_current_stream(dtype: torch.dtype) -> None:
    from nbengine.kernels.source import C_TYPES

    kernel = CudaProgram(SCALE).kernel("scale", C_TYPES[dtype])
    x = torch.randn(1000, device="cuda").to(dtype)
    out = torch.full_like(x, torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        kernel[4, 256](out, x, 1000, 2.0)
    stream.synchronize()
    assert torch.equal(out, x * 2)


@needs_gpu
def test_on_a_gpu_a_launch_is_captured_in_a_graph() -> None:
    kernel = CudaProgram(SCALE, debug=True).kernel("scale<float>")
    x, out = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel[4, 256](out, x, 1000, 3.0)
    assert out.sum().item() == 0
    graph.replay()
    assert out.sum().item() == 3000


@needs_gpu
def test_on_a_gpu_a_new_thread_can_launch() -> None:
    kernel = CudaProgram(SCALE).kernel("scale<float>")
    x, out = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    failures: list[BaseException] = []

    def launch() -> None:
        try:
            kernel[4, 256](out, x, 1000, 3.0)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert not failures
    assert out.sum().item() == 3000


@needs_gpu
def test_on_a_gpu_large_shared_memory_is_allowed_and_occupancy_is_the_drivers() -> None:
    kernel = CudaProgram(SCALE).kernel("block_sum")
    assert isinstance(kernel, CudaKernel)
    x, out = torch.ones(256, device="cuda"), torch.zeros(1, device="cuda")
    kernel[1, 256, 64 * 1024](out, x)
    assert out.item() == 256
    for shared_bytes in (0, 20_000, 64 * 1024):
        calculated = kernel.cubin.report(256, shared_bytes, kernel.program.limits)
        assert kernel.report(256, shared_bytes) == calculated


@needs_gpu
def test_on_a_gpu_the_table_of_limits_is_the_drivers() -> None:
    program = CudaProgram(SCALE)
    assert limits_of(program.architecture) in (program.limits, None)


@needs_gpu
def test_on_a_gpu_debug_raises_at_the_launch_that_failed() -> None:
    """In a process of its own, as a wild write ends the context."""
    import subprocess
    import sys

    code = f"""
import torch
from nbengine.kernels import Source
from nbengine.kernels.launcher import CudaProgram, KernelError
kernel = CudaProgram(Source({SCALE.text!r}, "scale.cu"), debug=True).kernel("write_far")
try:
    kernel[1, 1](torch.zeros(1, device="cuda"))
except KernelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "write_far in scale.cu, grid (1, 1, 1)" in done.stdout, done.stderr
    assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in done.stdout
