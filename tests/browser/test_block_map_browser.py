"""The block map of many blocks, on a bare page: each cell has its holder's colour, only what changed is
painted, and what is looked at stands out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nbengine.jupyter.block_map import PALETTE
from tests.browser.test_timeline_browser import serve_views

NUM_BLOCKS = 20_000
SETTING_UP = """([numBlocks]) => {
  const names = new Map([[0, { id: "a", colour: 0 }], [1, { id: "b", colour: 1 }]]);
  const cells = new Uint32Array(numBlocks); // the even ones are a's, every fourth of them shared
  for (let block = 0; block < numBlocks; block++) cells[block] = block % 8 ? (2 | 1 << 2 | (block % 2) << 10) : (3 | 2 << 2);
  window.blocks = { cells, names, blockSize: 16, step: 1, tails: new Uint32Array(), selected: null, table: new Uint32Array(), details: null };
  window.map = views.createBlockMap({ palette: window.palette });
  document.querySelector("#host").replaceChildren(map.element);
  map.update(blocks);
}"""
CELL = """([block]) => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
  const canvas = map.element.querySelector("canvas");
  const ratio = canvas.width / canvas.getBoundingClientRect().width;
  const side = Math.floor(Math.sqrt(map.element.clientWidth * 230 / blocks.cells.length)); // of a cell
  const columns = Math.floor(map.element.clientWidth / side);
  const at = [block % columns, Math.floor(block / columns)].map((n) => Math.round(n * side * ratio));
  done([[...canvas.getContext("2d").getImageData(...at, 1, 1).data], Number(canvas.dataset.painted)]);
})))"""


class Map:
    def __init__(self, page: Any) -> None:
        self.page = page
        page.evaluate(SETTING_UP, [NUM_BLOCKS])
        self.look(0)  # it is drawn for the first time, and not in a test's own look

    def look(self, block: int) -> tuple[list[int], int]:
        """RGBA of a cell's first pixel, once all is drawn, and how many rows of pixels were painted
        last."""
        colour, painted = self.page.evaluate(CELL, [block])
        return colour, painted

    def tell(self, change: str) -> None:
        self.page.evaluate(f"{change}; map.update(blocks)")


@pytest.fixture
def block_map(browser: Any) -> Iterator[Map]:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    serve_views(page)
    yield Map(page)
    page.close()
    assert errors == []


def rgba(colour: str, alpha: int = 255) -> list[int]:
    return [*bytes.fromhex(PALETTE[0 if colour == "a" else 1].removeprefix("#")), alpha]


def test_a_cell_has_the_colour_of_its_holder(block_map: Map) -> None:
    assert block_map.look(2)[0] == rgba("a")
    assert block_map.look(NUM_BLOCKS - 1)[0] == rgba("b")


def test_only_rows_with_a_change_are_painted(block_map: Map) -> None:
    block_map.tell("blocks.cells[2] = 2 | 1 << 2 | 1 << 10")
    colour, painted = block_map.look(2)
    assert colour == rgba("b") and 0 < painted < 10
    block_map.tell("blocks.step = 2")
    assert block_map.look(2) == (rgba("b"), 0)


def test_what_is_looked_at_stands_out_and_the_rest_is_dimmed(block_map: Map) -> None:
    block_map.page.evaluate("map.highlight('a')")
    assert block_map.look(2) == (rgba("a"), 0), "nothing is painted anew for it"
    assert block_map.look(3)[0][3] < 60
    block_map.page.evaluate("map.highlight(null)")
    assert block_map.look(3)[0] == rgba("b")
    block_map.tell("blocks.selected = 'b'; blocks.table = Uint32Array.from([3, 5])")
    assert block_map.look(1)[0][3] < 60, "it is b's, but not in the table"
    red, green, blue, alpha = block_map.look(3)[0]
    assert alpha == 255 and [red, green, blue] != rgba("a")[:3]
