"""The kernel view, scrubbed in a real browser: alone on a page, and in a notebook."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbengine.jupyter.block_map import PALETTE
from nbengine.kernels import lab
from tests.browser.lab import Lab, NotebookPage

JUPYTER = Path(__file__).parents[2] / "nbengine" / "jupyter"
TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    """The view by itself: its module and style, and the trace of decode attention."""
    trace = lab.watch("paged_attention_decode")
    numbers = memoryview(trace.packed()).cast("i").tolist()
    page = browser.new_page(viewport={"width": 1100, "height": 1200})
    page.set_default_timeout(TIMEOUT_MS)
    page.set_content(
        f"""<!doctype html><style>{(JUPYTER / "kernel_view.css").read_text()}</style>
        <script type="module">{(JUPYTER / "kernel_view.js").read_text()}
        window.told = [];
        const view = createKernelView({{
          facts: {trace.facts()}, accesses: new Int32Array({numbers}), palette: {json.dumps(PALETTE)},
          onPhase: (phase) => window.told.push(phase),
        }});
        document.body.append(view.element);
        window.view = view;
        </script>"""
    )
    page.wait_for_selector(".nbk[data-phase='0']")
    yield page
    page.close()


def caption(page: Any, tensor: str) -> str:
    return page.get_by_role("figure", name=tensor, exact=True).locator("figcaption").inner_text()


def test_it_is_scrubbed_from_barrier_to_barrier(page: Any) -> None:
    status = page.get_by_role("status")
    assert status.inner_text().startswith("phase 1 of 4, to the barrier at line ")
    assert "k_cache, float32 [6, 1, 16, 64]: 0 elements touched" in caption(page, "k_cache")
    slider = page.get_by_role("slider", name="Phase")
    slider.fill("1")
    assert slider.get_attribute("aria-valuetext") == "phase 2 of 4"
    # 40 tokens of 64 dimensions, and 8 slots past the sequence's end, in the last tile's.
    assert "3,072 elements touched, 0 written" in caption(page, "k_cache")
    lit = page.locator("[aria-current=true]").all_inner_texts()
    assert len(lit) == 3
    assert [text.split(" → ")[0] for text in lit] == ["0", "1", "2"], "all of sequence 0's blocks"
    page.get_by_role("button", name="Next phase").click()
    assert status.inner_text().startswith("phase 3 of 4")
    assert "128 elements touched, 128 written" in caption(page, "out")
    assert page.evaluate("window.told") == [1, 2]


def test_the_keyboard_steps_phases_and_threads(page: Any) -> None:
    view = page.locator(".nbk")
    view.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert view.get_attribute("data-phase") == "1"
    page.keyboard.press("ArrowDown")
    detail = page.get_by_role("region", name="Detail")
    assert detail.inner_text().startswith("thread 0 (warp 0, lane 0): reads")
    assert "of k_cache, first k_cache: block " in detail.inner_text()
    assert "(token 0 of sequence 0), dim 0" in detail.inner_text()
    page.keyboard.press("Escape")
    assert detail.inner_text() == "Point at a thread or an element."
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert view.get_attribute("data-phase") == "0", "and no further"


def test_a_line_of_the_source_shows_its_own_accesses_alone(page: Any) -> None:
    page.evaluate("window.view.update({ phase: 1 })")
    lines = page.get_by_role("list", name="Lines of this phase")
    line = lines.get_by_role("listitem").filter(has_text="k_cache")
    line.get_by_role("button").click()
    assert line.get_by_role("button").get_attribute("aria-pressed") == "true"
    assert "3,072 elements touched" in caption(page, "k_cache")
    assert "0 elements touched" in caption(page, "v_cache")
    line.get_by_role("button").click()
    assert "3,072 elements touched" in caption(page, "v_cache")


def test_pointing_at_an_element_names_it_and_who_touches_it(page: Any) -> None:
    page.evaluate("window.view.update({ phase: 1, thread: null, line: null })")
    block = page.get_by_role("figure", name="k_cache", exact=True).locator(
        ".nbk-block", has_text="tokens 16–31 of sequence 0"
    )
    block.locator("canvas").hover(position={"x": 3 * 20 + 1, "y": 3 * 2 + 1})
    detail = page.get_by_role("region", name="Detail").inner_text()
    assert "head 0, slot 2 (token 18 of sequence 0), dim 20: read at line " in detail
    assert "(warp 1)" in detail


SOURCES = [
    "%load_ext nbengine\nview = %nb_watch paged_attention_decode --phase 1\nview",
    "print('phase', view.phase)",
]


def test_in_a_notebook_the_page_and_python_share_the_phase(lab: Lab, browser: Any) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)
    notebook = NotebookPage(lab, page, SOURCES, "kernel_view.ipynb")
    notebook.run(0)
    view = page.locator(".jp-OutputArea-output .nbk")
    view.wait_for()
    view.get_by_role("button", name="Next phase").click()
    page.wait_for_selector(".nbk[data-phase='1']")
    notebook.run(1)
    page.locator(".jp-OutputArea-output", has_text="phase 1").last.wait_for()
    page.close()


def test_a_notebook_that_is_opened_after_its_kernels_end_has_the_phase_that_was_looked_at(
    lab: Lab, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)
    notebook = NotebookPage(lab, page, SOURCES, "kernel_view_ended.ipynb")
    notebook.run(0)
    view = page.locator(".jp-OutputArea-output .nbk")
    view.wait_for()
    view.get_by_role("button", name="Next phase").click()
    page.wait_for_selector(".nbk[data-phase='1']")
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    still = page.locator(".jp-OutputArea-output img[alt^='phase 2 of ']")
    still.wait_for()
    notebook.save_and_reload()
    still.wait_for()
    assert page.get_by_text("model not found").count() == 0
    page.close()
