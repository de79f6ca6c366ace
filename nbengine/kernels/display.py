"""Tables of results, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

SHORT = 14
"""Characters of a cell that is not broken into lines: a figure with its unit."""


def table_text(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of plain text; a column of figures stands to the right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    right = [_is_figures([line[i] for line in lines[1:]]) for i in range(len(headers))]
    return "\n".join(
        "  ".join(
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def table_html(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same cells (plain text) as an HTML table."""
    rows = [list(row) for row in rows]
    right = [_is_figures([row[i] for row in rows]) for i in range(len(headers))]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(map(cell, [tag] * len(cells), cells, right)) + "</tr>"

    def cell(tag: str, value: str, to_right: bool) -> str:
        align = "right" if to_right else "left"
        style = f"text-align:{align};padding:.15em .6em;vertical-align:top"
        if len(value) <= SHORT:
            style += ";white-space:nowrap"
        return f"<{tag} style='{style}'>{escape(value)}</{tag}>"

    return (
        "<table style='border-collapse:collapse;margin:.3em 0'>"
        f"<thead>{line('th', headers)}</thead>"
        f"<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
    )


def _is_figures(values: Sequence[str]) -> bool:
    return any(values) and all(not value or value[0].isdigit() for value in values)
