"""Registers, spills and occupancy, against NVIDIA's own calculation where g++ can compile it."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nbengine.kernels import Source, compiler
from nbengine.kernels.report import LIMITS, Resources, limits_of, report

ORACLE = r"""
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, minor, warps, registers, threads; size_t sm, block, reserved, fixed, dynamic;
  while (std::scanf("%d %d %d %zu %zu %zu %d %zu %d %zu", &major, &minor, &warps, &sm, &block,
                    &reserved, &registers, &fixed, &threads, &dynamic) == 10) {
    cudaOccDeviceProp p; cudaOccFuncAttributes a; cudaOccDeviceState s; cudaOccResult r;
    p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = warps * 32; p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32; p.sharedMemPerBlock = 48 * 1024; p.sharedMemPerMultiprocessor = sm;
    p.numSms = 100; p.sharedMemPerBlockOptin = block; p.reservedSharedMemPerBlock = reserved;
    a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = fixed;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; a.maxDynamicSharedSizeBytes = block - fixed;
    a.numBlockBarriers = 1; a.virtualResourceCount = 0;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, dynamic);
    std::printf("%d\n", status ? -status : r.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA's headers have no build for macOS")
def test_occupancy_is_what_nvidias_header_calculates(tmp_path: Path) -> None:
    (tmp_path / "oracle.cpp").write_text(ORACLE)
    folders = [f"-I{folder}" for folder in compiler.nvidia_headers()]
    command = ["g++", "-O0", "-w", *folders, "oracle.cpp", "-o", "oracle"]
    subprocess.run(command, cwd=tmp_path, check=True)
    cases = list(
        itertools.product(
            sorted(LIMITS),
            (8, 32, 40, 41, 64, 96, 128, 168, 255),
            (0, 1, 1024, 12_289),
            (1, 32, 96, 128, 256, 384, 1024),
            (0, 1000, 16_384, 40_000, 80_000),
        )
    )
    lines = []
    for architecture, registers, fixed, threads, dynamic in cases:
        limits, number = LIMITS[architecture], int(architecture[3:])
        lines.append(
            f"{number // 10} {number % 10} {limits.warps} {limits.shared_bytes} "
            f"{limits.block_shared_bytes} {limits.reserved_bytes} {registers} {fixed} {threads} "
            f"{dynamic}"
        )
    done = subprocess.run(
        [tmp_path / "oracle"], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    wanted = [int(line) for line in done.stdout.split()]
    assert len(wanted) == len(cases)
    assert min(wanted) == 0  # so it is a result and not an error
    for (architecture, registers, fixed, threads, dynamic), blocks in zip(
        cases, wanted, strict=True
    ):
        resources = Resources(registers, fixed, 0, 0, 0, 1024)
        found = report("f", architecture, resources, threads, dynamic, LIMITS[architecture])
        assert found.blocks_per_multiprocessor == blocks, (
            architecture,
            resources,
            threads,
            dynamic,
        )


nvrtc = pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC has no build for macOS")


@nvrtc
def test_resources_are_those_of_the_kernel_that_was_asked_for() -> None:
    source = Source(
        """
        __global__ void other(float* x) { x[0] = 1; }
        template <int kThreads> __global__ void __launch_bounds__(kThreads) f(float* x) {
          __shared__ float s[100];
          s[threadIdx.x] = x[threadIdx.x];
          __syncthreads();
          x[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
        }
        __global__ void spills(float* x, int n) {
          float a[200];
          for (int i = 0; i < n; ++i) a[(i * 7) % 200] = x[i];
          for (int i = 0; i < n; ++i) x[i] = a[(i * 3) % 200];
        }
        """,
        "f.cu",
    )
    resources = compiler.compile(source, "f<96>", "sm_90").resources
    assert resources.shared_bytes == 400
    assert resources.max_threads == 96
    assert resources.stack_bytes == resources.spill_store_bytes == 0
    resources = compiler.compile(source, "spills", "sm_90").resources
    assert resources.stack_bytes == 800
    assert resources.shared_bytes == 0
    assert resources.max_threads == 1024


@nvrtc
def test_spills_are_seen_and_told() -> None:
    loads = "\n".join(f"float v{i} = x[{i} * n];" for i in range(120))
    sums = "\n".join(f"x[{i} * n + 1] = v{i} * v{(i * 7) % 120};" for i in range(120))
    source = Source(
        f"__global__ void __launch_bounds__(1024) f(float* x, int n) {{ {loads}\n __syncthreads(); "
        f"{sums} }}",
        "f.cu",
    )
    cubin = compiler.compile(source, "f", "sm_90")
    assert cubin.resources.registers <= 64
    assert cubin.resources.spill_store_bytes > 0
    shown = str(cubin.report(1024))
    assert f"{cubin.resources.spill_store_bytes} bytes stored" in shown


@nvrtc
def test_a_report_names_what_limits_the_occupancy() -> None:
    cubin = compiler.compile(
        Source("__global__ void f(float* x) { *x = 1; }", "f.cu"), "f", "sm_90"
    )
    assert "100%: 8 blocks a multiprocessor, limited by warps" in str(cubin.report(256))
    assert "limited by blocks" in str(cubin.report(32))
    half = cubin.report(256, 100_000)
    assert (half.blocks_per_multiprocessor, half.limited_by) == (2, "shared memory")
    assert half.occupancy == 0.25
    assert "12%: 1 block a multiprocessor" in str(cubin.report(256, 200_000))
    assert cubin.report(256, 232_449).occupancy == 0
    assert "<table" in half._repr_html_()


def test_an_architecture_that_is_not_in_the_table_has_no_occupancy() -> None:
    assert limits_of("sm_999") is None
    found = report("f", "sm_999", Resources(32, 0, 0, 0, 0, 1024), 128, 0, None)
    assert found.occupancy is None
    assert "occupancy" not in str(found)


@nvrtc
def test_machine_code_is_shown_where_a_disassembler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbengine.kernels import report as module

    cubin = compiler.compile(
        Source("__global__ void f(float* x) { *x = 1; }", "f.cu"), "f", "sm_90"
    )
    if module._nvdisasm() is not None:
        assert "EXIT" in cubin.sass()
    monkeypatch.setattr(module, "_nvdisasm", lambda: None)
    with pytest.raises(compiler.ToolchainMissing, match="nvidia-cuda-nvdisasm"):
        cubin.sass()
