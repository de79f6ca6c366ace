"""The magics in a real kernel: what a saved notebook then holds."""

from __future__ import annotations

import contextlib
import queue
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.jupyter.kernels import real_kernel

REPOSITORY = Path(__file__).parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"

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
    assert "data:image/svg+xml" in status.data["text/html"]
    assert "of 64 blocks" in status.data["text/plain"]


def test_unloading_leaves_the_dashboards_last_picture_in_the_notebook(cells: list[Any]) -> None:
    (dashboard,) = cells[4]
    assert WIDGET not in dashboard.data
    assert "dashboard (closed)" in dashboard.data["text/html"]
    assert "finished req-0 (length)" in dashboard.data["text/html"]


def test_a_mistake_is_one_line(cells: list[Any]) -> None:
    (output,) = cells[5]
    assert output.name == "stderr"
    assert output.text.startswith("UsageError: InvalidField: temperature=-1.0")
    assert output.text.count("\n") == 1


def test_breakpoint_in_a_policy_opens_a_prompt_in_the_cell() -> None:
    """Also where JupyterLab's debugger is installed, which would pass over it."""
    with real_kernel() as (_, client):
        asked: list[str] = []
        said: list[str] = []
        answers = iter(["p sequence.seq_id, 6 * 7", "continue"])

        def answer(message: Any) -> None:
            asked.append(message["content"]["prompt"])
            client.input(next(answers))

        def hear(message: Any) -> None:
            content = message["content"]
            said.append(content.get("text") or str(content.get("data", content)))

        def run(source: str) -> str:
            reply = client.execute_interactive(
                source, timeout=60, allow_stdin=True, stdin_hook=answer, output_hook=hear
            )
            return reply["content"]["status"]

        assert run(SOURCES[0]) == "ok"
        policy = """\
class Mine:
    dynamic = True
    def rank(self, sequence):
        if armed:
            breakpoint()
        return 0
armed = False
engine.set_policy(Mine)
engine.add_request("a b c", request_id="mine")
armed = True
print(engine.step())"""
        assert run(policy) == "ok"
        text = "".join(said)
        assert len(asked) == 2 and "('mine', 42)" in text
        assert "admitted mine" in text, "and the step went on"
        assert (
            run("import logging; engine.start(); import time; time.sleep(.5); engine.pause()")
            == "ok"
        )
        assert len(asked) == 2, "nobody waits for a step in the background"
        assert "breakpoint() was passed over" in "".join(said)


def test_a_kernel_that_ends_leaves_the_views_last_pictures() -> None:
    """The widgets' models go with it: a page that opens the notebook later has nothing but these."""
    with real_kernel() as (manager, client):
        shown: list[Any] = []

        def hear(message: Any) -> None:
            if message["msg_type"] in ("display_data", "update_display_data"):
                shown.append(message["content"])

        sources = (
            SOURCES[0],
            "engine.add_request('a b c'); engine.step(); engine.dashboard()",
            "view = %nb_watch paged_attention_decode --phase 1\nview",
            "view._widget.phase = 1  # as the page sets it",
        )
        for source in sources:
            reply = client.execute_interactive(source, timeout=60, output_hook=hear)
            assert reply["content"]["status"] == "ok"
        dashboard, view = shown
        assert WIDGET in dashboard["data"] and WIDGET in view["data"]
        assert "</b>, phase 1 of " in view["data"]["text/html"]

        shown.clear()
        manager.shutdown_kernel()
        with contextlib.suppress(queue.Empty):
            while True:
                hear(client.get_iopub_msg(timeout=1))
        stills = {content["transient"]["display_id"]: content["data"] for content in shown}
        assert stills.keys() == {shown["transient"]["display_id"] for shown in (dashboard, view)}
        assert all(WIDGET not in data for data in stills.values())
        assert "dashboard (closed)" in stills[dashboard["transient"]["display_id"]]["text/html"]
        assert "</b>, phase 2 of " in stills[view["transient"]["display_id"]]["text/html"]
