"""What else can listen to a launch: counters, and a recording of one block."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class Counters:
    """What a launch asked of the memory, summed over its warps. Only addresses are looked at: there
    are no caches, no clocks, and no compiler that would have merged or kept what a GPU's does.

    The lanes' accesses at one instruction are taken to be one access of the warp: each lane's n-th
    since the lanes last met, at a barrier or in an operation of the whole warp. Instructions are
    those of the C++ compiler, with little optimisation: compare two kernels, or a kernel with the
    least it could do, rather than with a profiler's figures.
    """

    global_reads: int
    """Reads of tensors, one for the warp."""
    global_writes: int
    sectors_read: int
    """The pieces of 32 bytes that those touched, each counted once an access."""
    sectors_written: int
    shared_accesses: int
    bank_conflicts: int
    """Passes that shared accesses needed beyond their first: 32 banks of 4 bytes, words that several
    lanes want given once; 8 or 16 bytes a lane are served by halves or quarters of a warp."""
    divergent: int
    """Accesses of fewer lanes than were active in the warp."""
    barriers: int
    """__syncthreads, one for the block."""
    warp_operations: int
    """Shuffles, votes, __syncwarp, ldmatrix, mma."""


class Counts(ctypes.Structure):
    """`Counts` of the runtime."""

    _fields_ = tuple((field.name, ctypes.c_uint64) for field in fields(Counters))

    def counters(self) -> Counters:
        return Counters(*(getattr(self, field.name) for field in fields(Counters)))


RECORDED = np.dtype(
    [
        ("thread", np.uint32),
        ("event", np.uint32),
        ("space", np.int32),
        ("buffer", np.int32),
        ("offset", np.uint64),
        ("bytes", np.uint32),
        ("epoch", np.uint32),
        ("pc", np.uint64),
    ]
)
"""`Recorded` of the runtime."""

EVENTS = {0: "read", 1: "write", 2: "atomic", 3: "copy issued", 4: "copy arrived", 8: "barrier",
          9: "warp operation"}  # fmt: skip
GLOBAL, SHARED = 1, 2
"""`Access::Space` of the runtime."""


@dataclass(frozen=True, slots=True)
class Event:
    """One step of a recorded block. `buffer` is a parameter's or a shared variable's name; `index`
    counts its elements (bytes where the element's size is not known)."""

    thread: int
    """In the block, x first."""
    event: str
    """read, write, atomic, copy issued, copy arrived, barrier or warp operation."""
    buffer: str | None
    index: int | None
    bytes: int
    line: int | None
    """Of the source."""
    epoch: int
    """How many barriers the block had passed."""
