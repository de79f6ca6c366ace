"""What is being done now, in a few words, for whoever waits for it.

Compiling a kernel, verifying it on a grid and measuring it take seconds each, and say so here (`say`,
`doing`). Whoever wants to hear it calls them inside `with progress_to(print):`, a notebook's magics
with a line below the cell; without, nothing happens. Only what the caller himself has asked for is
told: another thread has its own listener, and an engine's thread hears who waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class _Listener:
    show: Callable[[str], object]
    words: str = ""
    """What was said last."""


_LISTENER: ContextVar[_Listener | None] = ContextVar("listener", default=None)


@contextmanager
def progress_to(show: Callable[[str], object]) -> Iterator[None]:
    """Call `show(words)` whenever something else is begun, on the thread that does it. Of what is
    done many times (the calls of a grid) each is told."""
    token = _LISTENER.set(_Listener(show))
    try:
        yield
    finally:
        _LISTENER.reset(token)


def say(words: str) -> None:
    """This is done from now on."""
    listener = _LISTENER.get()
    if listener is not None:
        listener.words = words
        listener.show(words)


@contextmanager
def doing(words: str) -> Iterator[None]:
    """This is done inside, as a part of what was said before, which goes on after it."""
    listener = _LISTENER.get()
    before = "" if listener is None else listener.words
    say(f"{before}; {words}" if before else words)
    yield
    if before:
        say(before)
    elif listener is not None:
        listener.words = ""
