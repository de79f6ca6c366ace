"""What is read off a kernel's declaration, however it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbengine.kernels import CompileError, Source
from nbengine.kernels.source import (
    Parameter,
    instantiation,
    launch_bound,
    parameters,
    template_arguments,
)


def types(text: str, expression: str) -> list[str]:
    return [f"{p.c_type} {p.name}" for p in parameters(Source(text, "t.cu"), expression)]


def test_template_arguments_are_put_in_and_qualifiers_taken_out() -> None:
    text = """
    template <typename T, int kSize = 3, bool kLast = (kSize > 2)>
    __global__ void f(T* out, const T* __restrict__ x, T const* const y, const nb::int64 n,
                      unsigned flags, const float scale, int64_t stride, void* scratch) {}
    """
    assert types(text, "f<__half>") == [
        "__half* out",
        "__half* x",
        "__half* y",
        "long long n",
        "unsigned int flags",
        "float scale",
        "long long stride",
        "void* scratch",
    ]


def test_template_arguments_are_known_by_their_names() -> None:
    source = Source(
        "template <typename T, int kSize = 3, bool kLast = (kSize > 2)> __global__ void f(T* x) {}\n"
        "__global__ void plain(float* x) {}",
        "t.cu",
    )
    given = template_arguments(source, "f<__half, 4>")
    assert given == {"T": "__half", "kSize": "4", "kLast": "(4 > 2)"}
    assert template_arguments(source, "plain") == {}
    with pytest.raises(CompileError, match="3 template parameters"):
        template_arguments(source, "f")


@pytest.mark.parametrize(
    "declaration",
    [
        "__global__ void f(float* x)",
        "static __global__ void f(float* x)",
        "__global__ static void f(float* x)",
        'extern "C" __global__ void f(float* x)',
        'extern "C" { __global__ void f(float* x)',
        "__global__ void __launch_bounds__(256) f(float* x)",
        "__global__ __launch_bounds__(256, 2) void f(float* x)",
        "__global__ void __launch_bounds__(kA * (kB + 1)) f(float* x)",
        "template <int kA, int kB> void __global__ f(float* x)",
        "[[maybe_unused]] __global__ void f(float x[])",
        "__global__ void f(/* the, data */ float* x  // (in place)\n)",
        "__global__ void f(float *__restrict__ x = nullptr)",
        "#define TEXT \"__global__ void f(int a, int b)\"\n__global__ void f(float* x)",
        "// __global__ void f(int a)\n__global__ void f(float* x)",
        "char a = '\"'; __global__ void f(float* x) {} char b = '\"'; void g()",
        "namespace mine { __global__ void f(float* x)",
    ],
)  # fmt: skip
def test_a_kernel_is_found_however_it_is_declared(declaration: str) -> None:
    expression = "f<1, 2>" if "template" in declaration else "f"
    expression = "mine::f" if "namespace" in declaration else expression
    assert types(declaration + " {}", expression) == ["float* x"]


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("template <typename T, typename A = T> __global__ void f(A* x) {}", "f<float>"),
        ("template <typename T, typename A = T, typename B = A> __global__ void f(B* x) {}",
         "f<float>"),
        ("template <typename T> __global__ void f(T* x) {}", "f<const float>"),
        ("using real = float;\n__global__ void f(const real* x) {}", "f"),
        ("namespace my { typedef const float real; using Real = real; }\n"
         "__global__ void f(my::Real* x) {}", "f"),
        ("#define REAL float\n__global__ void f(REAL* x) {}", "f"),
        ("using Reals = float*;\n__global__ void f(Reals x) {}", "f"),
    ],
)  # fmt: skip
def test_a_type_is_known_by_whatever_name_it_goes(text: str, expression: str) -> None:
    assert types(text, expression) == ["float* x"]


@pytest.mark.parametrize("given", ["std::int32_t", "::cuda::std::int32_t", "int32_t", "int"])
def test_a_standard_type_may_be_given_in_its_namespace(given: str) -> None:
    assert types("template <typename T> __global__ void f(T* x) {}", f"f<{given}>") == ["int* x"]


@pytest.mark.parametrize("other", ["double", "T"])
def test_of_a_name_with_two_meanings_none_is_taken(other: str) -> None:
    text = f"using real = float;\nusing real = {other};\n__global__ void f(real* x) {{}}"
    assert types(text, "f") == ["real* x"]
    assert types("using a = b;\nusing b = a;\n__global__ void f(a* x) {}", "f")[0][-3:] == "* x"


TWO = """#ifdef FAST
__global__ void f(float* x, long long n, long long stride) {}
#else
__global__ void f(float* x) {}
#endif
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TWO, 4),
        ("namespace a { __global__ void f(int n) {} }\n__global__ void f(float a) {}", 2),
        ("template <typename T> __global__ void f(T n) {}\n"
         "template <int n> __global__ void f(float a) {}", 2),
    ],
)  # fmt: skip
def test_two_kernels_of_a_name_with_different_parameters_are_refused(text: str, line: int) -> None:
    expression = "f<int>" if "template" in text else "f"
    with pytest.raises(CompileError, match=r"f has other parameters at t\.cu:[12], and") as refused:
        parameters(Source(text, "t.cu"), expression)
    assert refused.value.diagnostics[0].line == line


def test_a_kernel_may_be_declared_more_than_once(tmp_path: Path) -> None:
    assert types(TWO.replace("long long n, long long stride", "").replace("x, )", "y)"), "f")
    text = """
    template <typename T, int kSize> __global__ void f(T*, long long);
    template <typename T, int kSize> __global__ void f(T* x, int64_t n) {}
    template <typename T> __global__ void f(T* x) {}
    """
    assert types(text, "f<float, 4>") == ["float* x", "long long n"]
    assert types(text, "f<float>") == ["float* x"]
    (tmp_path / "f.cuh").write_text("__global__ void f(float* x, int n) {}")
    with pytest.raises(CompileError, match="f has other parameters"):
        parameters(Source('#include "f.cuh"\n' + TWO, "t.cu", tmp_path), "f")


@pytest.mark.parametrize(
    ("bounds", "most"),
    [
        ("256", 256),
        ("kWarps * 32, 2", 128),
        ("k::kThreads", 192),
        ("(kWarps + 1) * WARP / 2", 80),
        ("sizeof(T)", None),
        ("kUnknown", None),
    ],
)
def test_launch_bounds_are_read_as_far_as_they_are_arithmetic(
    bounds: str, most: int | None
) -> None:
    text = f"""
    #define WARP 32
    namespace k {{ constexpr int kThreads = 6 * WARP; }}
    template <typename T, int kWarps = 4>
    __global__ void __launch_bounds__({bounds}) f(T* x) {{}}
    __global__ void g() {{}}
    """
    assert launch_bound(Source(text, "t.cu"), "f<float>") == most
    assert launch_bound(Source(text, "t.cu"), "g") is None


def test_structs_behind_pointers_keep_their_names_with_their_arguments() -> None:
    text = "template <typename T, int N> __global__ void f(nb::Pack<T, N>* x, T** rows) {}"
    assert types(text, "f<float, 4>") == ["nb::Pack<float, 4>* x", "float** rows"]


def test_a_kernel_of_an_included_header_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels.cuh").write_text('#include "more.cuh"\n__global__ void f(int n) {}')
    (tmp_path / "more.cuh").write_text("__global__ void g(float a) {}")
    (tmp_path / "main.cu").write_text('#include "kernels.cuh"\n')
    source = Source.read(tmp_path / "main.cu")
    assert parameters(source, "f") == (Parameter("n", "int"),)
    assert parameters(source, "g") == (Parameter("a", "float"),)


@pytest.mark.parametrize(
    ("text", "expression", "told"),
    [
        ("__global__ void f(int n) {}\n__global__ void g() {}", "h", "it has: f, g"),
        ("void f(int n) {}", "f", "it has: none"),
        ("template <typename T, int N>\n__global__ void f(T* x) {}", "f<float>", "t.cu:2:17: error"),
        ("template <typename T>\n__global__ void f(T* x) {}", "f<float, 2>", "f has 1 template"),
        ("struct S {};\n__global__ void f(int n,\n S s) {}", "f", "t.cu:3:2: error: s is a S by value"),
        ("__global__ void f(int) {}", "f", "write a type and a name"),
        ("__global__ void f(unsigned int) {}", "f", "write a type and a name"),
        ("__global__ void f(void (*call)(int)) {}", "f", "write a type and a name"),
        ("__global__ void f(float& x) {}", "f", "x is a float& by value"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_refused_at_its_line(text: str, expression: str, told: str) -> None:
    with pytest.raises(CompileError) as refused:
        parameters(Source(text, "t.cu"), expression)
    assert told in str(refused.value)


def test_python_values_are_spelled_as_template_arguments() -> None:
    arguments = (torch.bfloat16, 576, True, "Activation::kSilu")
    assert instantiation("f", arguments) == "f<__nv_bfloat16, 576, true, Activation::kSilu>"
    assert instantiation("f", ()) == "f"


def test_headers_are_followed_in_the_own_folder_and_each_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#include "b.cuh"\n#include "a.cuh"\n#include <absent.h>\n')
    (tmp_path / "b.cuh").write_text('  #  include "a.cuh"\n#include "nb/types.cuh"\n')
    (tmp_path / "main.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n')
    names = [path.name for path, _ in Source.read(tmp_path / "main.cu").headers]
    assert sorted(names) == ["a.cuh", "b.cuh", "types.cuh"]


def test_a_source_keeps_its_headers_as_they_were_and_names_each_where_it_is_included(
    tmp_path: Path,
) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.cuh").write_text('#pragma once\n#include "../b.cuh" // up\n')
    (tmp_path / "b.cuh").write_text("int b;\n")
    (tmp_path / "main.cu").write_text("# include <parts/a.cuh>\n#include <cuda_fp16.h>\n")
    source = Source.read(tmp_path / "main.cu")
    (tmp_path / "b.cuh").write_text("int edited;\n")
    text, headers = source.spelled(lambda path: f"mine/{path.name}")
    assert text == '# include "mine/a.cuh"\n#include <cuda_fp16.h>\n'
    assert headers == {
        tmp_path / "parts" / "a.cuh": '#pragma once\n#include "mine/b.cuh" // up\n',
        tmp_path / "b.cuh": "int b;\n",
    }
    assert source.texts[str(tmp_path / "parts" / "a.cuh")].endswith('#include "../b.cuh" // up\n')
