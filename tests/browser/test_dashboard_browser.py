"""The dashboard in a real JupyterLab, seen and clicked by a real browser.

One notebook, in one kernel; the tests build on each other in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.lab import Lab, NotebookPage

SOURCES = [
    """\
import threading, time
from nbengine import SamplingParams
from tests.jupyter.scripted import ScriptedEngine
%load_ext nbengine
engine = ScriptedEngine(model="scripted", num_gpu_blocks_override=48, max_num_seqs=3)
engine.runner.seconds_per_step = 0.01
engine.add_request([5] * 40, SamplingParams(max_tokens=600, n=2))
engine.add_request([6] * 40, SamplingParams(max_tokens=600), request_id="other")
engine.add_request([7] * 40, SamplingParams(max_tokens=600), request_id="waits")""",
    "%nb_dashboard",
    """\
release = threading.Event()
threading.Timer(60, release.set).start()
while not release.is_set():
    time.sleep(0.01)""",
    "engine.close()",
]
SHOW, BUSY, CLOSE = 1, 2, 3
TIMEOUT_MS = 30_000
PICTURED = "test_a_reloaded_page_shows_the_state_and_its_buttons_work"


class DashboardPage:
    """The dashboard's parts, as a user finds them: by role and name."""

    def __init__(self, notebook: NotebookPage) -> None:
        self.notebook, self.page = notebook, notebook.page
        self.root = self.page.locator(".nbe")

    def click(self, name: str) -> None:
        self.root.get_by_role("button", name=name, exact=True).click()

    @property
    def step(self) -> int:
        return int(self.root.get_attribute("data-step"))

    def kernel(self, expression: str) -> str:
        """What an expression is in the kernel, as `repr` shows it."""
        return self.notebook.evaluate(expression)

    def wait(self, condition: str) -> None:
        """Until a JavaScript condition on the root's data (`d`) holds."""
        self.page.wait_for_function(
            f"() => {{ const d = document.querySelector('.nbe')?.dataset; return d && {condition} }}",
            timeout=TIMEOUT_MS,
        )


@pytest.fixture(scope="module")
def dashboard(lab: Lab, browser: Any) -> Iterator[DashboardPage]:
    """The notebook with its first two cells run."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)
    notebook = NotebookPage(lab, page, SOURCES)
    notebook.run(0)
    notebook.run(SHOW)
    page.wait_for_selector(".jp-OutputArea-output .nbe[data-step]")
    yield DashboardPage(notebook)
    page.close()


def test_it_shows_the_queues_the_blocks_and_their_names_to_screen_readers(
    dashboard: DashboardPage,
) -> None:
    root = dashboard.root
    assert "paused" in root.get_by_role("status").first.inner_text()
    requests = root.get_by_role("region", name="Requests")
    assert "req-0" in requests.inner_text()
    assert "48 free of 48 blocks" in root.inner_text()
    blocks = root.get_by_role("region", name="KV blocks").get_by_role("img")
    assert blocks.get_attribute("aria-label").startswith("KV blocks: 0 held")


def test_step_takes_one_step_and_the_other_ten(dashboard: DashboardPage) -> None:
    dashboard.click("Step")
    dashboard.wait("+d.step === 1")
    dashboard.click("Step ×10")
    dashboard.wait("+d.step === 11")
    card = dashboard.root.get_by_role("region", name="Step inspector").inner_text()
    assert "Step 11" in card and "waits computed nothing: needs 1 seat" in card
    text = dashboard.root.get_by_role("region", name="Requests").inner_text()
    assert "waits: seats" in text


def test_the_block_map_is_drawn_and_tells_about_a_block(dashboard: DashboardPage) -> None:
    canvas = dashboard.root.locator(".nbe-map canvas")
    num_colours = canvas.evaluate(
        """(canvas) => {
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    assert num_colours > 3
    canvas.focus()
    dashboard.page.keyboard.press("ArrowRight")
    readout = dashboard.root.locator(".nbe-readout")
    readout.get_by_text("block 0: held by req-0, req-0#1; 2 references").wait_for()
    readout.get_by_text("hash ").wait_for()
    dashboard.page.keyboard.press("Enter")
    tokens = dashboard.root.get_by_role("region", name="Block", exact=True)
    tokens.get_by_text("16 tokens").wait_for()
    dashboard.page.keyboard.press("Enter")
    tokens.wait_for(state="hidden")


def test_the_cursor_scrubs_through_history_and_drives_every_view(dashboard: DashboardPage) -> None:
    slider = dashboard.root.get_by_role("slider")
    slider.focus()
    dashboard.page.keyboard.press("Home")
    dashboard.wait("+d.shown === 1")
    card = dashboard.root.get_by_role("region", name="Step inspector")
    card.get_by_text("Step 1", exact=True).wait_for()
    assert "other admitted" in card.inner_text()
    requests = dashboard.root.get_by_role("region", name="Requests")
    assert "40 + 1" in requests.inner_text() and "40 + 2" not in requests.inner_text()
    dashboard.page.keyboard.press("ArrowRight")
    dashboard.wait("+d.shown === 2")
    requests.get_by_text("40 + 2").first.wait_for()
    assert "other admitted" not in card.inner_text()
    assert dashboard.step == 11, "the engine was not touched"
    assert dashboard.kernel("engine.scheduler.step_count") == "11"
    dashboard.page.keyboard.press("Escape")
    dashboard.wait("+d.shown === 11")


def test_a_selected_request_lights_its_table(dashboard: DashboardPage) -> None:
    row = dashboard.root.get_by_role("region", name="Requests").get_by_role(
        "button", name="req-0", exact=True
    )
    row.click()
    dashboard.page.wait_for_selector(".nbe-requests tr.nbe-selected")
    assert row.get_attribute("aria-pressed") == "true"
    row.click()
    dashboard.page.wait_for_selector(".nbe-requests tr.nbe-selected", state="detached")


def test_rewind_goes_to_the_cursor_and_drops_what_came_after(dashboard: DashboardPage) -> None:
    rewind = dashboard.root.get_by_role("button", name="Rewind to cursor")
    assert rewind.is_disabled(), "the cursor is on the newest step"
    dashboard.root.get_by_role("slider").focus()
    for _ in range(3):
        dashboard.page.keyboard.press("ArrowLeft")
    dashboard.wait("+d.shown === 8")
    rewind.click()
    dashboard.wait("+d.step === 8 && +d.shown === 8")
    assert dashboard.kernel("engine.scheduler.step_count") == "8"
    assert "preempted" in dashboard.root.get_by_role("region", name="Requests").inner_text()
    dashboard.click("Step ×10")
    dashboard.wait("+d.step === 18")


def test_policy_and_budget_are_changed_while_it_runs(dashboard: DashboardPage) -> None:
    dashboard.root.get_by_role("combobox", name="Policy").select_option("sjf")
    budget = dashboard.root.get_by_role("spinbutton", name="Token budget")
    budget.fill("32")
    budget.press("Tab")
    dashboard.wait("+d.answered >= 2")
    state = "type(engine.scheduler.policy).__name__, engine.scheduler.config.max_num_batched_tokens"
    dashboard.page.wait_for_timeout(200)
    assert dashboard.kernel(state) == "('ShortestJobFirst', 32)"
    budget.fill("999999")
    budget.press("Tab")
    dashboard.root.get_by_role("alert").get_by_text("the engine was started with 2048").wait_for()
    dashboard.root.get_by_role("combobox", name="Policy").select_option("fcfs")
    dashboard.root.get_by_role("alert").wait_for(state="hidden")


def test_run_until_stops_where_it_happens(dashboard: DashboardPage) -> None:
    dashboard.root.get_by_role("combobox", name="Run until").select_option("eviction")
    dashboard.wait("d.running === 'true'")
    dashboard.click("Pause")
    dashboard.wait("d.running === 'false'")


def test_buttons_answer_while_the_engine_runs(dashboard: DashboardPage) -> None:
    dashboard.click("Run")
    dashboard.wait("d.running === 'true' && +d.step > 20")
    dashboard.click("Abort other")
    dashboard.page.wait_for_selector(".nbe-ended tr[data-key=other]")
    dashboard.click("Pause")
    dashboard.wait("d.running === 'false'")
    step = dashboard.step
    dashboard.click("Step")
    dashboard.wait(f"+d.step === {step + 1}")


def test_buttons_answer_while_a_cell_holds_the_kernel(dashboard: DashboardPage) -> None:
    if not dashboard.notebook.has_subshells:
        pytest.skip("this kernel has no subshells: messages wait for the cell")
    dashboard.notebook.start_running(BUSY)
    dashboard.page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
        " === 'busy'"
    )
    dashboard.click("Run")
    dashboard.wait("d.running === 'true'")
    dashboard.click("Pause")
    dashboard.wait("d.running === 'false'")
    assert dashboard.notebook.execution_count(BUSY) == "[*]:", "the cell still runs"
    dashboard.notebook.interrupt()


def test_a_request_is_added_from_the_keyboard(dashboard: DashboardPage) -> None:
    prompt = dashboard.root.get_by_role("textbox", name="Prompt")
    prompt.fill("tell me about blocks")
    prompt.press("Enter")
    dashboard.page.wait_for_selector('.nbe-requests [data-key="req-3"]')


def test_a_question_mark_explains_where_a_request_stands(dashboard: DashboardPage) -> None:
    dashboard.root.get_by_role("button", name="Why req-3").click()
    explanation = dashboard.root.locator(".nbe-why")
    explanation.wait_for(state="visible")
    assert "req-3" in explanation.inner_text()


def test_a_mistake_is_shown_as_an_alert(dashboard: DashboardPage) -> None:
    dashboard.click("Add")
    alert = dashboard.root.get_by_role("alert")
    alert.get_by_text("type a prompt first").wait_for()


def test_a_reloaded_page_shows_the_state_and_its_buttons_work(dashboard: DashboardPage) -> None:
    dashboard.notebook.save_and_reload()
    dashboard.page.wait_for_selector(".jp-OutputArea-output .nbe[data-step]")
    step = dashboard.step
    assert step > 20
    dashboard.click("Step")
    dashboard.wait(f"+d.step === {step + 1}")


def test_closing_the_engine_leaves_its_last_picture(dashboard: DashboardPage) -> None:
    dashboard.notebook.run(SHOW)  # a reloaded page has lost the output's display id
    dashboard.notebook.run(CLOSE)
    still = dashboard.page.locator(".jp-OutputArea-output", has_text="dashboard (closed)")
    still.wait_for()
    assert still.locator("img").count() == 1
    assert dashboard.root.count() == 0
