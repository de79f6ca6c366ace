"""Kernels for the CPU in C++, compiled on first use for the machine they run on.

`kernels()` gives them to `models.linear` and `execution.attention`, or None where they can't be
built: then those two compute the same with torch's own operations, several times slower in 4 and 8
bits. The library is kept in the user's cache directory, under a name that says what it was made
from, so that it is compiled once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from nbengine.disk_cache import cache_folder, made_whole

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-w",
)

_LONG, _POINTER, _FLOAT, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int


class Matrix(ctypes.Structure):
    """A weight matrix `[out, in]` as the kernels see it: addresses of memory that the caller
    keeps. `kind` is the bits of a weight."""

    _fields_ = (
        ("kind", _LONG),
        ("codes", _POINTER),
        ("scales", _POINTER),
        ("bias", _POINTER),
        ("out_features", _LONG),
        ("in_features", _LONG),
    )


class Layer(ctypes.Structure):
    """One transformer block and its KV cache, for `decode`."""

    _fields_ = (
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("input_norm", _POINTER),
        ("post_attention_norm", _POINTER),
        ("qk_norm", _POINTER),
        ("k_cache", _POINTER),
        ("v_cache", _POINTER),
        ("window", _LONG),
    )


class Shape(ctypes.Structure):
    """What all layers have in common, for `decode`."""

    _fields_ = (
        ("hidden", _LONG),
        ("intermediate", _LONG),
        ("heads", _LONG),
        ("kv_heads", _LONG),
        ("head_dim", _LONG),
        ("block_size", _LONG),
        ("eps", _FLOAT),
        ("scale", _FLOAT),
    )


_SIGNATURES: dict[str, list[Any]] = {
    "tile_rows": [],
    "strip_rows": [],
    "linear": [_POINTER, _POINTER, _LONG, _POINTER, _INT],
    "rms_norm": [_POINTER, _LONG, _POINTER, _FLOAT] + [_LONG] * 3 + [_POINTER, _INT],
    "rotate": [_POINTER, _LONG, _POINTER] + [_LONG] * 3 + [_POINTER, _INT],
    "silu_and_mul": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "write_kv": [_POINTER, _LONG] * 2 + [_POINTER] * 3 + [_LONG] * 4,
    "attend_decodes": [_POINTER, _LONG] + [_POINTER] * 3 + [_LONG] + [_POINTER] * 3 + [_LONG] * 5
    + [_FLOAT, _LONG, _FLOAT, _INT],
    "decode": [_POINTER, _LONG] + [_POINTER] * 6 + [_LONG, _LONG, _INT],
}  # fmt: skip

_log = logging.getLogger(__name__)


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled library, or None without a working C++ compiler or with the environment
    variable `NBENGINE_CPU_KERNELS=0`. Import torch first: the library then runs on the threads
    that torch's OpenMP has already started."""
    if os.environ.get("NBENGINE_CPU_KERNELS") == "0":
        return None
    try:
        return load(build())
    except (OSError, BuildError) as error:
        _log.warning(
            "nbengine's CPU kernels could not be built, and torch's slower operations take their "
            "place (a C++ compiler, for example Debian's package g++, mends this): %s",
            error,
        )
        return None


class BuildError(Exception):
    """There is no C++ compiler, or it refused."""


def build(flags: tuple[str, ...] = FLAGS, cache: Path | None = None) -> Path:
    """Compile the kernels, unless that was done before, and return the library's path. Raises
    `BuildError`, and `OSError` where `cache` can't be written to."""
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name
         and (found := shutil.which(name))), None
    )  # fmt: skip
    if compiler is None:
        raise BuildError("no C++ compiler (g++, c++, clang++ or $CXX) on the PATH")
    source = SOURCE.read_bytes()
    # "native" means another machine's instructions once a home directory travels.
    made_from = (source, repr((compiler, flags)).encode(), _processor().encode())
    name = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:20]
    library = (cache or cache_folder()) / f"cpu-{name}.so"
    if not library.exists():
        print("nbengine: compiling its CPU kernels, once (some seconds)", file=sys.stderr)
        with made_whole(library) as target:
            command = [compiler, *flags, str(SOURCE), "-o", str(target)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            except subprocess.CalledProcessError as error:
                raise BuildError(f"{compiler} failed: {error.stderr.strip()[:500]}") from error
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{compiler} took more than {error.timeout:.0f} s") from error
    return library


def load(library: Path) -> ctypes.CDLL:
    """Raises `OSError` for what is no such library."""
    loaded = ctypes.CDLL(str(library))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = None if arguments else _LONG
    return loaded


def _processor() -> str:
    """What the compiler calls native, as far as it can be told cheaply."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        return "".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model"))}))
    return f"{platform.machine()} {platform.processor()}"
