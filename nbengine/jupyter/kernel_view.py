"""`KernelView`: a `KernelTrace` drawn in a notebook, stepped phase by phase.

The page (`kernel_view.js`) draws, and knows the whole trace: stepping asks nothing of the kernel.
Without ipywidgets and anywidget, or when the kernel has ended, the picture of one phase stands still
beside the words.
"""

from __future__ import annotations

from html import escape
from typing import Any

from nbengine.errors import InvalidField
from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.live_output import LiveOutput
from nbengine.jupyter.picture import GREY, image
from nbengine.kernels.watch import Access, KernelTrace, WatchedTensor

_SEVERAL = -1
"""In place of a warp: an element that more than one touches."""
_CELL, _TITLE, _WIDTH = 3, 16, 900
"""Pixels: of an element, above a tensor, and of a row of KV blocks."""
_MAX_DRAWN = 1 << 15
"""Elements of a tensor that a still picture draws."""


class KernelView:
    """What `%nb_watch` returns: display it, or print it. `phase` is the one that is shown, and may
    be set."""

    def __init__(self, trace: KernelTrace, phase: int | None = None) -> None:
        self.trace = trace
        self._phase = _busiest(trace) if phase is None else phase
        self._check(self._phase)
        self._widget = _make_widget(trace, self._phase)
        self._output = LiveOutput(self.close)
        self._is_closed = False

    @property
    def phase(self) -> int:
        """From 0 on; as the page has it."""
        return self._phase if self._widget is None else int(self._widget.phase)

    @phase.setter
    def phase(self, phase: int) -> None:
        self._check(phase)
        self._phase = phase
        if self._widget is not None:
            self._widget.phase = phase

    def _check(self, phase: int) -> None:
        last = len(self.trace.phases) - 1
        if not isinstance(phase, int) or not 0 <= phase <= last:
            raise InvalidField("phase", phase, f"this block has the phases 0 to {last}")

    def __repr__(self) -> str:
        return str(self.trace)

    def close(self) -> None:
        """Leave the phase that is shown as a picture, in place of the live view. The kernel's end
        does it too; closing twice does nothing."""
        self._is_closed = True
        self._output.leave({"text/plain": repr(self), "text/html": self._still()})

    def _ipython_display_(self) -> None:
        is_live = self._widget is not None and not self._is_closed
        self._output.show(self._repr_mimebundle_(), is_live=is_live)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and beside it the picture for readers without a kernel."""
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self._still()}
        if self._widget is not None and not self._is_closed:
            bundle["application/vnd.jupyter.widget-view+json"] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self._widget.model_id,
            }
        return bundle

    def _still(self) -> str:
        """One phase as a picture, and all of them in words."""
        shown = f"phase {self.phase + 1} of {len(self.trace.phases)}"
        return (
            f"<div><b>{escape(self.trace.title)}</b>, {shown}</div>"
            f"{image(phase_svg(self.trace, self.phase), f'{shown}: in words below')}"
            f"<details><summary>every phase in words</summary><pre>{escape(str(self.trace))}</pre>"
            "</details>"
        )


def _busiest(trace: KernelTrace) -> int:
    """The phase that touches the KV cache most, or memory at all."""

    def weight(phase: int) -> tuple[int, int]:
        accesses = trace.phases[phase].accesses
        of_cache = sum(a.count for a in accesses if trace.tensors[a.tensor].is_cache)
        return of_cache, sum(a.count for a in accesses)

    return max(range(len(trace.phases)), key=weight)


def _make_widget(trace: KernelTrace, phase: int) -> Any:
    """A widget, or None without the notebook extras."""
    try:
        from nbengine.jupyter.widget import KernelViewWidget
    except ImportError:
        return None
    return KernelViewWidget(facts=trace.facts(), accesses=trace.packed(), phase=phase)


# ---------------------------------------------------------------------- the still picture


def phase_svg(trace: KernelTrace, phase: int) -> str:
    """The tensors of one phase, each a grid of its elements in the colours of the warps that touch
    them; of the KV cache, the blocks that are touched, side by side."""
    parts: list[str] = []
    y, width = 0, 320
    for number, tensor in enumerate(trace.tensors):
        mine = [a for a in trace.phases[phase].accesses if a.tensor == number]
        x = height = 0
        for title, warps, columns in _panels(trace, number, tensor, mine) if mine else ():
            wide = max(columns * _CELL, 6 * len(title)) + 14
            if x and x + wide > _WIDTH:
                x, y = 0, y + height
            rows = -(-len(warps) // columns)
            parts.append(
                f'<g transform="translate({x} {y})"><text y="11">{escape(title)}</text>'
                f"{''.join(_runs(warps, columns))}"
                f'<rect y="{_TITLE}" width="{columns * _CELL}" height="{rows * _CELL}" '
                f'fill="none" stroke="{GREY}" stroke-opacity=".5"/></g>'
            )
            x, height = x + wide, rows * _CELL + _TITLE + 8
            width = max(width, x)
        y += height
    label = f"phase {phase + 1} of {len(trace.phases)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
        f'viewBox="-1 0 {width + 2} {y}" width="{width + 2}" height="{y}" '
        f'style="max-width:100%;height:auto;font:12px sans-serif" fill="{GREY}">{"".join(parts)}</svg>'
    )


def _panels(
    trace: KernelTrace, number: int, tensor: WatchedTensor, accesses: list[Access]
) -> list[tuple[str, list[int | None], int]]:
    """Title, the warp of each element, and how many columns; one panel a KV block."""
    warps = _warps(tensor, accesses)
    if not tensor.is_cache:
        shown = warps[:_MAX_DRAWN]
        more = "" if len(shown) == len(warps) else f", the first {_MAX_DRAWN:,} elements"
        columns = tensor.shape[-1] if 16 <= tensor.shape[-1] <= 256 else min(128, len(shown))
        return [(f"{tensor.name} {list(tensor.shape)}{more}", shown, columns)]
    per_block = tensor.num_elements // tensor.shape[0]
    blocks = dict.fromkeys(access.first // per_block for access in accesses)
    panels = []
    for block in list(blocks)[: max(1, _MAX_DRAWN // per_block)]:
        place = trace.cache_place(number, block * per_block)
        held = ", ".join(f"from token {at} of sequence {seq}" for seq, at in place.sequences)
        title = f"{tensor.name}, block {trace.name_of_block(block)}: {held or 'of no sequence'}"
        panels.append((title, warps[block * per_block : (block + 1) * per_block], tensor.shape[-1]))
    return panels


def _warps(tensor: WatchedTensor, accesses: list[Access]) -> list[int | None]:
    warps: list[int | None] = [None] * tensor.num_elements
    for access in accesses:
        for element in range(access.first, access.first + access.count):
            before = warps[element]
            warps[element] = access.warp if before in (None, access.warp) else _SEVERAL
    return warps


def _runs(warps: list[int | None], columns: int) -> list[str]:
    """A path a colour, of the runs of elements that one warp touches."""
    paths: dict[str, list[str]] = {}
    start = 0
    while start < len(warps):
        row_end = min(len(warps), (start // columns + 1) * columns)
        end = start + 1
        while end < row_end and warps[end] == warps[start]:
            end += 1
        warp = warps[start]
        if warp is not None:
            colour = GREY if warp == _SEVERAL else PALETTE[warp % len(PALETTE)]
            x, y, run = start % columns * _CELL, _TITLE + start // columns * _CELL, end - start
            paths.setdefault(colour, []).append(f"M{x} {y}h{run * _CELL}v{_CELL}h-{run * _CELL}z")
        start = end
    return [f'<path d="{"".join(d)}" fill="{colour}"/>' for colour, d in sorted(paths.items())]
