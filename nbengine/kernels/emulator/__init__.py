"""CUDA C on the CPU: the same `.cu`, compiled as C++ and run thread by thread.

`EmulatedProgram` takes the place of a program on a GPU: `program.kernel("scale", torch.float32)`
gives a kernel that is launched on CPU tensors, and has run when the launch returns. With
`checks=True` every access to memory is looked at, and a launch that does what CUDA leaves undefined
raises `EmulationError`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch

from nbengine.errors import NbengineError
from nbengine.kernels.emulator import build
from nbengine.kernels.program import Kernel, Program
from nbengine.kernels.source import Source


class EmulationError(NbengineError, RuntimeError):
    """A kernel did what CUDA leaves undefined, or stopped itself. `kind` says what; `block` and
    `thread` are the indices of the thread at fault; `file` and `line` are None where unknown."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        kernel: str,
        block: tuple[int, ...],
        thread: tuple[int, ...],
        file: str | None,
        line: int | None,
    ) -> None:
        self.kind, self.kernel, self.block, self.thread = kind, kernel, block, thread
        self.file, self.line = file, line
        where = f"{file}:{line}: " if file else ""
        super().__init__(f"{where}{kind}: {message} ({kernel}, block {block}, thread {thread})")


class EmulatedProgram(Program):
    """A source on this machine's CPU."""

    def __init__(self, source: Source, *, checks: bool = False) -> None:
        super().__init__(source, torch.device("cpu"))
        self.checks = checks

    def _make(self, expression: str) -> EmulatedKernel:
        return EmulatedKernel(self.source, expression, checks=self.checks)


class EmulatedKernel(Kernel):
    """Compiled when made. A launch returns when the grid has run."""

    def __init__(self, source: Source, expression: str, *, checks: bool = False) -> None:
        super().__init__(source, expression, torch.device("cpu"))
        self._runtime = _runtime()
        self._library = ctypes.CDLL(str(build.compile_kernel(source, expression, False)))
        self._arguments = _Argument * len(self.parameters)

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None:
        packed = self._arguments(*map(_argument, arguments))
        request = _Launch(
            thread_main=ctypes.cast(self._library.nb_thread_main, ctypes.c_void_p),
            arguments=ctypes.cast(packed, ctypes.c_void_p),
            shared_anchor=ctypes.cast(self._library.nb_shared_anchor, ctypes.c_void_p),
            dynamic_shared=ctypes.cast(self._library.nb_dynamic_shared, ctypes.c_void_p),
            grid=grid,
            block=block,
            shared_bytes=shared_bytes,
            num_os_threads=torch.get_num_threads(),
        )
        result = _Result()
        launched = self._runtime.nb_emulator_launch(ctypes.byref(request), ctypes.byref(result))
        try:
            if result.printed:
                print(result.printed.decode(errors="replace"), end="")
            if result.failed:
                raise EmulationError(
                    result.kind.decode(),
                    result.message.decode(errors="replace"),
                    kernel=self.name,
                    block=tuple(result.block),
                    thread=tuple(result.thread),
                    file=result.file.decode() or None,
                    line=result.line or None,
                )
        finally:
            self._runtime.nb_emulator_free(launched)


class _Argument(ctypes.Structure):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double))


class _Launch(ctypes.Structure):
    """`LaunchRequest` of the runtime."""

    _fields_ = (
        ("thread_main", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("shared_anchor", ctypes.c_void_p),
        ("dynamic_shared", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("buffers", ctypes.c_void_p),
        ("num_buffers", ctypes.c_uint64),
        ("variables", ctypes.c_void_p),
        ("num_variables", ctypes.c_uint64),
        ("num_os_threads", ctypes.c_uint32),
        ("listeners", ctypes.c_uint32),
    )


class _Result(ctypes.Structure):
    """`Result` of the runtime."""

    _fields_ = (
        ("failed", ctypes.c_uint32),
        ("line", ctypes.c_int32),
        ("buffer", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("kind", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("printed", ctypes.c_char_p),
        ("pc", ctypes.c_void_p),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
    )


def _argument(value: Any) -> _Argument:
    if value is None:
        return _Argument()
    if isinstance(value, torch.Tensor):
        return _Argument(value.data_ptr())
    return _Argument(int(value) if math.isfinite(value) else 0, float(value))


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.nb_emulator_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.nb_emulator_launch.restype = ctypes.c_void_p
    library.nb_emulator_free.argtypes = [ctypes.c_void_p]
    library.nb_emulator_free.restype = None
    return library
