"""The widgets: the traits that a page draws, and the modules that draw them.

They hold no logic: of the dashboard `publisher` sets the traits and `dashboard` hears the messages;
`kernel_view` makes the kernel view. Importing this module needs anywidget.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from nbengine.jupyter.block_map import PALETTE

_HERE = Path(__file__).parent


class DashboardWidget(anywidget.AnyWidget):
    """See `frame.Frame` for what the traits hold."""

    _esm = "\n".join((_HERE / name).read_text("utf-8") for name in ("block_map.js", "dashboard.js"))
    _css = (_HERE / "dashboard.css").read_text("utf-8")

    state = traitlets.Unicode("").tag(sync=True)
    """`Frame.state`, as JSON text: one string passes the kernel's message cleaning untouched, where
    nested lists are walked item by item."""
    tables = traitlets.Bytes(b"").tag(sync=True)
    cached = traitlets.Bytes(b"").tag(sync=True)
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
