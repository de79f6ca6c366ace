"""A kernel written in a cell of a real JupyterLab goes into a running engine, whose dashboard is open.

One notebook, in one kernel; the tests build on each other in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.lab import REPOSITORY, Lab, NotebookPage

SETUP = """\
import logging
from nbengine import Engine, SamplingParams
from tests.tiny_models import save_reference
%load_ext nbengine
save_reference("served-llama", Path({folder!r}))
engine = Engine(
    model={folder!r} + "/served-llama", kernels="emulated", device="cpu", dtype="float32",
    skip_tokenizer_init=True, max_model_len=256, num_gpu_blocks_override=16,
)
engine.add_request([5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
engine.step(3)"""
RIGHT = "%%nb_kernel gated_mlp --swap\n"
BROKEN = "%%nb_kernel gated_mlp --swap\n__global__ void gated_mlp() {\n    int x = ;\n}"
IS_OWN = "[each.is_own for each in engine.kernels.implementations if each.op.name == 'gated_mlp']"
SETTING_UP, SHOW, BAD, GOOD, LIST = range(5)
TIMEOUT_MS = 120_000


@pytest.fixture(scope="module")
def notebook(lab: Lab, browser: Any, tmp_path_factory: Any) -> Iterator[NotebookPage]:
    pytest.importorskip("cuda.pathfinder")
    source = (REPOSITORY / "cuda" / "gated_mlp.cu").read_text()
    folder = str(tmp_path_factory.mktemp("kernel_bench"))
    cells = [
        "from pathlib import Path\n" + SETUP.format(folder=folder),
        "%nb_dashboard",
        BROKEN,
        RIGHT + source,
        "%nb_kernels",
    ]
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)
    notebook = NotebookPage(lab, page, cells, name="kernel_bench.ipynb")
    for index in (SETTING_UP, SHOW):
        notebook.run(index)
    page.wait_for_selector(".jp-OutputArea-output .nbe[data-step='3']")
    yield notebook
    page.close()


def output(notebook: NotebookPage, index: int) -> Any:
    return notebook.page.locator(".jp-Notebook-cell").nth(index).locator(".jp-OutputArea-output")


def test_a_mistake_is_shown_on_the_cells_own_line(notebook: NotebookPage) -> None:
    notebook.run(BAD)
    text = output(notebook, BAD).first.inner_text()
    assert ".cu:2:17: error" in text, "counted as the user sees the cell, magic and all"
    assert "__global__ void gated_mlp() {" in text and "^" in text
    assert notebook.evaluate(IS_OWN) == "[True]"


def test_a_right_one_is_swapped_into_the_running_engine(notebook: NotebookPage) -> None:
    root = notebook.page.locator(".nbe")
    notebook.run(GOOD)
    text = output(notebook, GOOD).first.inner_text()
    assert "agrees with the reference on 20 calls of its grid and 2 live" in text
    assert notebook.evaluate(IS_OWN) == "[False]"
    root.get_by_role("button", name="Step ×10").click()
    notebook.page.wait_for_selector(".nbe[data-step='13']")
    requests = root.get_by_role("region", name="Requests").inner_text()
    assert "running" in requests and "4 + 13" in requests, "its request goes on"


def test_the_step_inspector_tells_what_each_kernel_costs(notebook: NotebookPage) -> None:
    root = notebook.page.locator(".nbe")
    button = root.get_by_role("button", name="kernels", exact=True)
    button.click()
    table = root.get_by_role("region", name="Kernels")
    table.get_by_text("in step 13, not measured").wait_for()
    calls = {row.split("\t")[0]: row for row in table.inner_text().splitlines()}
    assert "memory" in calls["paged_attention_decode"]
    assert "not called" in calls["paged_attention_prefill"]
    timeline = root.get_by_role("slider")
    timeline.focus()
    timeline.press("Home")
    notebook.page.wait_for_selector(".nbe[data-shown='1']")
    button.click()
    table.get_by_text("in step 1, not measured").wait_for()
    calls = {row.split("\t")[0]: row for row in table.inner_text().splitlines()}
    assert "not called" not in calls["paged_attention_prefill"]
    timeline.press("Escape")
    notebook.evaluate("engine.kernels.restore('gated_mlp')")
    table.wait_for(state="hidden")  # it told of what ran before
    notebook.run(GOOD)


def test_the_list_of_kernels_tells_it_apart(notebook: NotebookPage) -> None:
    notebook.run(LIST)
    text = output(notebook, LIST).first.inner_text()
    assert "gated_mlp" in text and "paged_attention_decode" in text
    assert "gated_mlp-" in text, "the cell's file"
    assert Path(notebook.evaluate("engine.config.model").strip("'")).name == "served-llama"
