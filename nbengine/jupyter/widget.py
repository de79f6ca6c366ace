"""The dashboard's widget: the module that draws it, and the connection that messages go through.

It holds no state: `publisher` sends, `dashboard` hears. Importing this module needs anywidget.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from nbengine.jupyter.block_map import PALETTE

_HERE = Path(__file__).parent
_PARTS = ("dom", "store", "block_map", "timeline", "charts", "queues", "dashboard")


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
