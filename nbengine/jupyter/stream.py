"""Showing a text while it is generated: in a notebook's cell, or in a terminal.

A notebook's display is updated a few times a second with the whole text so far; a terminal gets
what is new. Both end with one line on tokens and speed.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

from nbengine.jupyter.views import output_html, output_text
from nbengine.outputs import RequestOutput

UPDATES_PER_SECOND = 10


def show_stream(
    outputs: Generator[RequestOutput, None, None], *, in_notebook: bool, show_prompt: bool = True
) -> RequestOutput:
    """Show outputs as they come; returns the last one.

    When it is interrupted, the outputs' iterator is closed, which aborts that request and no other,
    what came so far stays on the screen, and the KeyboardInterrupt goes on.
    """
    screen = _NotebookScreen(show_prompt) if in_notebook else _TerminalScreen()
    last: RequestOutput | None = None
    try:
        for last in outputs:
            screen.show(last)
        assert last is not None, "a request ends with an output"
        return last
    finally:
        outputs.close()  # now, and not when the traceback that holds it is dropped
        if last is not None:
            screen.finish(last)


class _NotebookScreen:
    """One display, replaced as a whole."""

    def __init__(self, show_prompt: bool) -> None:
        self.show_prompt = show_prompt
        self.handle: Any = None
        self.shown_at = 0.0

    def show(self, output: RequestOutput) -> None:
        if time.monotonic() - self.shown_at >= 1 / UPDATES_PER_SECOND:
            self.finish(output)
            self.shown_at = time.monotonic()

    def finish(self, output: RequestOutput) -> None:
        from IPython.display import display

        bundle = {
            "text/plain": output_text(output),
            "text/html": output_html(output, show_prompt=self.show_prompt),
        }
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


class _TerminalScreen:
    """The first sample's new text, printed as it comes; all samples at the end if there are
    more."""

    def __init__(self) -> None:
        self.num_shown = 0

    def show(self, output: RequestOutput) -> None:
        if output.outputs:
            text = output.outputs[0].text
            print(text[self.num_shown :], end="", flush=True)
            self.num_shown = max(self.num_shown, len(text))

    def finish(self, output: RequestOutput) -> None:
        self.show(output)
        lines = output_text(output).splitlines()
        print()
        print("\n".join(lines if len(output.outputs) > 1 else lines[:1]))
