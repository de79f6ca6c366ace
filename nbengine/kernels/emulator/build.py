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
from nbengine.kernels.source import INCLUDE_ROOT, Source, declared_at
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
    "-g1",  # lines, and nothing else
)
_FAST = ("-O2", "-march=native")
_CHECKED = (
    "-O1",
    "-fsanitize=thread",  # calls the runtime before every access to memory
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
    # Expanded in place, a copy of more than 16 bytes would be announced to nobody.
    *("-fno-builtin-memcpy", "-fno-builtin-memmove", "-fno-builtin-memset"),
)
_ONLY_GCC = (
    "-fno-gnu-unique",  # else two versions of a kernel would share variables
    "-fno-extern-tls-init",  # shared memory has no constructors
    "-gstatement-frontiers",  # a loop that is nothing but a jump has a line
    "-fstack-clash-protection",  # no frame reaches over the guard of a stack
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


def compile_kernel(
    source: Source, expression: str, checks: bool, *, whole_accesses: bool = False
) -> Library:
    """The library of one kernel. With `whole_accesses` a structure that is copied is announced as
    one access, as a GPU makes it, and not member by member: for who counts them, and slower. Raises
    `CompileError`, `NoCompiler` and `ToolchainMissing`."""
    names = {path: f"header{i}.cuh" for i, (path, _) in enumerate(source.headers)}
    text, headers = source.spelled(names.__getitem__)
    text = f"{_at_first_line(source.compiled_name)}{text}\n"
    entry = _at_first_line(_ENTRY_NAME) + _ENTRY.replace("KERNEL", expression)
    flags = (*_COMMON, *(_CHECKED if checks else _FAST), *_own_flags())
    base = flags
    if whole_accesses and not _is_clang():
        flags = (*flags, "-fno-tree-sra")  # the precompiled prelude serves all the same
    key = _key(text, entry, *map(str, headers), *headers.values(), str(source.folder), *flags)
    include = [f"-I{path}" for path in (_INCLUDE, INCLUDE_ROOT, *nvidia_headers())]
    include += [f"-I{path / 'cccl'}" for path in nvidia_headers()]
    if source.folder is not None:
        include.append(f"-iquote{source.folder}")
    wrapped = _WRAPPED if checks and sys.platform != "darwin" else ()

    def make(target: Path) -> None:
        unit, compiled = target.with_name(UNIT), target.with_name("kernel.o")
        unit.write_text(text + entry)
        for path, header in headers.items():
            unit.with_name(names[path]).write_text(_at_first_line(str(path)) + header)
        compile = (*flags, *include, "-include", str(_prelude(base)), str(unit))
        try:
            _run(*compile, "-c", "-o", str(compiled))
            objects = [str(compiled)]
            if dynamic := _dynamic_shared(compiled):
                storage = target.with_name("storage.cpp")
                storage.write_text(_storage(dynamic))
                objects.append(str(target.with_name("storage.o")))
                _run(*_COMMON, "-c", str(storage), "-o", objects[-1])
            _run(*objects, str(runtime()), *wrapped, *_LINKED, "-o", str(target))
        except _Refused as refused:
            log = source.with_own_name(str(refused))
            if _ENTRY_NAME in log:  # what is wrong without the entry is told alone
                unit.write_text(text)
                try:
                    _run(*compile, "-fsyntax-only")
                except _Refused as alone:
                    log = source.with_own_name(str(alone))
            title = f"{source.name}: {expression} does not compile for the emulator"
            said = parse_gcc(log) or _assembled(log) or _undefined(log, source)
            remarks = _located(said, source, expression)
            raise CompileError(title, remarks, source.texts, log) from None

    library = _made(f"kernel-{key}.so", make)
    return _with_variables(library, expression) if checks else Library(library)


UNIT = "emulated_kernel.cpp"
"""The translation unit: the source, and the entry after it."""

_NO_PTX = (
    "inline PTX can't be emulated: put it into a function of a header that gives the same in C++ "
    "where NB_EMULATOR is defined, as cuda/include/nb/fast_math.cuh does"
)
_NO_INSTANCE = "the template has no instance for these arguments"
_WRAPPED = tuple(f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset"))
_LINKED = ("-shared", *(() if sys.platform == "darwin" else ("-Wl,-z,defs",)))


def _located(
    remarks: Iterable[Diagnostic], source: Source, expression: str
) -> tuple[Diagnostic, ...]:
    """The entry is no text of the user's. Of what is said of it the first is about the expression,
    and belongs to the kernel's line; the rest follows from that."""
    kept, is_placed = [], False
    for remark in remarks:
        message = _NO_PTX if _OF_ASM.search(remark.message) else remark.message
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


def _assembled(log: str) -> tuple[Diagnostic, ...]:
    """What the assembler did not take: PTX, in all likelihood."""
    return tuple(
        Diagnostic(match["file"], int(match["line"]), None, "error", f"asm: {match['message']}")
        for match in _ASSEMBLER.finditer(log)
    )


_OF_ASM = re.compile(r"\b(?:asm|output constraint)\b")
_ASSEMBLER = re.compile(r"^(?P<file>.+):(?P<line>\d+): Error: (?P<message>.*)$", re.MULTILINE)


def _undefined(log: str, source: Source) -> tuple[Diagnostic, ...]:
    """What the linker misses, each once."""
    missing = {match["name"]: match["line"] for match in _UNDEFINED.finditer(log)}
    return tuple(
        Diagnostic(source.name, int(line) if line else None, None, "error",
                   f"{name} is used, and neither the source nor a header of it defines it")
        for name, line in missing.items()
    )  # fmt: skip


_UNDEFINED = re.compile(r"(?::(?P<line>\d+))?:[^:\n]* undefined reference to [`'](?P<name>.*)'")


def _dynamic_shared(compiled: Path) -> tuple[str, ...]:
    """The symbols of what the source and its headers declare `extern __shared__`, by whatever words:
    thread-local, and not defined."""
    if sys.platform == "darwin":
        return ()
    return tuple(name for name, (at, _) in _thread_local_symbols(compiled).items() if at is None)


def _storage(names: tuple[str, ...]) -> str:
    """A second unit: the dynamic shared memory, which all these symbols stand for."""
    return f"""
extern "C" alignas(1024) thread_local unsigned char {_DYNAMIC}[{MAX_SHARED_BYTES}] = {{}};
""" + "".join(
        f'extern "C" thread_local unsigned char nb_name_{i}[] __asm__("{name}") '
        f'__attribute__((alias("{_DYNAMIC}")));\n'
        for i, name in enumerate(names)
    )


_DYNAMIC = "nb_dynamic_shared"


def _with_variables(library: Path, expression: str) -> Library:
    """By the thread-local symbols of the library. Of several names for the dynamic shared memory,
    one."""
    symbols = _thread_local_symbols(library)
    anchor, _ = symbols.pop("nb_anchor")
    dynamic, _ = symbols.pop(_DYNAMIC, (None, 0))
    assert anchor is not None
    symbol_at = {at: symbol for symbol, (at, _) in symbols.items() if at is not None}
    found = {
        symbol: SharedVariable(
            *(_unmangled(symbol), at - anchor, symbols[symbol][1], at == dynamic),
            is_guard=symbol.startswith("_ZGV"),
        )
        for at, symbol in symbol_at.items()
    }
    name = expression.partition("<")[0].strip().rpartition("::")[2]
    own = re.compile(rf"_ZZ.*(?<!\d){len(name)}{name}")
    return Library(
        library,
        tuple(sorted(found.values(), key=lambda variable: variable.is_guard)),
        sum(variable.num_bytes for symbol, variable in found.items() if own.match(symbol)),
    )


def _thread_local_symbols(path: Path) -> dict[str, tuple[int | None, int]]:
    """By name, the place (None where it is not defined) and the size."""
    tool = shutil.which("readelf") or shutil.which("llvm-readelf")
    if tool is None:
        raise NoCompiler(
            "the emulator reads a kernel's variables with readelf, which is not on the PATH: "
            "install binutils (on Linux)"
        )
    output = subprocess.run([tool, "-sW", str(path)], capture_output=True, text=True, check=True)
    return {
        fields[7]: (None if fields[6] == "UND" else int(fields[1], 16), int(fields[2], 0))
        for fields in map(str.split, output.stdout.splitlines())
        if len(fields) == 8 and fields[3] == "TLS"
    }


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
    timers = () if sys.platform == "darwin" else ("-lrt",)  # a library before glibc 2.34
    name = f"runtime-{_key(*flags)}.so"
    if sys.platform != "darwin":  # kernels ask for the one that is loaded, by its name
        flags = (*flags, f"-Wl,-soname,{name}")
    return _made(name, lambda target: _run(*flags, *sources, *timers, "-o", str(target)))


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


_ENTRY_NAME = "emulated_entry"
_ENTRY = """
#define NB_EXPORTED extern "C" __attribute__((visibility("default"), no_sanitize("thread")))

struct nb_argument {
  long long nb_integer;
  double nb_real;
};

template <typename NbP>
__attribute__((no_sanitize("thread"))) NbP nb_unpacked(const nb_argument& nb_given) {
  if constexpr (std::is_pointer_v<NbP>) {
    return reinterpret_cast<NbP>(nb_given.nb_integer);
  } else if constexpr (std::is_integral_v<NbP> || std::is_enum_v<NbP>) {
    return static_cast<NbP>(nb_given.nb_integer);
  } else {
    return static_cast<NbP>(nb_given.nb_real);
  }
}

template <typename... NbP, size_t... nb_i>
__attribute__((no_sanitize("thread"))) void nb_call(void (*nb_kernel)(NbP...),
                                                    const nb_argument* nb_arguments,
                                                    std::index_sequence<nb_i...>) {
  nb_kernel(nb_unpacked<std::remove_cv_t<NbP>>(nb_arguments[nb_i])...);
}

template <typename... NbP>
__attribute__((no_sanitize("thread"))) void nb_call(void (*nb_kernel)(NbP...), const void* nb_arguments) {
  nb_call(nb_kernel, static_cast<const nb_argument*>(nb_arguments), std::index_sequence_for<NbP...>());
}

NB_EXPORTED void nb_thread_main(const void* nb_arguments) {
  constexpr auto nb_kernel = &KERNEL;
  nb_call(nb_kernel, nb_arguments);
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
