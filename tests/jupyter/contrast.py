"""WCAG's contrast of two colours, and the pages of JupyterLab's two themes."""

from __future__ import annotations

LIGHT_PAGE, DARK_PAGE = "#ffffff", "#111111"


def rgb(colour: str) -> tuple[float, ...]:
    """From `#rrggbb`, each from 0 to 255."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def luminance(colour: tuple[float, ...]) -> float:
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str | tuple[float, ...], other: str | tuple[float, ...]) -> float:
    """From 1 to 21; text wants 4.5, large text and drawings 3."""
    colours = (rgb(colour) if isinstance(colour, str) else colour for colour in (one, other))
    less, more = sorted(map(luminance, colours))
    return (more + 0.05) / (less + 0.05)
