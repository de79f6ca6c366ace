"""One line below a cell that says what is being done, while it takes seconds.

`progress_line` shows what `nbengine.progress` tells, with the seconds that have passed, a few times a
second at most, and takes the line away at the end: a saved notebook holds nothing of it. A thread of
its own shows it, so that the last thing told is seen however soon it came after the one before, and the
seconds go on while a compiler runs. In a terminal the line is overwritten in place; where the output is
neither a notebook nor a terminal nothing is shown.
"""

from __future__ import annotations

import contextvars
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from html import escape
from typing import Any, Protocol

from nbengine.progress import progress_to

UPDATE_SECONDS = 0.25
"""Between two looks at what was told last. What takes less is over before a line is shown."""


@contextmanager
def progress_line(shell: Any) -> Iterator[None]:
    """What is told inside is shown as one line."""
    out, err = _Watched(sys.stdout), _Watched(sys.stderr)
    screen: _Screen = _TerminalLine()
    if hasattr(shell, "kernel"):
        screen = _NotebookLine(shell, (out, err))
    with (
        _Shown(screen) as shown,
        redirect_stdout(out),
        redirect_stderr(err),
        progress_to(shown.tell),
    ):
        yield


class _Screen(Protocol):
    def show(self, text: str) -> None:
        """In place of what is shown."""
        ...

    def clear(self) -> None: ...


class _Shown:
    """The thread that keeps the screen up to date."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self._words = ""
        self._begun = time.monotonic()
        self._ended = threading.Event()
        # In the cell's context: by it the kernel knows which cell an output belongs to.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(
            target=run, args=(self._run,), name="nbengine progress", daemon=True
        )

    def tell(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> _Shown:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        try:
            self._thread.join()
        finally:
            self._screen.clear()

    def _run(self) -> None:
        shown = ""
        while not self._ended.wait(UPDATE_SECONDS):
            seconds = int(time.monotonic() - self._begun)
            text = f"{self._words} {f'({seconds} s)' if seconds else '...'}"
            if self._words and text != shown:
                self._screen.show(text)
                shown = text


class _NotebookLine:
    """A display that is updated. A notebook's protocol can take it away only with all else that the
    cell has shown: where there is such, an output without any data stays in its place."""

    def __init__(self, shell: Any, streams: tuple[_Watched, ...]) -> None:
        self._streams = streams
        self._is_alone = _is_one_magic(shell.get_parent().get("content", {}).get("code", ""))
        self._handle: Any = None

    def show(self, text: str) -> None:
        from IPython.display import display

        style = "opacity:.7;font-variant-numeric:tabular-nums"
        bundle = {"text/plain": text, "text/html": f"<div style='{style}'>{escape(text)}</div>"}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def clear(self) -> None:
        from IPython.display import clear_output

        if self._handle is None:
            return
        if self._is_alone and not any(stream.has_written for stream in self._streams):
            clear_output()
        else:
            self._handle.update({}, raw=True)


class _TerminalLine:
    def __init__(self) -> None:
        self._stream = sys.stdout
        self._has_shown = False

    def show(self, text: str) -> None:
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=self._stream, flush=True)
            self._has_shown = True

    def clear(self) -> None:
        if self._has_shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)


class _Watched:
    """A stream that remembers whether anything was written: a kernel may print."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.has_written = False

    def write(self, text: str) -> Any:
        self.has_written = self.has_written or bool(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_one_magic(cell: str) -> bool:
    """Whether the cell shows nothing else: it is a cell magic, or one line."""
    lines = [line for line in cell.splitlines() if line.strip()]
    return bool(lines) and (lines[0].startswith("%%nb_") or len(lines) == 1)
