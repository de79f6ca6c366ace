"""CUDA C on the CPU: the same `.cu`, compiled as C++ and run thread by thread.

`EmulatedProgram` takes the place of a program on a GPU: `program.kernel("scale", torch.float32)`
gives a kernel that is launched on CPU tensors, and has run when the launch returns. With
`checks=True` every access to memory is looked at, and a launch that does what CUDA leaves undefined
raises `EmulationError`; without, a wild access is as wild as in C.

Threads of a block are fibers (`runtime/`), so that barriers and warp operations mean what they mean
on a GPU; blocks are spread over `torch.get_num_threads()` threads of the operating system. What is
not modelled: time, caches, and the order of memory between blocks. A kernel that waits in a loop for
another thread's write, with no barrier, waits for ever, which is an error after `BLOCK_SECONDS`. Which
lanes are converged is the hardware's choice: `__activemask()` names the calling lane alone.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from nbengine.kernels.emulator import build
from nbengine.kernels.emulator.build import NoCompiler
from nbengine.kernels.emulator.error import EmulationError
from nbengine.kernels.emulator.listeners import (
    EVENTS,
    GLOBAL,
    RECORDED,
    SHARED,
    Counters,
    Counts,
    Event,
)
from nbengine.kernels.emulator.places import Place, Places
from nbengine.kernels.program import MAX_SHARED_BYTES, MAX_THREADS, Kernel, Program
from nbengine.kernels.source import Source, launch_bound
from nbengine.progress import doing

__all__ = [
    "Counters",
    "EmulatedKernel",
    "EmulatedProgram",
    "EmulationError",
    "Event",
    "NoCompiler",
    "Place",
]

Three = tuple[int, int, int]

BLOCK_SECONDS = 20.0
"""Of a processor. A block that has used so many is taken to run for ever: it has made some 800
million accesses to memory, if each was checked."""


class EmulatedProgram(Program):
    """A source on this machine's CPU. With `counters`, each kernel has those of its last launch in
    `kernel.counters`."""

    def __init__(self, source: Source, *, checks: bool = False, counters: bool = False) -> None:
        super().__init__(source, torch.device("cpu"))
        self.checks, self.counters = checks, counters

    def _make(self, expression: str) -> EmulatedKernel:
        return EmulatedKernel(self.source, expression, checks=self.checks, counters=self.counters)


class EmulatedKernel(Kernel):
    """Compiled when made. A launch returns when the grid has run.

    Raises `CompileError`, `NoCompiler`, `ToolchainMissing`; launched, `EmulationError`. Without
    checks, of the kinds of error only those are seen that stop the kernel itself: a barrier or warp
    operation that is waited in for ever, wrong masks and lanes, traps, assertions, overflowing stacks
    and, on Linux, blocks that do not end.

    An interrupt (SIGINT) ends a launch on Python's main thread. Elsewhere than on Linux it does so at
    a barrier, a warp operation or the end of a block, with checks at the next access to memory.
    """

    def __init__(
        self, source: Source, expression: str, *, checks: bool = False, counters: bool = False
    ) -> None:
        super().__init__(source, expression, torch.device("cpu"))
        self.counters: Counters | None = None
        self._source = source
        self._listeners = _CHECKS * checks | _COUNTERS * counters
        with doing(f"compiling {expression}"):
            self._library = build.compile_kernel(
                source, expression, bool(self._listeners), whole_accesses=counters
            )
        self.max_threads = launch_bound(source, expression) or MAX_THREADS
        self.max_shared_bytes = MAX_SHARED_BYTES - self._library.static_bytes
        self._places = Places(self._library.path, source)
        self._runtime = _runtime()
        loaded = ctypes.CDLL(str(self._library.path))
        self._thread_main = ctypes.cast(loaded.nb_thread_main, ctypes.c_void_p)
        self._shared_anchor = ctypes.cast(loaded.nb_shared_anchor, ctypes.c_void_p)

    def launch(
        self, grid: Three, block: Three, shared_bytes: int, arguments: tuple[Any, ...]
    ) -> None:
        self._launch_with(self._listeners, grid, block, shared_bytes, arguments)

    def trace(
        self,
        grid: Any,
        block: Any,
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        of: Three = (0, 0, 0),
    ) -> list[Event]:
        """Launch, and return what the threads of the block with the index `of` did, in the order in
        which it was done here. Of a kernel made with checks or counters, for a small launch."""
        if not self._listeners:
            raise ValueError(f"{self.name} was compiled without checks, and announces no events")
        launch = self[grid, block, shared_bytes]
        self.check(tuple(arguments))
        with_trace = self._listeners | _TRACE
        recorded = self._launch_with(
            with_trace, launch.grid, launch.block, shared_bytes, tuple(arguments), of
        )
        return list(self._events(recorded, tuple(arguments)))

    def shared_variables(self, shared_bytes: int = 0) -> list[tuple[str, int, int]]:
        """Name, bytes, and bytes of an element (1 where that is not known) of each variable in shared
        memory, in a launch with so much of it. Of a kernel made with checks or counters."""
        return [
            (
                variable.name,
                shared_bytes if variable.is_dynamic else variable.num_bytes,
                _element_size(self._source, variable.name) or 1,
            )
            for variable in self._library.variables
            if not variable.is_guard
        ]

    def _launch_with(
        self,
        listeners: int,
        grid: Three,
        block: Three,
        shared_bytes: int,
        arguments: tuple[Any, ...],
        traced: Three = (0, 0, 0),
    ) -> np.ndarray[Any, Any]:
        packed = (_Argument * len(arguments))(*map(_argument, arguments))
        request = _Launch(
            thread_main=self._thread_main,
            arguments=ctypes.addressof(packed),
            shared_anchor=self._shared_anchor,
            grid=grid,
            block=block,
            num_os_threads=torch.get_num_threads(),
            listeners=listeners,
            traced_block=traced,
            knows_memory=not any(p.c_type.endswith("**") for p in self.parameters),
            is_interruptible=threading.get_ident() == threading.main_thread().ident,
            block_seconds=BLOCK_SECONDS,
        )
        if listeners:
            buffers = (_Buffer * len(arguments))(*map(_buffer, arguments))
            sized = [
                _SharedVariable(
                    v.from_anchor, shared_bytes if v.is_dynamic else v.num_bytes, v.is_guard
                )
                for v in self._library.variables
            ]
            variables = (_SharedVariable * len(sized))(*sized)
            request.buffers, request.num_buffers = ctypes.addressof(buffers), len(buffers)
            request.variables, request.num_variables = ctypes.addressof(variables), len(variables)
        result = _Result()
        launched = self._runtime.nb_emulator_launch(ctypes.byref(request), ctypes.byref(result))
        if result.kind == b"interrupted":
            raise KeyboardInterrupt
        try:
            if result.printed:
                print(result.printed.decode(errors="replace"), end="")
            if result.kind is not None:
                raise self._error(result, arguments)
            if listeners & _COUNTERS:
                self.counters = result.counts.counters()
            if not result.num_recorded:
                return np.empty(0, RECORDED)
            size = result.num_recorded * RECORDED.itemsize
            return np.frombuffer(ctypes.string_at(result.recorded, size), RECORDED)
        finally:
            self._runtime.nb_emulator_free(launched)

    def _error(self, result: _Result, arguments: tuple[Any, ...]) -> EmulationError:
        pcs = [pc for pc in (result.pc, result.other_pc) if pc]
        places = self._places.of(pcs)
        place = places.get(result.pc)
        if place is None and result.file:
            place = self._places.at(result.file.decode(), result.line)
        message = result.message.decode(errors="replace")
        if "{address}" in message:
            message = message.replace("{address}", self._described(result, arguments))
        if "{other}" in message:
            other = places.get(result.other_pc)
            line = f" (line {other.line}: {other.text.strip()})" if other else ""
            message = message.replace("{other}", f"thread {tuple(result.other_thread)}{line}")
        return EmulationError(
            result.kind.decode(),
            message,
            kernel=self.name,
            block=result.block,
            thread=result.thread,
            place=place,
            other_thread=result.other_thread if result.other_pc else None,
            other_place=places.get(result.other_pc),
        )

    def _described(self, result: _Result, arguments: tuple[Any, ...]) -> str:
        """An address as `name[index]`."""
        address = result.address or 0
        if result.variable >= 0:
            variable = self._library.variables[result.variable]
            size = _element_size(self._source, variable.name)
            if size:
                return f"{variable.name}[{result.offset // size}]"
            return f"byte {result.offset:,} of {variable.name}"
        tensors = [
            (parameter.name, argument)
            for parameter, argument in zip(self.parameters, arguments, strict=True)
            if isinstance(argument, torch.Tensor)
        ]
        null = [
            parameter.name
            for parameter, argument in zip(self.parameters, arguments, strict=True)
            if parameter.is_pointer and (argument is None or argument.data_ptr() == 0)
        ]
        if address < 1 << 20:
            given = f"; of the arguments, {', '.join(null)} is null here" if null else ""
            return f"address {address:#x} (a null pointer{given})"

        def distance(tensor: torch.Tensor) -> int:
            begin = tensor.data_ptr()
            return max(begin - address, address - begin - tensor.nbytes, 0)

        if not tensors:
            return f"address {address:#x}"
        name, tensor = min(tensors, key=lambda named: distance(named[1]))
        if distance(tensor) > 1 << 20:
            return (
                f"address {address:#x}, far from every tensor that was passed (the nearest is {name}; "
                "what a kernel allocates, or reaches through addresses in a tensor of a type that is "
                "no pointer's, is not known)"
            )
        index = (address - tensor.data_ptr()) // tensor.itemsize
        return f"{name}[{index}], where {name} has {tensor.numel():,} elements"

    def _events(
        self, recorded: np.ndarray[Any, Any], arguments: tuple[Any, ...]
    ) -> Iterator[Event]:
        places = self._places.of({int(pc) for pc in np.unique(recorded["pc"]) if pc})
        sizes = [_element_size(self._source, v.name) or 1 for v in self._library.variables]
        for row in recorded:
            name, index, buffer = None, None, int(row["buffer"])
            if row["space"] == GLOBAL:
                name, tensor = self.parameters[buffer].name, arguments[buffer]
                begin = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
                index = (int(row["offset"]) - begin) // tensor.itemsize
            elif row["space"] == SHARED:
                name = self._library.variables[buffer].name
                index = int(row["offset"]) // sizes[buffer]
            place = places.get(int(row["pc"]))
            yield Event(
                int(row["thread"]),
                EVENTS[int(row["event"])],
                name,
                index,
                int(row["bytes"]),
                place.line if place else None,
                int(row["epoch"]),
            )


_CHECKS, _COUNTERS, _TRACE = 1, 2, 4

_SIZES = {
    **dict.fromkeys(("char", "bool", "uint8_t", "int8_t"), 1),
    **dict.fromkeys(("short", "half", "__half", "nv_bfloat16", "__nv_bfloat16"), 2),
    **dict.fromkeys(("int", "unsigned", "float", "half2", "__half2", "nb::uint32"), 4),
    **dict.fromkeys(("long", "double", "float2", "int2", "uint2", "nb::int64"), 8),
    **dict.fromkeys(("float4", "int4", "uint4"), 16),
}


def _element_size(source: Source, variable: str) -> int | None:
    """Of a shared array, as far as its declaration tells."""
    text = "\n".join(source.texts.values())
    declared = re.search(rf"__shared__\b[^;]*?([\w:]+)\s+{re.escape(variable)}\s*\[", text)
    return _SIZES.get(declared[1]) if declared else None


class _Argument(ctypes.Structure):
    """`nb_argument` of the entry: a number in both forms, a pointer in the first."""

    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double))


class _Buffer(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_uint64))


class _SharedVariable(ctypes.Structure):
    _fields_ = (
        ("from_anchor", ctypes.c_int64),
        ("bytes", ctypes.c_uint64),
        ("is_guard", ctypes.c_uint64),
    )


class _Launch(ctypes.Structure):
    """`LaunchRequest` of the runtime."""

    _fields_ = (
        ("thread_main", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("shared_anchor", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("buffers", ctypes.c_void_p),
        ("num_buffers", ctypes.c_uint64),
        ("variables", ctypes.c_void_p),
        ("num_variables", ctypes.c_uint64),
        ("num_os_threads", ctypes.c_uint32),
        ("listeners", ctypes.c_uint32),
        ("traced_block", ctypes.c_uint * 3),
        ("knows_memory", ctypes.c_uint32),
        ("is_interruptible", ctypes.c_uint32),
        ("block_seconds", ctypes.c_double),
    )


class _Result(ctypes.Structure):
    """`Result` of the runtime."""

    _fields_ = (
        ("kind", ctypes.c_char_p),
        ("message", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int64),
        ("address", ctypes.c_void_p),
        ("variable", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("pc", ctypes.c_int64),
        ("other_pc", ctypes.c_int64),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
        ("other_thread", ctypes.c_uint * 3),
        ("printed", ctypes.c_char_p),
        ("counts", Counts),
        ("recorded", ctypes.c_void_p),
        ("num_recorded", ctypes.c_uint64),
    )


def _argument(value: Any) -> _Argument:
    if value is None:
        return _Argument()
    if isinstance(value, torch.Tensor):
        return _Argument(value.data_ptr())
    return _Argument(int(value) if math.isfinite(value) else 0, float(value))


def _buffer(value: Any) -> _Buffer:
    """What a kernel may touch: all of the tensor's storage, as a slice's neighbours are its own
    tensor's."""
    if not isinstance(value, torch.Tensor):
        return _Buffer()
    storage = value.untyped_storage()
    return _Buffer(storage.data_ptr(), storage.nbytes())


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.runtime()))
    library.nb_emulator_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.nb_emulator_launch.restype = ctypes.c_void_p
    library.nb_emulator_free.argtypes = [ctypes.c_void_p]
    library.nb_emulator_free.restype = None
    return library
