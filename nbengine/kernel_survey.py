"""`survey`: what every op of an engine costs at the batch that it holds now, or in a step that it took,
and under which roof it lies; and `RooflinePlot`, which draws that.

The least bytes and operations of each op are its own model's, of a live call. On the GPU that the
engine runs on, each op is timed too, and the roofs are that GPU's, measured. Elsewhere nothing is
timed: the roofs are a named GPU's, as its maker publishes them, and every view says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch

from nbengine.errors import InvalidField, NotEnoughMemory
from nbengine.kernels.arguments import cloned
from nbengine.kernels.bench import measure
from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.implementation import Implementation, implement
from nbengine.kernels.op import Arguments, Case, Cost
from nbengine.kernels.ops import OPS
from nbengine.kernels.roofline import PUBLISHED, Roofline, roofline
from nbengine.kernels.timing import Timing, collect, duration

if TYPE_CHECKING:
    from nbengine.engine_kernels import EngineKernels

DEFAULT_GPU = "H100"


@dataclass(frozen=True, slots=True)
class OpSurvey:
    """One op: what runs it, and one call of it."""

    implementation: Implementation
    cost: Cost | None
    """None where the batch does not call the op."""
    timing: Timing | None
    """None where it was not timed."""

    @property
    def name(self) -> str:
        return self.implementation.op.name

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        assert self.cost is not None
        return self.cost.flops / max(1, self.cost.bytes_moved)

    @property
    def flops_per_s(self) -> float | None:
        """As measured."""
        if self.cost is None or self.timing is None:
            return None
        return self.cost.flops / self.timing.median_s


@dataclass(frozen=True, slots=True, repr=False)
class Survey:
    """Every op of an engine at one batch."""

    rows: tuple[OpSurvey, ...]
    roofs: Roofline | None
    """None where no engine was asked."""
    note: str
    """What the figures are of, and what they are not."""
    untimed: str = "not timed"
    """What stands in place of a time."""

    def of_roofline(self, row: OpSurvey) -> float | None:
        """Which fraction of the ceiling the op reaches; None where it was not timed."""
        if self.roofs is None or row.cost is None or row.timing is None:
            return None
        return self.roofs.floor_s(row.cost) / row.timing.median_s

    def _headers(self) -> list[str]:
        return ["op", "runs", "", "bytes", "FLOP/byte", "bound", "at least", "time", "of roofline"]

    def _table(self) -> Iterator[list[str]]:
        for row in self.rows:
            swapped = "" if row.implementation.is_own else "swapped"
            cells = [row.name, str(row.implementation), swapped]
            if row.cost is None or self.roofs is None:
                why = "no engine" if self.roofs is None else "not called"
                yield [*cells, "", "", why, "", "", ""]
                continue
            fraction = self.of_roofline(row)
            yield [
                *cells,
                f"{row.cost.bytes_moved:,}",
                f"{row.intensity:.3g}",
                self.roofs.bound(row.cost),
                duration(self.roofs.floor_s(row.cost)),
                self.untimed if row.timing is None else duration(row.timing.median_s),
                self.untimed if fraction is None else f"{fraction:.1%}",
            ]

    def __str__(self) -> str:
        return f"{self.note}\n{table_text(self._headers(), self._table())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<div>{escape(self.note)}</div>{table_html(self._headers(), self._table())}"


def survey(
    ops: EngineKernels | None = None, gpu: str | None = None, step: int | None = None
) -> Survey:
    """Every op of an engine at its batch, or in a step; timed where the engine runs on a GPU, between
    two steps.

    Args:
        ops: `engine.kernels`; without, only what would run each op is said.
        gpu: a name in `PUBLISHED`, whose roofs are used where nothing can be measured.
        step: one that the engine took; what runs each op now is what is costed and timed.

    Raises:
        InvalidField: no such GPU.
        UnknownStep: the history does not reach that step.
        EngineClosed
    """
    published = _published(gpu)
    if ops is None:
        cpu = torch.device("cpu")
        rows = tuple(OpSurvey(implement(op, None, cpu), None, None) for op in OPS.values())
        return Survey(rows, None, "no engine is loaded: there is no batch to cost or to time")
    calls = {
        op: max(found, key=lambda call: _bytes(op, call), default=None)
        for op, found in ops.live_calls(*OPS, step=step).items()
    }
    of_what = "at the engine's batch" if step is None else f"in step {step}"
    if step is None and calls["paged_attention_prefill"]:
        of_what += " (prefill attention: as if it computed the last 64 tokens of some again)"
    if ops.device.type == "cuda":
        return ops.between_steps(lambda: _measured(ops, calls, published, of_what))
    rows = tuple(_costed(implementation, calls) for implementation in ops.implementations)
    note = (
        f"{of_what}, not measured: there is no GPU here, and times are at least those of "
        f"{published.device}, by published figures"
    )
    return Survey(rows, published, note, untimed="no GPU")


def _published(gpu: str | None) -> Roofline:
    if gpu is not None and gpu not in PUBLISHED:
        raise InvalidField("gpu", gpu, f"figures are known of {', '.join(PUBLISHED)}")
    return PUBLISHED[gpu or DEFAULT_GPU]


def _bytes(op: str, call: Arguments) -> int:
    return OPS[op].cost_of(call).bytes_moved


def _case(call: Arguments) -> Case:
    return Case("a call of the engine's", lambda _: cloned(call))


def _costed(
    implementation: Implementation, calls: dict[str, Arguments | None], timing: Timing | None = None
) -> OpSurvey:
    call = calls[implementation.op.name]
    cost = None if call is None else implementation.op.cost_of(call)
    return OpSurvey(implementation, cost, timing)


def _measured(
    ops: EngineKernels, calls: dict[str, Arguments | None], published: Roofline, of_what: str
) -> Survey:
    try:
        roofs = roofline(ops.device)
    except NotEnoughMemory as error:
        rows = tuple(_costed(implementation, calls) for implementation in ops.implementations)
        return Survey(
            rows, published, f"{of_what}, not measured: {error}. {published.device} as published"
        )
    left_out = []
    rows_found = []
    for implementation in ops.implementations:
        call, timing = calls[implementation.op.name], None
        if call is not None and implementation.is_capturable:
            try:
                timing = measure(implementation, None, _case(call), roofs, ops.device).timing
            except torch.OutOfMemoryError:
                left_out.append(f"{implementation.op.name} (memory)")
                collect()
        elif call is not None:
            left_out.append(f"{implementation.op.name} (a Python function)")
        rows_found.append(_costed(implementation, calls, timing))
    note = f"{of_what}, measured on {roofs.device}"
    if left_out:
        note += f"; not timed: {', '.join(left_out)}"
    return Survey(tuple(rows_found), roofs, note)


# ---------------------------------------------------------------------- the plot


_WIDTH, _HEIGHT = 840, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 290, 18, 44
_LABEL_HEIGHT = 16

_INK = "var(--jp-content-font-color1, var(--vscode-editor-foreground, currentColor))"
_ACCENT = "var(--jp-brand-color1, var(--vscode-focusBorder, #1976d2))"
_SWAPPED = "#d55e00"


@dataclass(frozen=True, slots=True, repr=False)
class RooflinePlot:
    """FLOP/byte against FLOP/s, both in powers of ten: two roofs, and a dot for each op that the
    engine's batch calls. A filled dot was measured; a ring lies on the roof, where the op could be at
    most. A square is an op that was swapped. `str()` is the survey's table."""

    survey: Survey

    def __str__(self) -> str:
        return str(self.survey)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self.svg()}{self.survey._repr_html_()}"

    def svg(self) -> str:
        """One element, drawn in the page's own ink."""
        roofs = self.survey.roofs
        rows = [row for row in self.survey.rows if row.cost is not None and row.cost.flops > 0]
        if roofs is None or not rows:
            return ""
        dots = sorted(
            ((row.intensity, row.flops_per_s or _roof(roofs, row.intensity), row) for row in rows),
            key=lambda dot: (-dot[1], dot[0]),
        )
        frame = _Frame.around(roofs, [(x, y) for x, y, _ in dots])
        kind = "measured" if any(row.timing for row in rows) else "published, not measured"
        parts = [
            *_axes(frame),
            *_roof_lines(frame, roofs, kind),
            *_dots(frame, roofs, self.survey, dots),
        ]
        label = f"Roofline of {roofs.device} ({kind}) with {len(dots)} ops"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'style="max-width:100%;height:auto;color:{_INK};font:12px system-ui,sans-serif">'
            f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
        )


@dataclass(frozen=True, slots=True)
class _Frame:
    """From operations a byte and operations a second to pixels."""

    x_from: float
    x_to: float
    y_from: float
    y_to: float
    """Powers of ten."""

    @classmethod
    def around(cls, roofs: Roofline, points: Iterable[tuple[float, float]]) -> _Frame:
        xs, ys = zip(*points, strict=True)
        ridge = roofs.matrix_flops_per_s / roofs.read_bytes_per_s
        x_from, x_to = math.log10(min(xs) / 2), math.log10(max(max(xs) * 2, ridge * 6))
        lowest = min(min(ys) / 2, roofs.read_bytes_per_s * 10**x_from)
        return cls(x_from, x_to, math.log10(lowest), math.log10(roofs.matrix_flops_per_s * 2))

    def x(self, intensity: float) -> float:
        part = (math.log10(intensity) - self.x_from) / (self.x_to - self.x_from)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def y(self, flops_per_s: float) -> float:
        part = (math.log10(flops_per_s) - self.y_from) / (self.y_to - self.y_from)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)


def _roof(roofs: Roofline, intensity: float) -> float:
    """Operations a second, at most."""
    return min(roofs.read_bytes_per_s * intensity, roofs.matrix_flops_per_s)


def _decades(start: float, end: float) -> list[int]:
    return list(range(math.ceil(start), math.floor(end) + 1))


def _axes(frame: _Frame) -> Iterator[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for power in _decades(frame.x_from, frame.x_to):
        x = frame.x(10.0**power)
        yield _line(x, _TOP, x, bottom, _INK, opacity=0.14)
        yield _text(x, bottom + 16, f"{10.0**power:g}", "middle")
    for power in _decades(frame.y_from, frame.y_to):
        y = frame.y(10.0**power)
        yield _line(_LEFT, y, right, y, _INK, opacity=0.14)
        yield _text(_LEFT - 6, y + 4, _flops(10.0**power), "end")
    yield _text((_LEFT + right) / 2, _HEIGHT - 8, "operations a byte of memory", "middle")
    yield _text(_LEFT - 54, _TOP - 4, "FLOP/s", "start")


def _roof_lines(frame: _Frame, roofs: Roofline, kind: str) -> Iterator[str]:
    ridge = roofs.matrix_flops_per_s / roofs.read_bytes_per_s
    x0, y0 = frame.x(10**frame.x_from), frame.y(roofs.read_bytes_per_s * 10**frame.x_from)
    x1, y1 = frame.x(ridge), frame.y(roofs.matrix_flops_per_s)
    yield (
        f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}H{_WIDTH - _RIGHT}" fill="none" '
        f'style="stroke:{_INK};stroke-width:2"/>'
    )
    # Nearer to the ridge than to the ops that decode.
    middle = x0 + 0.7 * (x1 - x0), y0 + 0.7 * (y1 - y0)
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    yield _text(
        middle[0],
        middle[1] - 8,
        f"memory: {roofs.read_bytes_per_s / 1e9:,.0f} GB/s, {kind}",
        "middle",
        f"rotate({angle:.1f} {middle[0]:.1f} {middle[1] - 8:.1f})",
    )
    matrix = f"bfloat16 products: {roofs.matrix_flops_per_s / 1e12:,.0f} TFLOP/s"
    yield _text(_WIDTH - _RIGHT - 4, y1 - 7, matrix, "end")


def _dots(
    frame: _Frame, roofs: Roofline, survey: Survey, dots: Sequence[tuple[float, float, OpSurvey]]
) -> Iterator[str]:
    """The highest first. Names stand in a column at the right, each joined to its dot, so that none
    covers another."""
    column = _WIDTH - _RIGHT + 26
    places = _spread([frame.y(y) for _, y, _ in dots], _TOP + 8, _HEIGHT - _BOTTOM)
    for (intensity, height, row), at in zip(dots, places, strict=True):
        x, y = frame.x(intensity), frame.y(height)
        colour = _ACCENT if row.implementation.is_own else _SWAPPED
        fraction = survey.of_roofline(row)
        shown = f"{intensity:.3g} FLOP/byte" if fraction is None else f"{fraction:.0%} of the roof"
        if fraction is not None:
            yield _line(x, y, x, frame.y(_roof(roofs, intensity)), colour, opacity=0.6)
        yield _line(x, y, column - 4, at, _INK, opacity=0.25)
        fill = "none" if fraction is None else colour
        style = f'style="fill:{fill};stroke:{colour};stroke-width:2"'
        title = f"<title>{escape(f'{row.name}: {shown}')}</title>"
        if row.implementation.is_own:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {style}>{title}</circle>'
        else:
            corner = f'x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"'
            yield f"<rect {corner} {style}>{title}</rect>"
        yield _text(column, at + 4, f"{row.name} {shown}", "start")


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """These heights, from the top down, moved as little as keeps them apart and inside."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, top if not places else places[-1] + _LABEL_HEIGHT))
    floor = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], floor)
        floor = places[index] - _LABEL_HEIGHT
    return places


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, opacity: float) -> str:
    return (
        f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}" fill="none" '
        f'style="stroke:{colour};stroke-opacity:{opacity}"/>'
    )


def _text(x: float, y: float, words: str, anchor: str, transform: str = "") -> str:
    turned = f' transform="{transform}"' if transform else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned} style="fill:{_INK}">'
        f"{escape(words)}</text>"
    )
