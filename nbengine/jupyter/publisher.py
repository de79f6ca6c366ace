"""The one thread that writes to a dashboard's widget.

It sends what has changed since the last frame, never a backlog: at most 30 frames a second (about 11
while the engine runs), and the next one only when a page has acknowledged the last. Jupyter drops
messages silently beyond 1,000 a second, and a server keeps those for an absent page in memory; with
one frame in flight neither happens. Without an acknowledgement (no page, a hidden one, a lost
message) it sends a whole frame after a second, then ever more rarely, until a page answers or says
that it is new.

While the engine runs, it takes at most a thirtieth of its time: a frame that costs more comes more
rarely. It holds the engine weakly, and ends when the engine is closed or collected.
"""

from __future__ import annotations

import contextvars
import threading
import time
import weakref
from collections.abc import Callable

from nbengine.engine import Engine
from nbengine.engine_thread import is_awaited
from nbengine.errors import EngineClosed, UnknownStep

IDLE_POLL_SECONDS = 0.25
"""How often an engine without work is looked at (a glance at a few numbers, no message)."""
SHORTEST_PAUSE = 1 / 30
SHORTEST_PAUSE_RUNNING = 0.09
LONGEST_PAUSE = 1 / 2
FIRST_RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 60.0
MOST_OF_THE_TIME = 1 / 30
"""What a frame costs, of the time between two of them, while the engine runs."""


class Publisher:
    """Calls `show(engine, seq, is_whole)` on its own thread when there is something new to show (it
    returns the seconds for which it held the engine's), and `ended()` once, as its last act."""

    def __init__(
        self,
        engine: Engine,
        show: Callable[[Engine, int, bool], float],
        ended: Callable[[], None],
    ) -> None:
        self._engine = weakref.ref(engine)
        self._show, self._ended = show, ended
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._is_stale = True  # something to show that the engine's numbers don't tell
        self._sent = 0
        self._acknowledged = 0
        self._sent_at = -1e9
        self._cost = 0.0
        """Seconds that the last frame of differences took."""
        self._retry = FIRST_RETRY_SECONDS
        self._seen: object = None
        self._poll = IDLE_POLL_SECONDS
        self._context: contextvars.Context | None = None
        self._must_be_whole = True
        weakref.finalize(engine, self._wake.set)
        self._thread = threading.Thread(target=self._run, name="nbengine-dashboard", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wake(self, *, stale: bool = False) -> None:
        """Look at the engine now; `stale` to send a frame in any case."""
        if stale:
            self._is_stale = True
        self._wake.set()

    def heard(self, acknowledged: int | None) -> None:
        """A page is there: it has drawn that frame, or it is new (None) and has drawn none.

        Called by whoever handles the page's message. The next frames are sent in the caller's
        context, as answers to that message: ipykernel 7.4 hands a page's messages to the shell of
        the last message that the widget's frames answered, and one that answers the cell that made
        the widget would keep every click waiting while a later cell runs.
        """
        self._context = contextvars.copy_context()
        self._retry = FIRST_RETRY_SECONDS
        if acknowledged is None:
            self._acknowledged, self._is_stale = self._sent, True
            self._must_be_whole = True
        else:
            self._acknowledged = max(self._acknowledged, acknowledged)
        self._wake.set()

    def stop(self) -> None:
        """End the thread; waits for the frame that is being sent, but not on an engine's thread,
        for which that frame may be waiting."""
        self._stopping.set()
        self._wake.set()
        is_elsewhere = threading.current_thread() is not self._thread and is_awaited() is None
        if is_elsewhere and self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._wake.wait(self._poll)
                self._wake.clear()
                if not self._stopping.is_set() and not self._publish_if_due():
                    break
        finally:
            self._ended()

    def _publish_if_due(self) -> bool:
        """False when there will be nothing to show any more."""
        engine = self._engine()
        if engine is None or engine.is_closed:
            return False
        elapsed = time.monotonic() - self._sent_at
        unanswered = self._acknowledged < self._sent
        if unanswered and elapsed < self._retry:
            return True
        if _glance(engine) == self._seen and not self._is_stale:
            self._poll = SHORTEST_PAUSE if engine.has_work else IDLE_POLL_SECONDS
            return True
        pause = SHORTEST_PAUSE
        if engine.is_running and not self._must_be_whole:
            wanted = max(SHORTEST_PAUSE_RUNNING, self._cost / MOST_OF_THE_TIME)
            # The engine answers between two steps: at the end that is nearest to when it is due.
            pause = min(wanted, LONGEST_PAUSE) - _seconds_of_a_step(engine) / 2
        if self._stopping.wait(max(0.0, pause - elapsed)):
            return True
        if unanswered:
            self._retry = min(2 * self._retry, LAST_RETRY_SECONDS)
            self._context = None
            self._must_be_whole = True
        self._is_stale = False
        self._seen = _glance(engine)  # before the frame: what comes later is seen next time
        is_whole, self._must_be_whole = self._must_be_whole, False
        began = time.thread_time()
        self._sent += 1
        try:
            if self._context is None:
                held = self._show(engine, self._sent, is_whole)
            else:
                held = self._context.run(self._show, engine, self._sent, is_whole)
        except EngineClosed:
            return False
        if not is_whole:  # which is rare, and tells nothing of the next ones
            self._cost = held + time.thread_time() - began
        self._sent_at = time.monotonic()
        return True


def _seconds_of_a_step(engine: Engine) -> float:
    """Of the last one."""
    try:
        return engine.history[-1].phases.total
    except UnknownStep:
        return 0.0


def _glance(engine: Engine) -> object:
    """A few numbers that differ when there may be something new. Read without asking the engine's
    thread, so that looking costs a running step nothing."""
    scheduler = engine.scheduler
    return (
        scheduler.step_count,
        len(scheduler.waiting),
        len(scheduler.running),
        scheduler.pool.num_cached,
        engine.is_running,
        engine.history.num_cuts,
        id(engine.error),
        id(engine.stopped_at),
        id(scheduler.policy),
        engine.ops_version,
        scheduler.config.max_num_batched_tokens,
    )
