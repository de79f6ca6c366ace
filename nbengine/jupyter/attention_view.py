"""How a probed token spreads its attention over the KV blocks of its table, as text and as a picture.

Pure functions of a `Probe`. The picture has a row for each layer (or each head of one) and a column
for each block; the share of the attention is the ink of a cell, and is written in it where there is
room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.views import table_html, table_text

if TYPE_CHECKING:
    from torch import Tensor

    from nbengine.execution.probe import Probe

_CELL_WIDTH, _CELL_HEIGHT, _LEFT, _TOP = 34, 15, 58, 34
_SHADES = " ░▒▓█"
_MOST_ROWS = 64


@dataclass(frozen=True, eq=False, repr=False)
class AttentionView:
    """`AttentionView(probe)` shows every layer, `AttentionView(probe, layer=3)` the heads of one."""

    probe: Probe
    layer: int | None = None

    @property
    def shares(self) -> Tensor:
        """float32 `[rows, num_blocks]`; each row adds up to 1."""
        return self.probe.attention_by_block(self.layer)

    def _row_name(self, row: int) -> str:
        return f"layer {row}" if self.layer is None else f"head {row}"

    def _column_names(self) -> list[str]:
        """Physical block ids where the sequence holds blocks, else places in its table."""
        table = self.probe.block_table
        return [str(table[i]) if i < len(table) else f"({i})" for i in range(self.shares.shape[1])]

    def _title(self) -> str:
        probe = self.probe
        where = "each layer (mean over heads)" if self.layer is None else f"layer {self.layer}"
        return (
            f"{probe.seq_id}, step {probe.step}: attention of position {probe.position} over its "
            f"{self.shares.shape[1]} blocks, {where}"
        )

    def __repr__(self) -> str:
        shares, last = self.shares, len(_SHADES) - 1
        columns = self._column_names()
        width = max(4, max(map(len, columns)))
        lines = [self._title(), " " * 9 + " ".join(f"{name:>{width}}" for name in columns)]
        for row, values in enumerate(shares.tolist()[:_MOST_ROWS]):
            cells = (_SHADES[min(last, round(value * last + 0.49))] * width for value in values)
            lines.append(f"{self._row_name(row):<9}" + " ".join(cells))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        shares = self.shares.tolist()[:_MOST_ROWS]
        columns = self._column_names()
        width = _LEFT + _CELL_WIDTH * len(columns) + 4
        height = _TOP + _CELL_HEIGHT * len(shares) + 4
        parts = [
            f'<text x="{_LEFT}" y="12" opacity=".65">block of the KV cache, in the order of the table'
            "</text>"
        ]
        for i, name in enumerate(columns):
            x = _LEFT + _CELL_WIDTH * i + _CELL_WIDTH / 2
            parts.append(f'<text x="{x}" y="28" text-anchor="middle">{escape(name)}</text>')
        for row, values in enumerate(shares):
            y = _TOP + _CELL_HEIGHT * row
            name = self._row_name(row)
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 11}" text-anchor="end">{name}</text>')
            for i, value in enumerate(values):
                x = _LEFT + _CELL_WIDTH * i
                ink = f'fill="{PALETTE[0]}" fill-opacity="{max(0.04, value):.3f}"'
                said = f"{name}, block {columns[i]}: {value:.1%} of the attention"
                parts.append(
                    f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL_WIDTH - 2}" '
                    f'height="{_CELL_HEIGHT - 2}" {ink}><title>{escape(said)}</title></rect>'
                )
                if value >= 0.095:
                    colour = "#fff" if value > 0.55 else "currentColor"
                    parts.append(
                        f'<text x="{x + _CELL_WIDTH / 2}" y="{y + 11}" text-anchor="middle" '
                        f'fill="{colour}" pointer-events="none">{value:.0%}</text>'
                    )
        return (
            f"<div>{escape(self._title())}</div><div style='overflow-x:auto'>"
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(self._title())}" fill="currentColor" font-size="10" '
            f'font-family="system-ui, sans-serif">{"".join(parts)}</svg></div>'
        )


def probe_text(probe: Probe) -> str:
    """What comes next, and where the attention goes."""
    return f"{_head(probe)}\n{table_text(_HEADERS, _rows(probe))}\n{AttentionView(probe)!r}"


def probe_html(probe: Probe) -> str:
    """What comes next, and where the attention goes."""
    rows = [tuple(map(escape, row)) for row in _rows(probe)]
    return (
        f"<div>{escape(_head(probe))}</div>{table_html(_HEADERS, rows)}"
        f"{AttentionView(probe)._repr_html_()}"
    )


_HEADERS = ("next", "token", "logit", "probability")


def _head(probe: Probe) -> str:
    token = probe.token_ids[-1]
    return (
        f"{probe.seq_id} after step {probe.step}: position {probe.position}, token {token} "
        f"({probe.decode(token)!r})"
    )


def _rows(probe: Probe) -> list[tuple[str, ...]]:
    return [
        (repr(c.text), str(c.token_id), f"{c.logit:.3f}", f"{math.exp(c.logprob):.2%}")
        for c in probe.top(5)
    ]
