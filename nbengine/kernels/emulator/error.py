"""`EmulationError`: what ended an emulated launch, in the words of the kernel's own source."""

from __future__ import annotations

from collections.abc import Sequence

from nbengine.errors import NbengineError
from nbengine.kernels.emulator.places import Place


class EmulationError(NbengineError, RuntimeError):
    """A kernel did what CUDA leaves undefined, or stopped itself.

    `kind` is one of: out of bounds, misaligned, uninitialised, unfinished copy (read before it was
    waited for), race, divergence (a barrier or warp operation that not all threads reach), wrong
    mask, inactive lane, bad argument, division, assertion, trap, timeout (a block that does not end),
    stack overflow, out of memory (the host's, for the stacks of its threads). `block` and `thread`
    are the (x, y, z) of the thread at fault; of a timeout, those of one that was still running.
    `place` is the line that it was at, None where that is not known. A race, an unfinished copy and
    a divergent barrier have a second thread: `other_thread` and `other_place`.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        kernel: str,
        block: Sequence[int],
        thread: Sequence[int],
        place: Place | None,
        other_thread: Sequence[int] | None = None,
        other_place: Place | None = None,
    ) -> None:
        self.kind, self.kernel = kind, kernel
        self.block, self.thread = tuple(block), tuple(thread)
        self.place = place
        self.other_thread = tuple(other_thread) if other_thread is not None else None
        self.other_place = other_place
        self.file = place.file if place else None
        self.line = place.line if place else None
        who = f"{kernel}, block {self.block}, thread {self.thread}"
        where = f"\n{place.shown()}" if place else ""
        super().__init__(f"{kind}: {who} {message}{where}")
