"""The one thread that owns an engine's model and scheduler.

Cells, widget callbacks and servers put commands into its queue and get futures; it runs them
between steps, so nothing is locked inside a step, and no caller waits for more than one. It never
prints. It keeps no reference to the engine while it waits: an engine that nobody holds any more is
collected, its memory given back, and the thread ends.
"""

from __future__ import annotations

import contextvars
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar

from nbengine.errors import EngineClosed

T = TypeVar("T")

Commands = queue.SimpleQueue[Callable[[], None] | None]


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
        self._commands: Commands = queue.SimpleQueue()
        self._has_ended = threading.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(
            target=_loop,
            args=(weakref.ref(owner), self._commands, self._has_ended),
            name=name,
            daemon=True,
        )
        self._thread.start()
        # Also when the owner is dropped without being stopped, and when the interpreter exits: a
        # daemon thread that is still inside torch would then bring the process down with it.
        self._end = weakref.finalize(owner, _end, self._commands, self._thread)

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_elsewhere(self) -> bool:
        """Whether this is a fork of the process that the thread runs in."""
        return os.getpid() != self._process

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Have `command` run between two steps; at once, if the thread has ended.

        Raises:
            EngineClosed: in a fork of the thread's process.
        """
        if self.is_elsewhere:
            raise EngineClosed(
                f"this engine runs in process {self._process}, and this is its fork "
                f"{os.getpid()}: threads are not forked, so make a new engine here (or start the "
                "process with the `spawn` method)"
            )
        future: Future[T] = Future()
        self._commands.put(partial(_run, future, command))
        if self._has_ended.is_set():  # perhaps too late for the thread to see it
            _run_all(self._commands)
        return future

    def call(self, command: Callable[[], T], *, must_run: bool = False) -> T:
        """`submit`, and wait for the result; from the thread itself, run it at once. Interrupting
        the wait takes back a command that has not begun, unless it `must_run`."""
        if self.is_current:
            return command()
        # In the caller's context: what it does may tell it how far it is (see `progress`).
        future = self.submit(partial(contextvars.copy_context().run, command))
        try:
            return future.result()
        finally:
            if not must_run:
                future.cancel()
            del future, command  # an error's traceback holds this frame

    def stop(self, last: Callable[[], None]) -> None:
        """Run `last` after the commands that are queued now, and end the thread. Interrupting the
        wait stops neither."""
        if self.is_current:
            last()
            self._end()
            return
        future = self.submit(last)
        self._end()
        future.result()


def _end(commands: Commands, thread: threading.Thread) -> None:
    """Have the loop end after what is queued, and wait for it."""
    commands.put(None)
    if threading.current_thread() is not thread:
        thread.join()


def _run(future: Future[T], command: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = command()
    except BaseException as error:  # it belongs to the caller, who gets all of it
        future.set_exception(error)
        # The error holds this frame: if that held the future, which holds the error, the ring would
        # keep a dropped engine's memory until the next garbage collection.
        del future, command
    else:
        future.set_result(result)


_on_this_thread = threading.local()


def is_awaited() -> bool | None:
    """On an engine's thread: whether somebody waits for what it does now, as for a step that was asked
    for, but not for one in the background. None on any other thread."""
    return getattr(_on_this_thread, "is_awaited", None)


def _loop(owner_ref: weakref.ref[Any], commands: Commands, has_ended: threading.Event) -> None:
    wants_step = False
    while True:
        command: Callable[[], None] | None
        try:
            command = commands.get(block=not wants_step)
            if command is None:
                break
            _on_this_thread.is_awaited = True
            command()
        except queue.Empty:
            pass
        command = None
        _on_this_thread.is_awaited = False
        owner: Steppable | None = owner_ref()
        if owner is None:
            break
        wants_step = owner._wants_step()
        if wants_step and commands.empty():
            owner._background_step()
            wants_step = owner._wants_step()
        owner = None
    has_ended.set()
    _run_all(commands)


def _run_all(commands: Commands) -> None:
    """What was queued behind the end gets its answer."""
    while True:
        try:
            command = commands.get_nowait()
        except queue.Empty:
            return
        if command is not None:
            command()
