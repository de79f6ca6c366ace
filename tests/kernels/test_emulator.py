"""CUDA C on the CPU: each feature of the language against what it should give."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbengine.kernels import CompileError, LaunchError
from nbengine.kernels.emulator import EmulatedProgram, NoCompiler, build
from nbengine.kernels.program import MAX_SHARED_BYTES, Kernel
from nbengine.kernels.source import Source
from tests.kernels.emulation import floats, ints, kernel, line_of, traced

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[True, False], ids=["checks", "fast"], scope="module")
def checks(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_indices_of_threads_and_blocks_in_three_dimensions(checks: bool) -> None:
    text = """
    __global__ void kernel(int* out) {
      const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
          threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
          10000 * blockIdx.y + 100000 * blockIdx.z;
    }
    """
    out = ints(2, 2, 3, 4, 2, 5)
    kernel(text, checks=checks)[(3, 2, 2), (5, 2, 4)](out)
    z, y, x, c, b, a = torch.meshgrid(*map(torch.arange, out.shape), indexing="ij")
    assert torch.equal(out, (a + 10 * b + 100 * c + 1000 * x + 10000 * y + 100000 * z).int())


def test_template_arguments_and_their_defaults() -> None:
    text = """
    template <typename T, int kScale = 3, bool kNegate = false>
    __global__ void __launch_bounds__(64, 2) kernel(T* out, const T* __restrict__ x, float by) {
      const float value = static_cast<float>(x[threadIdx.x]) * kScale * by;
      out[threadIdx.x] = static_cast<T>(kNegate ? -value : value);
    }
    """
    program = EmulatedProgram(Source(text, "template.cu"))
    x = torch.arange(64.0)
    out = torch.empty(64)
    program.kernel("kernel", torch.float32)[1, 64](out, x, 0.5)
    assert torch.equal(out, x * 1.5)
    program.kernel("kernel", torch.float32, 4, True)[1, 64](out, x, 0.5)
    assert torch.equal(out, x * -2)
    half = torch.empty(64, dtype=torch.float16)
    program.kernel("kernel<__half, 1>")[1, 64](half, x.half(), 2.0)
    assert torch.equal(half, (x * 2).half())


def test_arguments_of_every_kind_arrive() -> None:
    text = """
    enum class Mode : int { kPlain, kTwice };
    extern "C" __global__ void kernel(double* out, const bool flag, signed char a, unsigned char b,
                                      short c, unsigned d, long long e, unsigned long long f,
                                      float g, double h, const float* nothing) {
      const double values[] = {double(flag), double(a), double(b), double(c), double(d), double(e),
                               double(f), g, h, nothing == nullptr ? 1.0 : 0.0};
      out[threadIdx.x] = values[threadIdx.x];
    }
    """
    given = [True, -7, 200, -3000, 4_000_000_000, -(2**40), 2**63, 0.5, math.inf]
    out = torch.empty(10, dtype=torch.float64)
    kernel(text)[1, 10](out, *given, None)
    assert out.tolist() == [*map(float, given), 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_and_bfloat16_convert_and_compute_as_torch_does(dtype: torch.dtype) -> None:
    text = """
    #include "nb/types.cuh"
    template <typename T>
    __global__ void kernel(T* out, const T* x, const T* y) {
      const int i = threadIdx.x;
      const float a = nb::to_float(x[i]), b = nb::to_float(y[i]);
      out[i] = nb::from_float<T>(fmaf(a, b, a) / (1.0f + b * b));
    }
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 256, generator=generator).to(dtype)
    out = torch.empty(256, dtype=dtype)
    program = EmulatedProgram(Source(text, "types.cu"), checks=True)
    program.kernel("kernel", dtype)[1, 256](out, x, y)
    a, b = x.double(), y.double()
    torch.testing.assert_close(out, ((a * b + a) / (1 + b * b)).to(dtype))


def test_vector_types_and_packed_arithmetic() -> None:
    text = """
    __global__ void kernel(float4* out, const __half2* x, const __nv_bfloat162* y) {
      const __half2 sum = __hadd2(x[threadIdx.x], make_half2(1.0f, 2.0f));
      const __nv_bfloat162 product = __hmul2(y[threadIdx.x], y[threadIdx.x]);
      const float2 a = __half22float2(sum), b = __bfloat1622float2(product);
      out[threadIdx.x] = make_float4(a.x, a.y, b.x, b.y);
    }
    """
    x = torch.arange(8, dtype=torch.float16)
    y = torch.arange(8, dtype=torch.bfloat16)
    out = floats(4, 4)
    kernel(text)[1, 4](out, x, y)
    assert out[3].tolist() == [7.0, 9.0, 36.0, 49.0]


def test_barriers_order_a_reduction_through_shared_memory(checks: bool) -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      __shared__ float sums[256];
      sums[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
      __syncthreads();
      for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
      }
      if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
    }
    """
    x = torch.arange(50 * 256.0)
    out = floats(50)
    kernel(text, checks=checks)[50, 256](out, x)
    assert torch.equal(out, x.view(50, 256).sum(1))


def test_barriers_that_count() -> None:
    text = """
    __global__ void kernel(int* out, int limit) {
      const bool below = threadIdx.x < limit;
      const int count = __syncthreads_count(below);
      const int any = __syncthreads_or(below), all = __syncthreads_and(below);
      out[threadIdx.x] = count * 100 + any * 10 + all;
    }
    """
    for limit, expected in ((0, 0), (5, 510), (96, 9611)):
        out = ints(96)
        kernel(text)[1, 96](out, limit)
        assert out.tolist() == [expected] * 96


def test_dynamic_shared_memory_of_any_type(checks: bool) -> None:
    text = """
    template <typename T>
    __global__ void kernel(T* out) {
      extern __shared__ __align__(16) unsigned char bytes[];
      T* row = reinterpret_cast<T*>(bytes);
      row[threadIdx.x] = threadIdx.x;
      __syncthreads();
      out[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
    }
    """
    program = EmulatedProgram(Source(text, "dynamic.cu"), checks=checks)
    for dtype in (torch.int32, torch.float64):
        out = torch.empty(100, dtype=dtype)
        size = out.element_size()
        program.kernel("kernel", dtype)[1, 100, 100 * size](out)
        assert out.tolist() == list(range(99, -1, -1))


@pytest.mark.parametrize(
    "declared",
    [
        "extern __shared__ int row[];",
        "__shared__ extern int row[];",
        "extern __shared__ alignas(128) int row[];",
        "struct Two { float4 first, second; }; __shared__ alignas(Two) int row[32];",
        "extern volatile __shared__ int row[];",
        "extern __align__(16) __shared__ int row[];",
        "extern __shared__ int before[], row[];",
        "extern __shared__ int rows[][32]; int* row = rows[0];",
        "DYNAMIC(int, row)",
        "int* row = outer::shared<int>();",
    ],
)
@pytest.mark.parametrize("space", ["namespace", "namespace inner"])
def test_dynamic_shared_memory_however_it_is_declared(declared: str, space: str) -> None:
    text = """
    #define DYNAMIC(T, name) extern __shared__ T name[];
    namespace outer {
    template <typename T>
    __device__ T* shared() {
      extern __shared__ __align__(16) unsigned char bytes[];
      return reinterpret_cast<T*>(bytes);
    }
    }
    SPACE {
    __global__ void kernel(int* out) {
      DECLARED
      row[threadIdx.x] = threadIdx.x;
      __syncthreads();
      out[threadIdx.x] = row[31 - threadIdx.x];
    }
    }
    """.replace("DECLARED", declared).replace("SPACE", space)
    out = ints(32)
    kernel(text, "inner::kernel" if "inner" in space else "kernel")[1, 32, 128](out)
    assert out.tolist() == list(range(31, -1, -1))


def test_two_names_of_dynamic_shared_memory_are_one_memory() -> None:
    text = """
    extern __shared__ int all[];
    __global__ void kernel(int* out) {
      extern __shared__ int mine[];
      all[threadIdx.x] = 7;
      __syncthreads();
      out[threadIdx.x] = mine[31 - threadIdx.x];
    }
    """
    out = ints(32)
    kernel(text)[1, 32, 128](out)
    assert out.tolist() == [7] * 32


@pytest.mark.parametrize(
    ("call", "source"),
    [
        ("__shfl_sync(0xffffffffu, x, 3)", lambda lane: 3),
        ("__shfl_sync(0xffffffffu, x, lane + 1)", lambda lane: (lane + 1) % 32),
        ("__shfl_sync(0xffffffffu, x, 1, 8)", lambda lane: lane // 8 * 8 + 1),
        ("__shfl_up_sync(0xffffffffu, x, 2)", lambda lane: lane - 2 if lane >= 2 else lane),
        ("__shfl_up_sync(0xffffffffu, x, 3, 16)", lambda i: i - 3 if i % 16 >= 3 else i),
        ("__shfl_down_sync(0xffffffffu, x, 4)", lambda lane: lane + 4 if lane < 28 else lane),
        ("__shfl_down_sync(0xffffffffu, x, 1, 4)", lambda i: i + 1 if i % 4 < 3 else i),
        ("__shfl_xor_sync(0xffffffffu, x, 16)", lambda lane: lane ^ 16),
        ("__shfl_xor_sync(0xffffffffu, x, 1, 2)", lambda lane: lane ^ 1),
        ("__shfl_xor_sync(0xffffffffu, x, -1)", lambda lane: 31 - lane),
        ("__shfl_up_sync(0xffffffffu, x, 33)", lambda lane: max(lane - 1, 0)),
        ("__shfl_down_sync(0xffffffffu, x, 32)", lambda lane: lane),
    ],
)
def test_shuffles(call: str, source: object) -> None:
    text = """
    __global__ void kernel(float* out, __half* halves, long long* longs) {
      const int lane = threadIdx.x;
      { const float x = lane * 1.5f; out[lane] = CALL; }
      { const __half x = __float2half(lane); halves[lane] = CALL; }
      { const long long x = lane * 10000000000LL; longs[lane] = CALL; }
    }
    """.replace("CALL", call)
    sources = torch.tensor([source(lane) for lane in range(32)])  # type: ignore[operator]
    out, longs = floats(32), torch.empty(32, dtype=torch.int64)
    halves = torch.empty(32, dtype=torch.float16)
    kernel(text)[1, 32](out, halves, longs)
    assert torch.equal(out, sources * 1.5)
    assert torch.equal(halves, sources.half())
    assert torch.equal(longs, sources * 10_000_000_000)


def test_votes_matches_and_reductions() -> None:
    text = """
    __global__ void kernel(unsigned* out, int* pairs) {
      const unsigned lane = threadIdx.x, odd = 0xaaaaaaaau;
      const unsigned even_lanes = __ballot_sync(0xffffffffu, lane % 2 == 0);
      if (lane % 2 == 1) {
        int all;
        out[0 * 32 + lane] = __ballot_sync(odd, lane > 15);
        out[1 * 32 + lane] = __any_sync(odd, lane == 2) * 2 + __all_sync(odd, lane != 2);
        out[2 * 32 + lane] = __match_any_sync(odd, lane / 8);
        out[3 * 32 + lane] = __match_all_sync(odd, lane % 2, &all) + (all ? 0u : 1u);
        out[4 * 32 + lane] = __reduce_add_sync(odd, lane);
        out[5 * 32 + lane] = __reduce_max_sync(odd, lane) * 100 + __reduce_min_sync(odd, lane);
        out[6 * 32 + lane] = __reduce_xor_sync(odd, lane) ^ __reduce_or_sync(odd, lane);
      }
      pairs[lane] = __popc(even_lanes & ((1u << lane) - 1));
    }
    """
    out, pairs = torch.zeros(7, 32, dtype=torch.int64).int(), ints(32)
    kernel(text)[1, 32](out.view(torch.uint32), pairs)
    unsigned = out[:, 1::2].to(torch.int64) & 0xFFFFFFFF
    rows = [set(row.tolist()) for row in unsigned]
    assert rows[0] == {0xAAAA0000}
    assert rows[1] == {1}
    assert rows[2] == {0xAA, 0xAA00, 0xAA0000, 0xAA000000}
    assert rows[3] == {0xAAAAAAAA}
    assert rows[4] == {256}
    assert rows[5] == {3101}
    assert rows[6] == {31}  # 1 ^ 3 ^ ... ^ 31 is 0
    assert pairs.tolist() == [(lane + 1) // 2 for lane in range(32)]


def test_atomics_of_many_blocks_lose_nothing(checks: bool) -> None:
    text = """
    __global__ void kernel(int* counts, float* sum, double* total, __half* half, __nv_bfloat16* b,
                           unsigned long long* wide) {
      atomicAdd(&counts[0], 1);
      atomicMax(&counts[1], int(blockIdx.x * blockDim.x + threadIdx.x));
      atomicMin(&counts[2], -int(threadIdx.x));
      atomicOr(&counts[3], 1 << (threadIdx.x % 31));
      atomicSub(&counts[4], 2);
      atomicInc(reinterpret_cast<unsigned*>(&counts[5]), 6u);
      atomicXor(&counts[6], 1);
      atomicAdd(sum, 0.5f);
      atomicAdd(total, 0.25);
      if (threadIdx.x == 0) atomicAdd(half, __float2half(1.0f));
      if (threadIdx.x == 0) atomicAdd(b, __float2bfloat16(1.0f));
      unsigned long long seen = *wide, wanted;
      do {
        wanted = seen;
        seen = atomicCAS(wide, wanted, wanted + 3);
      } while (seen != wanted);
    }
    """
    counts = torch.zeros(7, dtype=torch.int32)
    sum_, total = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    half, b = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.bfloat16)
    wide = torch.zeros(1, dtype=torch.uint64)
    kernel(text, checks=checks)[40, 64](counts, sum_, total, half, b, wide)
    n = 40 * 64
    assert counts.tolist() == [n, n - 1, -63, 2**31 - 1, -2 * n, n % 7, 0]
    assert (sum_.item(), total.item(), half.item(), b.item()) == (n / 2, n / 4, 40.0, 40.0)
    assert wide.item() == 3 * n


def test_bit_and_math_intrinsics() -> None:
    text = """
    __global__ void kernel(long long* bits, float* math, float x) {
      long long* b = bits;
      *b++ = __popc(0xf0f0u); *b++ = __clz(1); *b++ = __clz(0); *b++ = __ffs(8); *b++ = __ffs(0);
      *b++ = __brev(1u); *b++ = __umulhi(0x80000000u, 6u); *b++ = __mulhi(-2, 0x40000000);
      *b++ = __byte_perm(0x33221100u, 0x77665544u, 0x7610u); *b++ = __float_as_int(1.0f);
      *b++ = __clzll(1); *b++ = __popcll(-1LL); *b++ = __umul64hi(1ull << 63, 4);
      *b++ = min(3, 5u) + max(-1, 2) + max(7LL, 3); *b++ = __float2int_rn(2.5f);
      *b++ = __funnelshift_l(0x80000000u, 1u, 1);
      float* m = math;
      *m++ = __expf(x); *m++ = __logf(x); *m++ = __fdividef(x, 4.0f); *m++ = rsqrtf(x);
      *m++ = exp2f(x); *m++ = __powf(x, 3.0f); *m++ = __sinf(x); *m++ = __fmaf_rn(x, x, 1.0f);
      *m++ = __frcp_rn(x); *m++ = __int_as_float(0x40490fdb); *m++ = __saturatef(x);
      *m++ = fmaxf(x, NAN); *m++ = tanhf(x); *m++ = __uint_as_float(0x7f800000u); *m++ = erff(x);
    }
    """
    bits, math_ = torch.zeros(16, dtype=torch.int64), floats(15)
    kernel(text)[1, 1](bits, math_, 2.0)
    assert bits.tolist() == [
        *(8, 31, 32, 4, 0, 2**31, 3, -1, 0x77661100, 0x3F800000, 63, 64, 2, 12, 2, 3)
    ]
    expected = [
        *(math.exp(2), math.log(2), 0.5, 2**-0.5, 4, 8, math.sin(2), 5, 0.5, math.pi, 1, 2),
        *(math.tanh(2), math.inf, math.erf(2)),
    ]
    torch.testing.assert_close(math_, torch.tensor(expected))


def test_constants_and_device_functions() -> None:
    text = """
    __constant__ float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
    struct Twice {
      float value;
      __host__ __device__ __forceinline__ float operator()() const { return 2 * value; }
    };
    __device__ __noinline__ float looked_up(int i) { return table[i % 4]; }
    namespace inner {
    static __device__ inline float third(float x) { return x / 3; }
    }
    __global__ void kernel(float* out) {
      const auto scaled = [=](int i) { return Twice{looked_up(i)}() + inner::third(3.0f); };
      out[threadIdx.x] = scaled(threadIdx.x) + __ldg(&table[0]) + warpSize;
    }
    """
    out = floats(8)
    kernel(text)[1, 8](out)
    assert out.tolist() == [36, 38, 42, 50] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_functions_of_half_and_bfloat16(dtype: torch.dtype) -> None:
    text = """
    #include "nb/types.cuh"
    template <typename T, typename T2>
    __global__ void kernel(T* out, const T* x) {
      const T a = x[0], b = x[1], c = x[2];
      T* o = out;
      *o++ = __hfma(a, b, c); *o++ = __hfma_sat(a, b, c); *o++ = __hfma_relu(a, b, c);
      *o++ = __hadd(a, b); *o++ = __hmul(a, b); *o++ = __hdiv(a, b); *o++ = hexp(a);
      *o++ = hlog2(b); *o++ = hsqrt(b); *o++ = hrsqrt(b); *o++ = hrcp(b); *o++ = htanh(a);
      *o++ = hfloor(a); *o++ = hceil(a); *o++ = hrint(a); *o++ = nb::from_float<T>(TO_INT(b));
      const T2 ab(a, b);
      const T2 pairs[] = {__hfma2(ab, ab, ab), h2exp(ab), h2tanh(ab), h2trunc(ab)};
      for (const T2& pair : pairs) { *o++ = pair.x; *o++ = pair.y; }
    }
    """
    name, to_int = (
        ("__half", "__half2int_ru")
        if dtype == torch.float16
        else ("__nv_bfloat16", "__bfloat162int_ru")
    )
    x, out = torch.tensor([-1.5, 2.25, -0.125], dtype=dtype), torch.empty(24, dtype=dtype)
    kernel(text.replace("TO_INT", to_int), f"kernel<{name}, {name}2>")[1, 1](out, x)
    a, b, c = x.tolist()
    expected = [
        *(a * b + c, 0.0, 0.0, a + b, a * b, a / b, math.exp(a), math.log2(b), math.sqrt(b)),
        *(1 / math.sqrt(b), 1 / b, math.tanh(a), -2.0, -1.0, -2.0, 3.0, a * a + a, b * b + b),
        *(math.exp(a), math.exp(b), math.tanh(a), math.tanh(b), -1.0, 2.0),
    ]
    assert out.tolist() == torch.tensor(expected, dtype=torch.float64).to(dtype).tolist()


def test_directed_rounding_takes_the_neighbours_of_the_exact_result() -> None:
    calls = ("fadd_{}(1.0f, 1e-30f)", "fmul_{}(1.1f, 1.1f)", "fdiv_{}(1.0f, 3.0f)", "fsqrt_{}(2.0f)",
             "fmaf_{}(1.1f, 1.1f, 1e-30f)", "frcp_{}(-3.0f)", "fadd_{}(1.0f, 2.0f)",
             "int2float_{}(16777217)", "ll2float_{}(-16777217LL)", "double2float_{}(0.1)")  # fmt: skip
    lines = "".join(f"*out++ = __{call.format(r)};" for call in calls for r in ("rd", "rz", "ru"))
    out = floats(10, 3)
    kernel("__global__ void kernel(float* out) {" + lines + "}")[1, 1](out)
    down, to_zero, up = out.T.tolist()
    next_up = torch.nextafter(torch.tensor(down), torch.tensor(math.inf)).tolist()
    assert up[6] == down[6] == 3.0
    assert up[:6] + up[7:] == next_up[:6] + next_up[7:]
    assert to_zero == [u if u < 0 else d for d, u in zip(down, up, strict=True)]
    assert (down[0], up[5], down[7], up[8]) == (1.0, -0.3333333134651184, 2.0**24, -(2.0**24))


def test_atomic_compare_and_swap_converts_its_operands() -> None:
    text = """
    __device__ unsigned lock = 0;
    __global__ void kernel(int* out) {
      while (atomicCAS(&lock, 0, 1) != 0) {}
      out[0] += 1;
      __threadfence();
      atomicExch(&lock, 0);
      atomicAdd_system(&out[1], __umul24(0x01000003u, 2u));
    }
    """
    out = torch.zeros(2, dtype=torch.int32)
    kernel(text)[8, 32](out)
    assert out.tolist() == [256, 6 * 256]


def test_a_sources_macros_may_have_any_name() -> None:
    text = """
    #define P 4
    #define real float
    #define arguments 3
    #define i (P + arguments)
    __global__ void kernel(real* out) { out[threadIdx.x] = i; }
    """
    out = floats(2)
    kernel(text)[1, 2](out)
    assert out.tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("headers", "expression"),
    [
        ("cuda/std/type_traits", "cuda::std::is_same_v<int, int> ? 7 : 0"),
        ("cuda/std/limits", "cuda::std::numeric_limits<signed char>::max() - 120"),
        ("cuda/std/array", "cuda::std::array<int, 2>{7, 8}[0]"),
        ("cuda/std/cstdint", "cuda::std::int64_t(7)"),
        ("cuda_fp8.h", "int(float(__nv_fp8_e4m3(7.0f)))"),
        ("cstdio", 'printf("") + std::printf("%d", 1) + 6'),
        ("cassert", "(assert(threadIdx.x < 2), 7)"),
    ],
)
def test_headers_that_kernels_include(headers: str, expression: str) -> None:
    text = """
    #include <HEADER>
    __global__ void kernel(int* out) { out[threadIdx.x] = EXPRESSION; }
    """
    out = ints(2)
    kernel(text.replace("HEADER", headers).replace("EXPRESSION", expression))[1, 2](out)
    assert out.tolist() == [7, 7]


def test_an_asm_that_holds_no_ptx_or_is_never_compiled_does_no_harm() -> None:
    text = """
    __device__ inline float unused(float x) {
      asm("ex2.approx.f32 %0, %0;" : "+f"(x));
      return x;
    }
    __global__ void kernel(int* out) {
      asm volatile("" ::: "memory");
      out[0] = 1;
    }
    """
    out = ints(1)
    kernel(text)[1, 1](out)
    assert out.item() == 1


def test_what_a_kernel_prints_arrives_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    text = r"""
    __global__ void kernel(int n) {
      if (threadIdx.x == 1) printf("%d of %d: %.2f %s\n", threadIdx.x, n, 0.5, "half");
    }
    """
    kernel(text)[1, 2](2)
    assert capsys.readouterr().out == "1 of 2: 0.50 half\n"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ldmatrix_and_mma_multiply_matrices(dtype: torch.dtype) -> None:
    text = """
    #include "nb/mma.cuh"
    template <typename T>
    __global__ void kernel(float* out, const T* a, const T* b) {
      __shared__ __align__(16) T left[16][16];
      __shared__ __align__(16) T right[16][8];  // [k][n]
      const int lane = threadIdx.x;
      for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a[i];
      for (int i = lane; i < 128; i += 32) right[i / 8][i % 8] = b[i];
      __syncwarp();
      nb::uint32 fragment_a[4], fragment_b[2];
      nb::ldmatrix_x4(fragment_a, &left[lane % 16][lane / 16 * 8]);
      nb::ldmatrix_x2_trans(fragment_b, &right[lane % 16][0]);
      float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
      nb::mma_m16n8k16<T>(d, fragment_a, fragment_b);
      for (int i = 0; i < 4; ++i) {
        out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
      }
    }
    """
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    out = floats(16, 8)
    program = EmulatedProgram(Source(text, "mma.cu"), checks=True)
    program.kernel("kernel", dtype)[1, 32](out, a, b)
    torch.testing.assert_close(out, a.float() @ b.float() + 1)


def test_a_grid_of_many_blocks_runs_each_once(checks: bool) -> None:
    text = """
    __global__ void kernel(int* out) { atomicAdd(&out[blockIdx.x], threadIdx.x + 1); }
    """
    out = torch.zeros(10_000, dtype=torch.int32)
    kernel(text, checks=checks)[10_000, 3](out)
    assert set(out.tolist()) == {6}


def test_blocks_share_nothing() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int row[32];
      row[threadIdx.x] = blockIdx.x;
      for (int i = 0; i < 100; ++i) __syncthreads();
      out[blockIdx.x * 32 + threadIdx.x] = row[31 - threadIdx.x];
    }
    """
    out = ints(64, 32)
    kernel(text, checks=False)[64, 32](out)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32)[:, None].expand(64, 32))


def test_a_thread_may_have_half_a_mebibyte_of_local_memory(checks: bool) -> None:
    text = """
    __global__ void kernel(int* out, int step) {
      volatile int local[131072];
      for (int i = 0; i < 131072; i += step) local[i] = i;
      __syncthreads();
      out[threadIdx.x] = local[131072 - step * (threadIdx.x + 1)];
    }
    """
    out = ints(64)
    kernel(text, checks=checks)[2, 64](out, 1024)
    assert out.tolist() == [131072 - 1024 * (i + 1) for i in range(64)]


def test_more_stacks_than_a_process_may_have_mappings_are_not_made() -> None:
    text = """
    __global__ void kernel(int* out) {
      __syncthreads();
      atomicAdd(out, 1);
    }
    """
    out, before = torch.zeros(1, dtype=torch.int32), torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        kernel(text, checks=False)[128, 1024](out)
    finally:
        torch.set_num_threads(before)
    assert out.item() == 128 * 1024


def test_two_versions_of_a_kernel_do_not_share_their_variables() -> None:
    def version(value: int) -> Kernel:
        return kernel(
            f"""
            template <int n> __device__ int& counter() {{ static int at = {value}; return at; }}
            template <int n> __global__ void kernel(int* out) {{ out[0] = counter<n>()++; }}
            """,
            "kernel<0>",
        )

    first, second, out = version(10), version(20), ints(1)
    first[1, 1](out)
    second[1, 1](out)
    assert out.item() == 20


def test_a_compile_error_shows_the_users_own_line() -> None:
    text = """
    __global__ void kernel(float* out) {
      out[threadIdx.x] = undeclared;  // here
    }
    """
    with pytest.raises(CompileError) as caught:
        kernel(text)
    (diagnostic, *_) = caught.value.diagnostics
    assert (diagnostic.file, diagnostic.line) == ("planted.cu", line_of(text))
    assert "out[threadIdx.x] = undeclared" in str(caught.value)


def test_a_function_that_is_declared_alone_is_a_compile_error(checks: bool) -> None:
    text = """
    __device__ int missing(int x);
    __global__ void kernel(int* out) { out[threadIdx.x] = missing(1); }
    """
    with pytest.raises(CompileError, match=r"missing\(int\) is used, and neither"):
        kernel(text, checks=checks)


@pytest.mark.parametrize(
    "ptx", ['asm volatile("ex2.approx.f32 %0, %0;" : "+f"(out[0]))', '__asm__("membar.gl;")',
            'int r; asm("mov.u32 %0, %%laneid;" : "=r"(r)); out[0] = r']
)  # fmt: skip
def test_inline_ptx_is_refused_with_what_to_do(ptx: str, checks: bool) -> None:
    text = """
    __global__ void kernel(float* out) {
      PTX;  // here
    }
    """.replace("PTX", ptx)
    with pytest.raises(CompileError, match="NB_EMULATOR is defined") as caught:
        kernel(text, checks=checks)
    assert caught.value.diagnostics[0].line == line_of(text)


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    build._compiler.cache_clear()
    try:
        with pytest.raises(NoCompiler, match=r"no g\+\+, clang\+\+.*install"):
            build._compiler()
    finally:
        build._compiler.cache_clear()


def test_a_compiled_kernel_is_found_again_by_another_process() -> None:
    text = "__global__ void kernel(int* out) { out[0] = 41 + 1; }"
    found = build.compile_kernel(Source(text, "cached.cu"), "kernel", False).path
    made = found.stat().st_ino
    script = f"""
import torch
from nbengine.kernels.emulator import EmulatedProgram
from nbengine.kernels.source import Source
out = torch.zeros(1, dtype=torch.int32)
EmulatedProgram(Source({text!r}, "cached.cu")).kernel("kernel")[1, 1](out)
print(out.item())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr
    assert found.stat().st_ino == made


def test_a_copied_cache_serves_another_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "__global__ void kernel(int* out) { out[threadIdx.x] = threadIdx.x + 1; }"
    script = f"""
import torch
from nbengine.kernels.emulator import EmulatedProgram
from nbengine.kernels.source import Source
out = torch.zeros(2, dtype=torch.int32)
EmulatedProgram(Source({text!r}, "moved.cu")).kernel("kernel")[1, 2](out)
print(out.tolist())
"""
    made, moved = tmp_path / "made", tmp_path / "moved"
    for cache in (made, moved):
        if cache is moved:
            made.rename(moved)
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment
        )
        assert done.stdout == "[1, 2]\n", done.stderr


def test_shared_memory_is_found_behind_a_string_that_looks_like_a_comment() -> None:
    text = """
    __global__ void kernel(float* out) {
      const char* path = "//"; extern __shared__ float shared[];
      shared[0] = path[0];
      out[0] = shared[0];
    }
    """
    out = floats(1)
    kernel(text)[1, 1, 4](out)
    assert out.item() == ord("/")


def test_headers_are_compiled_as_they_were_when_the_source_was_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    once = tmp_path / "parts" / "once.cuh"
    once.write_text('#pragma once\n#include "factor.cuh"\nextern __shared__ float shared[];\n')
    factor = tmp_path / "parts" / "factor.cuh"
    factor.write_text("#ifndef FACTOR\n#define FACTOR 3\n#endif\n")
    (tmp_path / "f.cu").write_text("""
        #include "parts/once.cuh"
        #include "parts/factor.cuh"
        #include <parts/once.cuh>
        template <typename T> __global__ void f(T* x) {
          shared[0] = FACTOR;
          x[0] *= shared[0];
        }
    """)
    program = EmulatedProgram(Source.read(tmp_path / "f.cu"), checks=True)
    factor.write_text("#define FACTOR 2\n")
    once.unlink()
    x = torch.ones(1)
    program.kernel("f", torch.float32)[1, 1, 4](x)
    assert x.item() == 3


def refusal(text: str, expression: str, name: str = "my.cu") -> CompileError:
    with pytest.raises(CompileError) as refused:
        EmulatedProgram(Source(text, name)).kernel(expression)
    assert "nb_" not in str(refused.value) and "entry" not in str(refused.value)
    return refused.value


COPY = """template <typename T>
__global__ void copy(T* out, const T* x) {
  out[threadIdx.x] = x[threadIdx.x];
}
"""


def test_a_missing_brace_is_shown_where_the_source_ends() -> None:
    error = refusal(COPY.removesuffix("}\n"), "copy<float>")
    (diagnostic,) = error.diagnostics
    assert (diagnostic.file, diagnostic.notes[0][:11]) == ("my.cu", "my.cu:2:42:")
    assert "expected" in diagnostic.message and "}" in diagnostic.message


@pytest.mark.parametrize(
    ("arguments", "told"),
    [("3", "has no instance for these"), ("nosuch", "nosuch"), ("float", "expected|parse error")],
)
def test_an_error_in_the_template_arguments_is_shown_at_the_kernel(
    arguments: str, told: str
) -> None:
    expression = f"copy<{arguments}{'' if arguments == 'float' else '>'}"
    (diagnostic,) = refusal(COPY, expression).diagnostics
    assert (diagnostic.file, diagnostic.line) == ("my.cu", 2)
    assert diagnostic.message.startswith(f"{expression}: ")
    assert re.search(told, diagnostic.message)


def test_an_error_in_an_instance_says_of_which_types_and_no_more() -> None:
    (diagnostic,) = refusal(
        COPY.replace("= x[threadIdx.x]", "= T::nosuch"), "copy<float>"
    ).diagnostics
    assert diagnostic.line == 3
    assert any(re.search("T = float|copy<float>", note) for note in diagnostic.notes)


@pytest.mark.parametrize("before", ["\t\t", "\t/* äöü€ */\t"])
def test_a_caret_stands_at_its_character_in_a_file_with_tabs(tmp_path: Path, before: str) -> None:
    path = tmp_path / "tabs.cu"
    path.write_text(f"__global__ void f(float* x) {{\n{before}*x = missing;\n}}\n")
    shown = str(refusal(path.read_text(), "f", str(path))).split("\n")
    at = next(i for i, line in enumerate(shown) if line.startswith("    2 |"))
    assert shown[at + 1].index("^") == shown[at].index("missing")


def test_the_compiler_is_asked_to_speak_english(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "$LC_ALL, $LANGUAGE" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(build, "_compiler", lambda: str(compiler))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    with pytest.raises(build._Refused, match=r"^C\.UTF-8, $"):
        build._run("--version")


def test_an_error_in_a_header_is_shown_at_the_headers_own_line(tmp_path: Path) -> None:
    header = tmp_path / "mine.cuh"
    header.write_text("#pragma once\n__device__ int broken() { return missing; }\n")
    (tmp_path / "f.cu").write_text('#include "mine.cuh"\n__global__ void f(int* x) {}\n')
    source = Source.read(tmp_path / "f.cu")
    header.write_text("")
    with pytest.raises(CompileError) as refused:
        EmulatedProgram(source).kernel("f")
    assert refused.value.diagnostics[0].place.startswith(f"{header}:2:")
    assert "2 | __device__ int broken()" in str(refused.value)


def test_a_block_beyond_the_launch_bounds_is_refused_as_on_a_gpu() -> None:
    text = """
    template <int kWarps>
    __global__ void __launch_bounds__(kWarps * 32) kernel() {}
    """
    kernel(text, "kernel<2>")[1, 64]()
    with pytest.raises(LaunchError, match="has 65 threads, and the kernel can be launched with at"):
        kernel(text, "kernel<2>")[1, 65]


def test_static_and_dynamic_shared_memory_share_the_limit() -> None:
    text = """
    __global__ void kernel_of_another() { __shared__ float mine[8192]; mine[0] = 1; }
    template <typename T>
    __global__ void kernel() {
      __shared__ T tile[4096];
      extern __shared__ T rest[];
      tile[0] = rest[0] = 1;
    }
    """
    most = MAX_SHARED_BYTES - 4096 * 4
    kernel(text, "kernel<float>")[1, 1, most]()
    with pytest.raises(LaunchError, match=f"can have 0 to {most:,} here"):
        kernel(text, "kernel<float>")[1, 1, most + 1]


def test_counters_of_a_copy_and_of_a_transpose() -> None:
    text = """
    template <int kPad>
    __global__ void kernel(float* out, const float* x) {
      __shared__ float tile[32][32 + kPad];
      for (int i = 0; i < 32; ++i) tile[i][threadIdx.x] = x[i * 32 + threadIdx.x];
      __syncthreads();
      for (int i = 0; i < 32; ++i) out[i * 32 + threadIdx.x] = tile[threadIdx.x][i];
    }
    """
    program = EmulatedProgram(Source(text, "transpose.cu"), counters=True)
    x = torch.arange(1024.0).view(32, 32)
    conflicts = []
    for pad in (0, 1):
        transpose, out = program.kernel(f"kernel<{pad}>"), floats(32, 32)
        transpose[1, 32](out, x)
        assert torch.equal(out, x.T)
        found = transpose.counters  # type: ignore[attr-defined]
        assert (found.global_reads, found.sectors_read) == (32, 128)
        assert (found.global_writes, found.sectors_written) == (32, 128)
        assert (found.shared_accesses, found.barriers, found.divergent) == (64, 1, 0)
        conflicts.append(found.bank_conflicts)
    assert conflicts == [32 * 31, 0]


def test_counters_take_an_atomic_operation_for_one_access() -> None:
    text = """
    __global__ void kernel(int* out, float* sum) {
      atomicAdd(&out[threadIdx.x], 1);
      atomicAdd(sum, 1.0f);
      atomicMax(&out[threadIdx.x], 5);
    }
    """
    program = EmulatedProgram(Source(text, "atomics.cu"), counters=True)
    atomics = program.kernel("kernel")
    atomics[1, 32](torch.zeros(32, dtype=torch.int32), torch.zeros(1))
    found = atomics.counters  # type: ignore[attr-defined]
    assert (found.global_reads, found.global_writes, found.sectors_written) == (0, 3, 9)


def test_counters_see_divergence_and_scattered_reads() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      if (threadIdx.x < 8) out[threadIdx.x] = x[threadIdx.x * 8];
    }
    """
    program = EmulatedProgram(Source(text, "scattered.cu"), counters=True)
    scattered, out = program.kernel("kernel"), floats(8)
    scattered[1, 32](out, torch.arange(64.0))
    found = scattered.counters  # type: ignore[attr-defined]
    assert (found.sectors_read, found.sectors_written, found.divergent) == (8, 1, 2)


def test_a_trace_holds_what_each_thread_did_in_order() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      __shared__ float row[2];
      row[threadIdx.x] = x[2 * blockIdx.x + threadIdx.x];  // load
      __syncthreads();  // barrier
      out[2 * blockIdx.x + threadIdx.x] = row[1 - threadIdx.x];  // store
    }
    """
    events = traced(text).trace(3, 2, (floats(6), torch.ones(6)), of=(1, 0, 0))
    load, barrier, store = (line_of(text, f"// {m}") for m in ("load", "barrier", "store"))
    of_second = [(e.event, e.buffer, e.index, e.line, e.epoch) for e in events if e.thread == 1]
    assert of_second == [
        ("read", "x", 3, load, 0),
        ("write", "row", 1, load, 0),
        ("barrier", None, None, barrier, 0),
        ("read", "row", 0, store, 1),
        ("write", "out", 3, store, 1),
    ]
