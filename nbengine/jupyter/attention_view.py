"""How a probed token spreads its attention over the KV blocks of its table, as text and as a picture.

Pure functions of a `Probe`. There is a row for each layer (or each head of one), and a column for each
block in the order of the block table; the share of the attention is the colour of a cell, and is
written in it.
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

_COLOUR = ",".join(str(int(PALETTE[0][i : i + 2], 16)) for i in (1, 3, 5))
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
        """A table, whose figures are in the page's own ink: no cell's colour is so deep that dark
        or light letters could not be read on it."""
        cell = "padding:0 .3em;font-size:11px;line-height:1.3;text-align:center"
        columns = self._column_names()
        head = "".join(f"<th style='{cell}'>{name}</th>" for name in ("block", *columns))
        rows = []
        for row, shares in enumerate(self.shares.tolist()[:_MOST_ROWS]):
            name = self._row_name(row)
            cells = (
                f"<td title='{name}, block {column}: {share:.1%}' "
                f"style='{cell};background-color:rgba({_COLOUR},{0.04 + 0.7 * share:.2f})'>"
                f"{f'{share:.0%}' if share >= 0.005 else ''}</td>"
                for column, share in zip(columns, shares, strict=True)
            )
            rows.append(f"<tr><th style='{cell}'>{name}</th>{''.join(cells)}</tr>")
        return (
            f"<div>{escape(self._title())}</div><div style='overflow-x:auto'>"
            f"<table style='border-collapse:collapse;margin:.3em 0'><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>"
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
