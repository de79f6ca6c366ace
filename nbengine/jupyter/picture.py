"""An SVG drawing as an image in a notebook's HTML, and the one ink that such a drawing may use.

Called by every view that draws. Never inline SVG: JupyterLab strips it from a notebook that was not
run on this machine, down to a heap of its words. An image stays; but inside it no colour of the page
is known, so that whatever has to be read there is in `GREY`, or stands in HTML around the image.
"""

from __future__ import annotations

from base64 import b64encode
from html import escape

GREY = "#797979"
"""Contrast 4.35 to JupyterLab's white page and to its dark one (#111111): no grey has more to both."""


def image(svg: str, alt: str, style: str = "max-width:100%;height:auto") -> str:
    """An `<img>` of a whole `<svg>` element. `alt` says what the drawing says."""
    data = b64encode(svg.encode()).decode()
    return f"<img alt='{escape(alt)}' style='{style}' src='data:image/svg+xml;base64,{data}'>"
