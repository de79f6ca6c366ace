"""The magics in a real kernel: what a saved notebook then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]

SOURCES = [
    f"""\
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
%load_ext nbengine
from tests.jupyter.scripted import ScriptedEngine
engine = ScriptedEngine(model="scripted")""",
    "%%nb_generate --max-tokens 30 --seed 2\nOnce upon a time",
    "_.outputs[0].text",
    "%nb_status",
    "%nb_dashboard",
    "%nb_generate --temperature -1 hello",
    "%nb_unload",
]


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The cells of a notebook that has run, failures included."""
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in SOURCES]
    )
    nbclient.NotebookClient(notebook, timeout=60, allow_errors=True).execute()
    return [cell.outputs for cell in notebook.cells]


def test_a_stream_is_one_output_that_was_updated(cells: list[Any]) -> None:
    (output,) = cells[1]
    (text,) = (o.data["text/plain"] for o in cells[2])
    assert text.strip("'") in output.data["text/plain"]
    assert "30 output tokens, length" in output.data["text/html"]


def test_objects_have_both_forms(cells: list[Any]) -> None:
    (status,) = cells[3]
    assert "<svg" in status.data["text/html"]
    assert "of 64 blocks" in status.data["text/plain"]


def test_unloading_leaves_the_dashboards_last_picture_in_the_notebook(cells: list[Any]) -> None:
    (dashboard,) = cells[4]
    assert "application/vnd.jupyter.widget-view+json" not in dashboard.data
    assert "dashboard (closed)" in dashboard.data["text/html"]
    assert "finished req-0 (length)" in dashboard.data["text/html"]


def test_a_mistake_is_one_line(cells: list[Any]) -> None:
    (output,) = cells[5]
    assert output.name == "stderr"
    assert output.text.startswith("UsageError: InvalidField: temperature=-1.0")
    assert output.text.count("\n") == 1
