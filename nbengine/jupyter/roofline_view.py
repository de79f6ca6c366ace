"""The roofline of an engine's ops, drawn.

Called by `RooflinePlot._repr_html_`. FLOP/byte against FLOP/s, both in powers of ten: two roofs, and
a dot for each op that the batch calls. A filled dot was measured; a ring lies on the roof, where the
op could be at most. A square is an op that was swapped. The figures are in the table below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.picture import GREY, image
from nbengine.kernel_survey import OpSurvey, Survey
from nbengine.kernels.roofline import Roofline

_WIDTH, _HEIGHT = 840, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 290, 18, 44
_LABEL_HEIGHT = 17
_OWN, _SWAPPED = PALETTE[0], PALETTE[5]


def roofline_html(survey: Survey) -> str:
    """The picture, where there is something to draw, and the table."""
    svg, roofs = roofline_svg(survey), survey.roofs
    if not svg or roofs is None:
        return survey._repr_html_()
    ops = "; ".join(f"{row.name} {_shown(survey, row)}" for row in _drawn(survey))
    alt = f"Roofline of {roofs.device} ({_kind(survey)}): {ops}"
    return f"{image(svg, alt)}{survey._repr_html_()}"


def roofline_svg(survey: Survey) -> str:
    """One element; empty where no engine was asked, or its batch computes nothing."""
    roofs, rows = survey.roofs, _drawn(survey)
    if roofs is None or not rows:
        return ""
    dots = sorted(
        ((row.intensity, row.flops_per_s or _roof(roofs, row.intensity), row) for row in rows),
        key=lambda dot: (-dot[1], dot[0]),
    )
    frame = _Frame.around(roofs, [(x, y) for x, y, _ in dots])
    parts = [
        *_axes(frame),
        *_roof_lines(frame, roofs, _kind(survey)),
        *_dots(frame, roofs, survey, dots),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" fill="{GREY}" '
        f'style="font:13px system-ui,sans-serif">{"".join(parts)}</svg>'
    )


def _drawn(survey: Survey) -> list[OpSurvey]:
    return [row for row in survey.rows if row.cost is not None and row.cost.flops > 0]


def _kind(survey: Survey) -> str:
    return "measured" if any(row.timing for row in _drawn(survey)) else "published, not measured"


def _shown(survey: Survey, row: OpSurvey) -> str:
    fraction = survey.of_roofline(row)
    return f"{row.intensity:.3g} FLOP/byte" if fraction is None else f"{fraction:.0%} of the roof"


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
        yield _line(x, _TOP, x, bottom, GREY, opacity=0.3)
        yield _text(x, bottom + 16, f"{10.0**power:g}", "middle")
    for power in _decades(frame.y_from, frame.y_to):
        y = frame.y(10.0**power)
        yield _line(_LEFT, y, right, y, GREY, opacity=0.3)
        yield _text(_LEFT - 6, y + 4, _flops(10.0**power), "end")
    yield _text((_LEFT + right) / 2, _HEIGHT - 8, "operations a byte of memory", "middle")
    yield _text(_LEFT - 54, _TOP - 4, "FLOP/s", "start")


def _roof_lines(frame: _Frame, roofs: Roofline, kind: str) -> Iterator[str]:
    ridge = roofs.matrix_flops_per_s / roofs.read_bytes_per_s
    x0, y0 = frame.x(10**frame.x_from), frame.y(roofs.read_bytes_per_s * 10**frame.x_from)
    x1, y1 = frame.x(ridge), frame.y(roofs.matrix_flops_per_s)
    yield (
        f'<path d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}H{_WIDTH - _RIGHT}" fill="none" '
        f'style="stroke:{GREY};stroke-width:2"/>'
    )
    # Nearer to the ridge than to the ops that decode.
    middle = x0 + 0.62 * (x1 - x0), y0 + 0.62 * (y1 - y0)
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
        colour = _OWN if row.implementation.is_own else _SWAPPED
        fraction, shown = survey.of_roofline(row), _shown(survey, row)
        if fraction is not None:
            yield _line(x, y, x, frame.y(_roof(roofs, intensity)), colour, opacity=0.6)
        yield _line(x, y, column - 4, at, GREY, opacity=0.4)
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
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(words)}</text>'
