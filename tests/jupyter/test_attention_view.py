"""How a probe's attention over its blocks looks in a notebook."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from xml.dom import minidom

import pytest
import torch

from nbengine.jupyter.attention_view import AttentionView
from tests.jupyter.contrast import DARK_PAGE, LIGHT_PAGE, contrast, rgb

SHARES = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.746, 0.004]])


@pytest.fixture
def view() -> AttentionView:
    """Two layers, three blocks, of which the sequence holds the first two still."""
    probe: Any = SimpleNamespace(
        seq_id="a<b",
        step=7,
        position=40,
        block_table=(5, 2),
        attention_by_block=lambda layer: SHARES,
    )
    return AttentionView(probe)


def table(view: AttentionView) -> list[list[minidom.Element]]:
    root = minidom.parseString(f"<div>{view._repr_html_()}</div>").documentElement
    return [
        [cell for cell in row.childNodes if cell.nodeName in ("td", "th")]
        for row in root.getElementsByTagName("tr")
    ]


def words(row: list[minidom.Element]) -> list[str]:
    return [cell.firstChild.data if cell.firstChild else "" for cell in row]


def ink(cell: minidom.Element) -> tuple[tuple[float, ...], float]:
    """Its colour, and how much of it."""
    found = re.search(r"background-color:rgba\((.*?)\)", cell.getAttribute("style"))
    assert found
    *colour, alpha = map(float, found[1].split(","))
    return tuple(colour), alpha


def test_each_layer_has_a_row_and_each_block_a_column_in_the_order_of_the_table(
    view: AttentionView,
) -> None:
    assert [words(row) for row in table(view)] == [
        ["block", "5", "2", "(2)"],
        ["layer 0", "100%", "", ""],
        ["layer 1", "25%", "75%", ""],
    ]
    assert "a&lt;b, step 7: attention of position 40 over its 3 blocks" in view._repr_html_()


def test_what_is_too_little_to_be_written_can_be_asked_for(view: AttentionView) -> None:
    assert table(view)[2][3].getAttribute("title") == "layer 1, block (2): 0.4%"


def test_more_attention_is_more_colour_and_never_hides_the_figure(view: AttentionView) -> None:
    _, first, second = table(view)
    assert ink(first[1])[1] > ink(second[2])[1] > ink(second[1])[1] > ink(second[3])[1]
    colour, alpha = ink(first[1])  # the deepest there is
    for page, letters in ((LIGHT_PAGE, "#212121"), (DARK_PAGE, "#ffffff")):
        behind = tuple(
            alpha * part + (1 - alpha) * below
            for part, below in zip(colour, rgb(page), strict=True)
        )
        assert contrast(letters, behind) > 4.5
