"""From CUDA C to libraries for this machine's CPU, with the system's C++ compiler.

Three things are compiled, each once, and kept in the user's cache directory under names that say
what they were made from: the runtime library; the prelude (NVIDIA's half and bfloat16 headers, as a
precompiled header); and for each kernel one library out of the source as it stands, between the
prelude and an entry that unpacks its arguments.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from nbengine.disk_cache import cache_folder, drop_oldest, made_whole, mark_used
from nbengine.errors import NbengineError
from nbengine.kernels.diagnostics import CompileError, Diagnostic, parse_gcc
from nbengine.kernels.program import MAX_SHARED_BYTES
from nbengine.kernels.source import INCLUDE_ROOT, Source, declared_at, without_comments
from nbengine.kernels.toolchain import headers_identity, nvidia_headers

CACHE_BYTES = 512 * 2**20
"""Files that were not used for the longest are deleted when the cache is larger. A kernel takes some
40 KiB, a precompiled prelude 32 MiB."""

_HERE = Path(__file__).parent
_INCLUDE = _HERE / "include"
_RUNTIME = _HERE / "runtime"

_COMMON = (
    "-std=gnu++17",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-pthread",
    "-w",
)
_FAST = ("-O2", "-march=native")
_CHECKED = (
    "-O1",
    "-g1",
    "-fsanitize=thread",  # calls the runtime before every access to memory
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
)
_ONLY_GCC = (
    "-fno-gnu-unique",  # else two versions of a kernel would share variables
    # With checks, nothing that reads memory where the source does not.
    *("-fno-tree-loop-im", "-fno-ssa-phiopt"),
)


class NoCompiler(NbengineError, RuntimeError):
    """The emulator needs a C++ compiler, and this machine has none."""


@dataclass(frozen=True, slots=True)
class SharedVariable:
    """A variable of shared memory in a kernel's library, at so many bytes from `nb_anchor`. A
    dynamic one has the size that the launch says. A guard is no variable of the source: with it C++
    remembers that another one was initialised."""

    name: str
    from_anchor: int
    num_bytes: int
    is_dynamic: bool
    is_guard: bool


@dataclass(frozen=True, slots=True)
class Library:
    """A compiled kernel; its shared variables where it was compiled with checks."""

    path: Path
    variables: tuple[SharedVariable, ...] = ()
    static_bytes: int = 0
    """Of the variables that the kernel itself declares, and not a function that it may call."""


def compile_kernel(source: Source, expression: str, checks: bool) -> Library:
    """The library of one kernel. Raises `CompileError`, `NoCompiler` and `ToolchainMissing`."""
    names = {path: f"header{i}.cuh" for i, (path, _) in enumerate(source.headers)}
    text, headers = source.spelled(names.__getitem__)
    text = f"{_at_first_line(source.name)}{text}\n"
    entry = _at_first_line(_ENTRY_NAME) + _ENTRY.replace("KERNEL", expression)
    flags = (*_COMMON, *(_CHECKED if checks else _FAST), *_own_flags())
    key = _key(text, entry, *map(str, headers), *headers.values(), str(source.folder), *flags)
    include = [f"-I{path}" for path in (_INCLUDE, INCLUDE_ROOT, *nvidia_headers())]
    if source.folder is not None:
        include.append(f"-iquote{source.folder}")
    wrapped = _WRAPPED if checks and sys.platform != "darwin" else ()

    def make(target: Path) -> None:
        unit, compiled = target.with_name(UNIT), str(target.with_name("kernel.o"))
        unit.write_text(text + entry)
        for path, header in headers.items():
            unit.with_name(names[path]).write_text(_at_first_line(str(path)) + header)
        storage = target.with_name("storage.cpp")
        storage.write_text(_storage(source))
        compile = (*flags, *include, "-include", str(_prelude(flags)), str(unit))
        try:
            _run(*compile, "-c", "-o", compiled)
            _run(*_COMMON, "-c", str(storage), "-o", f"{compiled}2")
            _run(compiled, f"{compiled}2", str(runtime()), *wrapped, "-shared", "-o", str(target))
        except _Refused as refused:
            log = str(refused)
            if _ENTRY_NAME in log:  # what is wrong without the entry is told alone
                unit.write_text(text)
                try:
                    _run(*compile, "-fsyntax-only")
                except _Refused as alone:
                    log = str(alone)
            title = f"{source.name}: {expression} does not compile for the emulator"
            remarks = _located(parse_gcc(log), source, expression)
            raise CompileError(title, remarks, source.texts, log) from None

    library = _made(f"kernel-{key}.so", make)
    return _with_variables(library, source, expression) if checks else Library(library)


UNIT = "emulated_kernel.cpp"
"""The translation unit: the source, and the entry after it."""

_NO_PTX = (
    "inline PTX can't be emulated: put it into a function of a header that gives the same in C++ "
    "where NB_EMULATOR is defined, as cuda/include/nb/fast_math.cuh does"
)
_NO_INSTANCE = "the template has no instance for these arguments"
_WRAPPED = tuple(f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset"))


def _located(
    remarks: Iterable[Diagnostic], source: Source, expression: str
) -> tuple[Diagnostic, ...]:
    """The entry is no text of the user's. Of what is said of it the first is about the expression,
    and belongs to the kernel's line; the rest follows from that."""
    kept, is_placed = [], False
    for remark in remarks:
        message = _NO_PTX if "poison" in remark.message else remark.message
        if remark.file != _ENTRY_NAME:
            notes = (re.sub(rf"^{_ENTRY_NAME}:[:\d]+ ", "", note) for note in remark.notes)
            users = tuple(note for note in notes if _ENTRY_NAME not in note)
            kept.append(replace(remark, message=message, notes=users))
        elif not is_placed:
            if "deduce" in message or "overloaded" in message:
                message = _NO_INSTANCE
            file, line = declared_at(source, expression)
            kept.append(Diagnostic(file, line, None, "error", f"{expression}: {message}"))
            is_placed = True
    return tuple(kept)


def _with_variables(library: Path, source: Source, expression: str) -> Library:
    """By the thread-local symbols of the library."""
    tool = shutil.which("readelf") or shutil.which("llvm-readelf")
    if tool is None:
        raise NoCompiler(
            "the emulator's checks read a kernel's variables with readelf, which is not on the PATH: "
            "install binutils (on Linux)"
        )
    output = subprocess.run([tool, "-sW", str(library)], capture_output=True, text=True, check=True)
    symbols = {
        fields[7]: (int(fields[1], 16), int(fields[2], 0))
        for fields in map(str.split, output.stdout.splitlines())
        if len(fields) == 8 and fields[3] == "TLS" and fields[6] != "UND"
    }
    anchor, _ = symbols.pop("nb_anchor")
    dynamic = _dynamic_shared(source)
    found = {
        symbol: SharedVariable(
            *(_unmangled(symbol), value - anchor, size, symbol in dynamic),
            is_guard=symbol.startswith("_ZGV"),
        )
        for symbol, (value, size) in symbols.items()
    }
    name = expression.partition("<")[0].strip().rpartition("::")[2]
    own = re.compile(rf"_ZZ.*(?<!\d){len(name)}{name}")
    return Library(
        library,
        tuple(sorted(found.values(), key=lambda variable: variable.is_guard)),
        sum(variable.num_bytes for symbol, variable in found.items() if own.match(symbol)),
    )


def _unmangled(symbol: str) -> str:
    """The last name of `_ZZ5scaleIfEvPT_E8partials` (Itanium C++ ABI, 5.1.2): partials."""
    found = symbol
    if symbol.startswith("_Z"):
        for match in re.finditer(r"(?<!\d)\d+", symbol):
            name = symbol[match.end() : match.end() + int(match[0])]
            if name.isidentifier():
                found = name
    return found


def runtime() -> Path:
    """The library that all kernels are linked to."""
    sources = map(str, sorted(_RUNTIME.glob("*.cpp")))
    flags = (
        *("-std=gnu++17", "-O2", "-fPIC", "-shared", "-pthread"),
        # Its own functions and variables are its own, and are reached directly.
        *("-ftls-model=initial-exec", "-fno-semantic-interposition"),
        *(() if sys.platform == "darwin" else ("-Wl,-Bsymbolic",)),
    )
    return _made(
        f"runtime-{_key(*flags)}.so",
        lambda target: _run(*flags, *sources, "-o", str(target)),
    )


def _prelude(flags: tuple[str, ...]) -> Path:
    """A header beside which its precompiled form lies."""
    name = f"prelude-{_key(*flags)}.h"
    include = [f"-I{path}" for path in (_INCLUDE, *nvidia_headers())]
    header = _made(name, lambda target: target.write_text('#include "nb_emulator.h"\n'))
    # The cache sets the header's time whenever it is used; clang would take it for another one.
    timeless = ("-Xclang", "-fno-pch-timestamp") if _is_clang() else ()
    precompile = (*flags, *timeless, *include, "-x", "c++-header", str(header), "-o")
    _made(f"{name}.gch", lambda target: _run(*precompile, str(target)))
    return header


def _at_first_line(file: str) -> str:
    """What follows begins with this file's first line."""
    name = file.replace("\\", "\\\\").replace('"', '\\"')
    return f'#line 1 "{name}"\n'


def _storage(source: Source) -> str:
    """A second unit: what the names of dynamic shared memory stand for, of whatever type they were
    declared, and the initialisation that C++ expects of a thread_local defined elsewhere."""
    return "".join(
        f"alignas(1024) thread_local unsigned char {name}[{MAX_SHARED_BYTES}];\n"
        f'extern "C" void _ZTH{len(name)}{name}() {{}}\n'
        for name in _dynamic_shared(source)
    )


def _dynamic_shared(source: Source) -> tuple[str, ...]:
    """The names that the source and its headers declare `extern __shared__`."""
    texts = map(without_comments, source.texts.values())
    return tuple(dict.fromkeys(name for text in texts for name in _DYNAMIC_SHARED.findall(text)))


_DYNAMIC_SHARED = re.compile(r"\bextern\s+__shared__\b[^;]*?\b(\w+)\s*\[\s*\]\s*;")

_ENTRY_NAME = "emulated_entry"
_ENTRY = """
#define NB_EXPORTED extern "C" __attribute__((visibility("default"), no_sanitize("thread")))

struct nb_argument {
  long long integer;
  double real;
};

template <typename P>
__attribute__((no_sanitize("thread"))) P nb_unpacked(const nb_argument& argument) {
  if constexpr (std::is_pointer_v<P>) {
    return reinterpret_cast<P>(argument.integer);
  } else if constexpr (std::is_integral_v<P> || std::is_enum_v<P>) {
    return static_cast<P>(argument.integer);
  } else {
    return static_cast<P>(argument.real);
  }
}

template <typename... P, size_t... i>
__attribute__((no_sanitize("thread"))) void nb_call(void (*kernel)(P...),
                                                    const nb_argument* arguments,
                                                    std::index_sequence<i...>) {
  kernel(nb_unpacked<std::remove_cv_t<P>>(arguments[i])...);
}

template <typename... P>
__attribute__((no_sanitize("thread"))) void nb_call(void (*kernel)(P...), const void* arguments) {
  nb_call(kernel, static_cast<const nb_argument*>(arguments), std::index_sequence_for<P...>());
}

NB_EXPORTED void nb_thread_main(const void* arguments) {
  constexpr auto nb_kernel = &KERNEL;
  nb_call(nb_kernel, arguments);
}

thread_local char nb_anchor;
NB_EXPORTED char* nb_shared_anchor() { return &nb_anchor; }
"""


@functools.cache
def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    install = {
        "linux": "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: "
        "conda install gxx)",
        "darwin": "run xcode-select --install",
    }.get(sys.platform, "use Linux or macOS (on Windows: WSL) with g++ or clang++")
    raise NoCompiler(
        "the emulator compiles kernels with the system's C++ compiler, and there is no g++, clang++, "
        f"c++ or $CXX on the PATH: {install}"
    )


@functools.cache
def _compiler_version() -> str:
    command = [_compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _is_clang() -> bool:
    return "clang" in _compiler_version()


@functools.cache
def _own_flags() -> tuple[str, ...]:
    """Those that the other compiler does not know."""
    if _is_clang():
        return ()
    command = [_compiler(), "-dumpversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counted_in_bytes = int(version.partition(".")[0]) < 11
    return _ONLY_GCC if counted_in_bytes else (*_ONLY_GCC, "-fdiagnostics-column-unit=byte")


@functools.cache
def _made_from() -> str:
    """What every library depends on: our headers and sources, NVIDIA's, the compiler, the
    processor."""
    digest = hashlib.sha256()
    own = (*sorted(_INCLUDE.rglob("*.h")), *sorted(_RUNTIME.iterdir()), Path(__file__))
    for path in own:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(headers_identity())
    digest.update(f"{_compiler()} {_compiler_version()} {platform.machine()}".encode())
    info = Path("/proc/cpuinfo")  # what -march=native means
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        digest.update(
            "".join(sorted({x for x in lines if x.startswith(("flags", "Feat"))})).encode()
        )
    return digest.hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_made_from(), *parts)).encode()).hexdigest()[:20]


_IN_ENGLISH = {"LC_ALL": "C.UTF-8", "LANGUAGE": ""}


class _Refused(Exception):
    """What the compiler said."""


def _run(*arguments: str) -> None:
    done = subprocess.run(
        [_compiler(), *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | _IN_ENGLISH,
    )
    if done.returncode != 0:
        raise _Refused(done.stderr)


def _made(name: str, make: Callable[[Path], object]) -> Path:
    """The file of this name in the cache, made there first if it is missing."""
    folder = cache_folder("emulator")
    target = folder / name
    if target.exists():
        mark_used(target)
    else:
        with made_whole(target) as path:
            make(path)
        drop_oldest(folder, "*.*", CACHE_BYTES)
    return target
