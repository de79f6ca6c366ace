"""The dashboard's widget: the traits that a page draws, and the module that draws them.

It holds no logic: `publisher` sets the traits, `dashboard` hears the messages. Importing this
module needs anywidget.
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
