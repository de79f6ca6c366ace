"""The roofline as a picture: a dot for each op, where its figures put it."""

from __future__ import annotations

import itertools
import re
from xml.dom import minidom

import pytest

from nbengine.jupyter.roofline_view import _spread, roofline_html, roofline_svg
from nbengine.kernel_survey import Survey
from nbengine.kernels.op import Cost
from tests.test_kernel_survey import MEASURED, ROOFS, row


def dots(svg: str) -> dict[str, tuple[str, float, float, str]]:
    """By op: the shape, its middle, and its fill."""
    found = {}
    for node in minidom.parseString(svg).documentElement.childNodes:
        if node.nodeName not in ("circle", "rect"):
            continue
        name = node.getElementsByTagName("title")[0].firstChild.data.partition(":")[0]
        if node.nodeName == "circle":
            x, y = float(node.getAttribute("cx")), float(node.getAttribute("cy"))
        else:
            x, y = float(node.getAttribute("x")) + 5, float(node.getAttribute("y")) + 5
        fill = re.search(r"fill:([^;]+)", node.getAttribute("style"))
        assert fill
        found[name] = node.nodeName, x, y, fill[1]
    return found


def test_the_plot_has_a_dot_for_each_op_that_computes_where_its_figures_put_it() -> None:
    svg = roofline_svg(MEASURED)
    found = dots(svg)
    assert found.keys() == {"rms_norm", "gemv"}, "copies compute nothing, and have no place on it"
    assert (found["rms_norm"][0], found["gemv"][0]) == ("circle", "rect"), "a square was swapped"
    assert "none" not in (found["rms_norm"][3], found["gemv"][3]), "measured ones are filled"
    # gemv: 1000 FLOP/byte, 25 TFLOP/s; rms_norm: 1 FLOP/byte, 0.5 TFLOP/s. Three decades apart one
    # way, 1.7 the other; and the grid has a line at each power of ten.
    ticks = {
        node.firstChild.data: float(node.getAttribute("x"))
        for node in minidom.parseString(svg).getElementsByTagName("text")
        if node.getAttribute("text-anchor") == "middle" and node.firstChild.data.isdigit()
    }
    assert found["rms_norm"][1] == pytest.approx(ticks["1"], abs=0.1)
    assert found["gemv"][1] == pytest.approx(ticks["1000"], abs=0.1)
    assert found["gemv"][2] < found["rms_norm"][2]


def test_what_was_not_measured_is_a_ring_on_the_roof() -> None:
    rows = (row("rms_norm", Cost(10**6, 10**6)), row("gemv", Cost(10**6, 10**9)))
    svg = roofline_svg(Survey(rows, ROOFS, "not measured"))
    assert {fill for _, _, _, fill in dots(svg).values()} == {"none"}
    assert "published, not measured" in svg


def test_the_picture_says_what_it_draws_to_those_who_do_not_see_it() -> None:
    alt = re.search("alt='(.*?)'", roofline_html(MEASURED))
    assert alt
    assert (
        alt[1] == "Roofline of a device (measured): rms_norm 50% of the roof; gemv 25% of the roof"
    )


def test_names_are_kept_apart_and_inside() -> None:
    places = _spread([10, 12, 100, 395, 396, 399], top=20, bottom=400)
    assert places[0] >= 20 and places[-1] <= 400
    assert all(b - a >= 16 for a, b in itertools.pairwise(places))
    assert places[2] == 100, "one with room stays where it is"
