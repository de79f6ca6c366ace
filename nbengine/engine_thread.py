"""The one thread that owns an engine's model and scheduler.

Cells, widget callbacks and servers put commands into its queue and get futures; it runs them
between steps, so nothing is locked inside a step, and no caller waits for more than one. It never
prints. It keeps no reference to the engine while it waits: an engine that nobody holds any more is
collected, its memory given back, and the thread ends.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Steppable(Protocol):
    """What the thread needs of its owner."""

    def _wants_step(self) -> bool:
        """Whether to take steps without being asked to."""
        ...

    def _background_step(self) -> None:
        """Take one; must not raise."""
        ...


class EngineThread:
    """Runs its owner's commands, and its steps while it wants them."""

    def __init__(self, owner: Steppable, name: str) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_loop, args=(weakref.ref(owner), self._commands), name=name, daemon=True
        )
        self._thread.start()
        # An owner that is dropped without being stopped wakes the thread, which then ends.
        self._on_drop = weakref.finalize(owner, self._commands.put, None)

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Have `command` run between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = command()
            except BaseException as error:  # it belongs to the caller, who gets all of it
                future.set_exception(error)
            else:
                future.set_result(result)

        self._commands.put(run)
        return future

    def call(self, command: Callable[[], T]) -> T:
        """`submit`, and wait for the result; from the thread itself, run it at once. Interrupting
        the wait cancels a command that has not begun."""
        if self.is_current:
            return command()
        future = self.submit(command)
        try:
            return future.result()
        finally:
            future.cancel()

    def stop(self) -> None:
        """End the thread after the commands that are queued now."""
        self._on_drop()  # puts the None that ends the loop, once
        if not self.is_current:
            self._thread.join()


def _loop(
    owner_ref: weakref.ref[Any], commands: queue.SimpleQueue[Callable[[], None] | None]
) -> None:
    wants_step = False
    while True:
        command: Callable[[], None] | None
        try:
            command = commands.get(block=not wants_step)
            if command is None:
                break
            command()
        except queue.Empty:
            pass
        command = None
        owner: Steppable | None = owner_ref()
        if owner is None:
            break
        wants_step = owner._wants_step()
        if wants_step and commands.empty():
            owner._background_step()
            wants_step = owner._wants_step()
        owner = None
    while True:  # what was queued behind the end gets an answer
        try:
            command = commands.get_nowait()
        except queue.Empty:
            return
        if command is not None:
            command()
