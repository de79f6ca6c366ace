"""NVRTC: results, the cache, and errors at the user's own lines. None of it needs a GPU."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbengine.kernels import CompileError, Diagnostic, Source, compiler
from nbengine.kernels.source import CUDA_ROOT

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC has no build for macOS")

TEXT = """#include "nb/types.cuh"

template <typename T>
__global__ void scale(T* out, const T* x, int n, float factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = nb::from_float<T>(nb::to_float(x[i]) * factor);
}
"""
SOURCE = Source(TEXT, "scale.cu")


@pytest.fixture(autouse=True)
def single_bytes() -> Iterator[None]:
    """NVRTC writes its logs into bytes, and all equal bytes of length one are a single object."""
    yield
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compiler.cubin_folder()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The expressions that NVRTC was given."""
    given: list[str] = []
    run = compiler._run_nvrtc

    def counted(source: Source, expression: str, options: tuple[str, ...]) -> object:
        given.append(expression)
        return run(source, expression, options)

    monkeypatch.setattr(compiler, "_run_nvrtc", counted)
    return given


def refusal(text: str, expression: str, architecture: str = "sm_90") -> CompileError:
    with pytest.raises(CompileError) as refused:
        compiler.compile(Source(text, "my.cu"), expression, architecture)
    return refused.value


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"])
def test_machine_code_and_ptx_come_without_a_gpu(architecture: str) -> None:
    cubin = compiler.compile(SOURCE, "scale<__half>", architecture)
    assert cubin.code.startswith(b"\x7fELF")
    assert cubin.symbol.encode() in cubin.code
    assert f".target {architecture}" in cubin.ptx
    assert f".entry {cubin.symbol}" in cubin.ptx
    assert 0 < cubin.resources.registers < 64
    assert cubin.warnings == ()


def test_the_second_time_it_comes_from_the_cache_and_is_the_same(compilations: list[str]) -> None:
    first = compiler.compile(SOURCE, "scale<float>", "sm_90")
    assert compiler.compile(SOURCE, "scale<float>", "sm_90") == first
    assert compilations == ["scale<float>"]


def test_warnings_come_from_the_cache_too(compilations: list[str]) -> None:
    source = Source("__global__ void f() { int unused; }", "my.cu")
    for _ in range(2):
        (warning,) = compiler.compile(source, "f", "sm_90").warnings
        assert (warning.place, warning.severity) == ("my.cu:1:27", "warning")
        assert "never referenced" in warning.message
    assert len(compilations) == 1


def test_everything_that_it_is_made_from_makes_another_entry(
    compilations: list[str], tmp_path: Path
) -> None:
    header = tmp_path / "factor.cuh"
    nested = tmp_path / "nested.cuh"
    header.write_text('#include "nested.cuh"\n')
    nested.write_text("#define FACTOR 2\n")
    text = '#include "factor.cuh"\n__global__ void f(float* x) { *x *= FACTOR; }\n'
    (tmp_path / "f.cu").write_text(text)
    source = Source.read(tmp_path / "f.cu")
    made = {compiler.compile(source, "f", "sm_90").ptx}
    made.add(compiler.compile(source, "f", "sm_80").ptx)
    made.add(compiler.compile(source, "f", "sm_90", ["--use_fast_math"]).ptx)
    made.add(compiler.compile(Source(text + "\n", source.name, tmp_path), "f", "sm_90").ptx)
    nested.write_text("#define FACTOR 3\n")
    made.add(compiler.compile(Source.read(tmp_path / "f.cu"), "f", "sm_90").ptx)
    assert len(compilations) == 5
    assert sum(THREE in ptx for ptx in made) == 1


THREE = "0f40400000"  # 3.0f in PTX


def test_a_header_in_a_folder_of_the_options_makes_another_entry_too(
    compilations: list[str], tmp_path: Path
) -> None:
    source = Source(
        '#include "nb/types.cuh"\n#include "factor.cuh"\n'
        "__global__ void f(float* x) { *x *= FACTOR; }\n",
        "f.cu",
    )
    found = []
    for option in (f"-I{tmp_path}", f"--include-path={tmp_path}"):
        for factor in (2, 3):
            text = f'#include "nb/types.cuh"\n#define FACTOR {factor}\n'
            (tmp_path / "factor.cuh").write_text(text)
            found.append(THREE in compiler.compile(source, "f", "sm_90", [option]).ptx)
    assert found == [False, True, False, True]


def test_headers_are_compiled_as_they_were_when_the_source_was_read(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    once = tmp_path / "parts" / "once.cuh"
    once.write_text('#pragma once\n#include "factor.cuh"\nconstexpr float kFactor = FACTOR;\n')
    factor = tmp_path / "parts" / "factor.cuh"
    factor.write_text("#ifndef FACTOR\n#define FACTOR 3\n#endif\n")
    (tmp_path / "f.cu").write_text(
        '#include "parts/once.cuh"\n#include "parts/factor.cuh"\n#include "parts/once.cuh"\n'
        "template <typename T> __global__ void f(T* x) { *x *= kFactor; }\n"
    )
    source = Source.read(tmp_path / "f.cu")
    assert THREE in compiler.compile(source, "f<float>", "sm_80").ptx
    factor.write_text("#define FACTOR 2\n")
    once.unlink()
    assert THREE in compiler.compile(source, "f<float>", "sm_90").ptx


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "folder"])
def test_a_damaged_entry_is_compiled_again(
    cache: Path, compilations: list[str], damage: str
) -> None:
    first = compiler.compile(SOURCE, "scale<float>", "sm_90")
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(content[:-1])
    elif damage == "changed":
        entry.write_bytes(content.replace(b"\x7fELF", b"\x7fELG"))
    elif damage == "empty":
        entry.write_bytes(b"")
    else:
        entry.unlink()
        entry.mkdir()
    assert compiler.compile(SOURCE, "scale<float>", "sm_90") == first
    assert len(compilations) == 2


def test_a_cache_that_can_not_be_written_costs_only_time(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    assert compiler.compile(SOURCE, "scale<float>", "sm_90").code
    assert "can't be kept" in caplog.text


def test_the_cache_stays_small_and_forgets_what_was_not_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    compiler.compile(SOURCE, "scale<float>", "sm_80")
    (old,) = cache.iterdir()
    monkeypatch.setattr(compiler, "CACHE_BYTES", int(2.5 * old.stat().st_size))
    compiler.compile(SOURCE, "scale<float>", "sm_86")
    compiler.compile(SOURCE, "scale<float>", "sm_80")  # asked for again
    compiler.compile(SOURCE, "scale<float>", "sm_89")
    assert len(list(cache.iterdir())) == 2
    compiler.compile(SOURCE, "scale<float>", "sm_80")
    assert len(compilations) == 3
    compiler.clear_cache()
    assert list(cache.iterdir()) == []


def test_threads_may_compile_the_same_at_once(cache: Path) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(compiler.compile(SOURCE, "scale<float>", "sm_90").code)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(list(cache.iterdir())) == 1


def test_an_error_shows_the_users_line_and_a_caret() -> None:
    text = TEXT.replace("* factor", "* facter")
    error = refusal(text, "scale<float>")
    assert error.diagnostics[0].place == "my.cu:6:62"
    assert 'identifier "facter" is undefined' in str(error)
    lines = str(error).splitlines()
    (at,) = (i for i, line in enumerate(lines) if "facter);" in line)
    assert lines[at + 1].index("^") == lines[at].index("facter")
    assert lines[at].startswith("    6 |   if (i < n)")


def test_an_error_inside_a_template_says_what_was_instantiated() -> None:
    text = """template <typename T> __device__ T twice(T x) { return x.value; }
template <typename T> __global__ void f(T* x) { *x = twice(*x); }
"""
    error = refusal(text, "f<float>")
    (diagnostic,) = error.diagnostics
    assert diagnostic.line == 1
    assert any("T=float" in note and "line 2" in note for note in diagnostic.notes)
    assert "T=float" in str(error)


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("scale<nosuch>", 'identifier "nosuch" is undefined'),
        ("scale<3>", "cannot determine which instance"),
        ("scale<float", "expected"),
    ],
)
def test_an_error_in_the_template_arguments_is_shown_at_the_kernel(
    expression: str, told: str
) -> None:
    error = refusal(TEXT, expression)
    assert error.diagnostics[0].file == "my.cu"
    assert error.diagnostics[0].line == 4
    assert told in str(error)
    assert expression in str(error)
    assert "__nv_name_map" not in str(error)
    assert "__global__ void scale" in str(error)


def test_a_missing_brace_is_told_alone() -> None:
    error = refusal(TEXT.removesuffix("}\n"), "scale<float>")
    (diagnostic,) = error.diagnostics
    assert diagnostic.place == "my.cu:4:17"
    assert "closing brace of template definition not found" in str(error)


def test_what_an_instance_refuses_names_no_line_of_nvrtcs_own() -> None:
    text = "template <typename T> __global__ T f(T* x) { return *x; }\n"
    error = refusal(text, "f<float>")
    assert "must have a void return type" in str(error)
    assert "based on template argument <float>" in str(error)
    assert "__nv_name_map" not in str(error)


def test_a_caret_stands_at_its_character_after_those_of_several_bytes() -> None:
    error = refusal("__global__ void f(float* x) {\n\t/* äöü€ */\t*x = missing;\n}\n", "f")
    (at,) = (i for i, line in enumerate(str(error).split("\n")) if "= missing" in line)
    line, caret = str(error).split("\n")[at : at + 2]
    assert caret.index("^") == line.index("missing")


def test_a_half_type_without_its_header_is_told_which() -> None:
    error = refusal("template <typename T> __global__ void f(T* x) {}", "f<__nv_bfloat16>")
    assert "#include <cuda_bf16.h>" in str(error)


def test_inline_assembly_that_ptxas_refuses_is_shown_at_its_source_line() -> None:
    error = refusal('__global__ void f(int x) {\n  asm volatile("bogus.op %0;" :: "r"(x));\n}', "f")
    assert error.diagnostics[0].place == "my.cu:2"
    assert "bogus" in str(error)
    assert '2 |   asm volatile("bogus.op' in str(error)


def test_a_header_of_the_user_is_read_for_its_lines(tmp_path: Path) -> None:
    (tmp_path / "mine.cuh").write_text(
        "#pragma once\n__device__ int broken() { return missing; }\n"
    )
    (tmp_path / "f.cu").write_text('#include "mine.cuh"\n__global__ void f(int* x) {}\n')
    source = Source.read(tmp_path / "f.cu")
    (tmp_path / "mine.cuh").write_text("")
    with pytest.raises(CompileError) as refused:
        compiler.compile(source, "f", "sm_90")
    assert refused.value.diagnostics[0].place.startswith(f"{tmp_path / 'mine.cuh'}:2:")
    assert "2 | __device__ int broken()" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('#include "nope.h"\n__global__ void f() {}', 'cannot open source file "nope.h"'),
        ("__global__ void f() { /* }", "comment unclosed"),
        ("__global__ void f(float* x) { __shared__ float s[99999]; s[*(int*)x] = 1; *x = s[1]; }",
         "too much shared data"),
        ('__global__ void f() { static_assert(1 == 2, "one is not two"); }', "one is not two"),
    ],
)  # fmt: skip
def test_other_refusals_keep_the_compilers_words(text: str, told: str) -> None:
    error = refusal(text, "f")
    assert told in str(error)
    assert error.diagnostics
    assert told in error.log


def test_the_working_directory_is_no_include_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.cuh").write_text("")
    monkeypatch.chdir(tmp_path)
    assert "here.cuh" in str(refusal('#include "here.cuh"\n__global__ void f() {}', "f"))


def test_a_device_newer_than_nvrtc_gets_code_of_its_own_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        compiler, "supported_architectures", lambda: ("sm_80", "sm_86", "sm_90", "sm_100")
    )
    assert compiler.architecture_for((8, 0)) == "sm_80"
    assert compiler.architecture_for((8, 9)) == "sm_86"
    assert compiler.architecture_for((10, 3)) == "sm_100"
    with pytest.raises(compiler.ToolchainMissing, match=r"capability 12\.0.*sm_80 to sm_100"):
        compiler.architecture_for((12, 0))


def test_without_nvidias_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiler.nvrtc_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(compiler.ToolchainMissing, match=r"pip install 'nbengine\[cuda\]'"):
        compiler.compile(SOURCE, "scale<float>", "sm_90")


def test_every_header_of_the_project_compiles_by_itself() -> None:
    for header in sorted((CUDA_ROOT / "include" / "nb").glob("*.cuh")):
        text = f'#include "nb/{header.name}"\n__global__ void f() {{}}\n'
        cubin = compiler.compile(Source(text, f"{header.stem}.cu"), "f", "sm_80")
        assert cubin.warnings == (), header.name


def test_diagnostics_are_data() -> None:
    error = refusal("__global__ void f() { return 1 }", "f")
    assert all(isinstance(d, Diagnostic) for d in error.diagnostics)
    assert {d.severity for d in error.diagnostics} == {"error"}
