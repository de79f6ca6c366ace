"""The widgets: the modules that draw them, and the connections that messages and traits go through.

They hold no logic: of the dashboard `publisher` sends and `dashboard` hears the messages;
`kernel_view` makes the kernel view. Importing this module needs anywidget.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from nbengine.jupyter.block_map import PALETTE

_HERE = Path(__file__).parent
_PARTS = (
    *("dom", "store", "block_map", "redraw", "step_axis", "entries", "lanes"),
    *("timeline", "charts", "queues", "dashboard"),
)


def module(*names: str) -> str:
    """These files of JavaScript, in one module."""
    return "\n".join((_HERE / f"{name}.js").read_text("utf-8") for name in names)


class DashboardWidget(anywidget.AnyWidget):
    """See `frame.Feed` for what the messages hold."""

    _esm = module(*_PARTS)
    _css = "\n".join(
        (_HERE / name).read_text("utf-8") for name in ("dashboard.css", "timeline.css")
    )

    palette = traitlets.List(traitlets.Unicode(), list(PALETTE)).tag(sync=True)


class KernelViewWidget(anywidget.AnyWidget):
    """See `watch.KernelTrace` for what the traits hold."""

    _esm = (_HERE / "kernel_view.js").read_text("utf-8")
    _css = (_HERE / "kernel_view.css").read_text("utf-8")

    facts = traitlets.Unicode("").tag(sync=True)
    """`KernelTrace.facts()`."""
    accesses = traitlets.Bytes(b"").tag(sync=True)
    """`KernelTrace.packed()`."""
    phase = traitlets.Int(0).tag(sync=True)
    """The one that is shown, from 0 on; the page sets it too."""
    palette = traitlets.List(traitlets.Unicode(), list(PALETTE)).tag(sync=True)
