"""A comparison of runs as a picture: blocks held and requests waiting, step by step.

Called by `Comparison._repr_html_`. Lines differ in their dashes and not only in colour. Words and
numbers stand around the images, in the page's own ink.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nbengine.core.compare import Comparison, Run
from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.picture import GREY, image
from nbengine.jupyter.views import table_html

WIDTH, HEIGHT = 640, 120
_COLOURS = tuple(PALETTE[index] for index in (0, 5, 2, 3, 1, 4))
_DASHES = ("", "7 3", "2 2", "9 3 2 3", "12 4", "4 2 1 2 1 2")
_INK = "color:var(--jp-content-font-color1,var(--vscode-editor-foreground,currentColor))"
_SOFT = (
    "color:color-mix(in srgb,var(--jp-content-font-color1,"
    "var(--vscode-editor-foreground,currentColor)) 62%,transparent)"
)


def comparison_html(comparison: Comparison) -> str:
    """The table, then the two pictures with one legend."""
    headers, *rows = (comparison.headers, *comparison.rows())
    table = table_html(headers, ([escape(cell) for cell in row] for row in rows))
    legend = "".join(
        f"<span style='margin-right:1.2em;white-space:nowrap'>{_sample(k)} {escape(run.name)}</span>"
        for k, run in enumerate(comparison.runs)
    )
    return (
        f"<div style='{_INK}'>{table}<div style='margin-top:.6em'>{legend}</div>"
        f"{_chart('KV blocks held', comparison.runs, [r.held_blocks for r in comparison.runs])}"
        f"{_chart('Sequences waiting', comparison.runs, [r.num_waiting for r in comparison.runs])}"
        "</div>"
    )


def _chart(title: str, runs: Sequence[Run], series: Sequence[Sequence[int]]) -> str:
    most = max((max(values, default=0) for values in series), default=0)
    num_steps = max(map(len, series))
    said = "; ".join(
        f"{run.name}: at most {max(values, default=0):,} in {len(values):,} steps"
        for run, values in zip(runs, series, strict=True)
    )
    numbers = "font-variant-numeric:tabular-nums"
    return (
        f"<div style='margin-top:.6em'>{escape(title)} "
        f"<span style='{_SOFT};{numbers}'>0 to {most:,}</span></div>"
        f"{image(chart_svg(series, most, num_steps), f'{title}. {said}')}"
        f"<div style='display:flex;justify-content:space-between;max-width:{WIDTH}px;{_SOFT};"
        f"{numbers}'><span>first step</span><span>{num_steps:,} steps</span></div>"
    )


def chart_svg(series: Sequence[Sequence[int]], most: int, num_steps: int) -> str:
    """A line for each run, from its first step on, in the order of colours and dashes."""
    lines = [
        f'<path d="M0 {y:g}H{WIDTH}" stroke="{GREY}" stroke-opacity=".35"/>'
        for y in (1, HEIGHT / 2, HEIGHT - 1)
    ]
    for k, values in enumerate(series):
        colour, dash = _COLOURS[k % len(_COLOURS)], _DASHES[k % len(_DASHES)]
        lines.append(
            f'<path d="{_path(values, most, num_steps)}" stroke="{colour}" stroke-width="2" '
            f'stroke-dasharray="{dash}"/>'
        )
    return _svg(WIDTH, HEIGHT, "".join(lines))


def _path(values: Sequence[int], most: int, num_steps: int) -> str:
    """A step is as wide as it can be; of several in one pixel, the largest is drawn."""
    per_point = max(1, -(-num_steps // WIDTH))
    width = WIDTH / max(1, num_steps) * per_point
    scale = (HEIGHT - 4) / max(1, most)
    points: list[str] = []
    for k in range(0, len(values), per_point):
        y = HEIGHT - 2 - scale * max(values[k : k + per_point])
        points.append(f"{'L' if points else 'M'}{k // per_point * width:.4g} {y:.4g}")
    points += [f"H{min(WIDTH, len(values) / per_point * width):.4g}"] if points else []
    return "".join(points)


def _sample(k: int) -> str:
    """A piece of a run's line, for the legend."""
    colour, dash = _COLOURS[k % len(_COLOURS)], _DASHES[k % len(_DASHES)]
    line = f'<path d="M0 5H36" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    return image(_svg(36, 10, line), "", "display:inline;vertical-align:middle")


def _svg(width: int, height: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" fill="none">{content}</svg>'
    )
