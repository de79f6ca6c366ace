"""The dashboard's page alone, without Jupyter: a bare page in a real browser, and the real dashboard of
a scripted engine, whose messages the tests carry to and fro."""

from __future__ import annotations

import base64
import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbengine import SamplingParams
from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.widget import DashboardWidget
from tests.jupyter.scripted import ScriptedEngine
from tests.waiting import eventually

PICTURED = "test_two_views_of_one_page_agree"
SCRIPT = """\
async ([source, palette]) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const listeners = new Set();
  window.outbox = [];
  window.alerts = [];
  window.alert = (text) => alerts.push(text);
  window.deliver = (message, buffers) => {
    const views = buffers.map((text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
    for (const listener of [...listeners]) listener(message, views);
  };
  window.show = () => {
    const el = document.createElement("div");
    document.body.append(el);
    widget.render({
      el,
      model: {
        get: () => palette,
        send: (message) => outbox.push(message),
        on: (name, listener) => name === "msg:custom" && listeners.add(listener),
        off: (name, listener) => listeners.delete(listener),
      },
    });
  };
  show();
}"""


class Views:
    """One engine's dashboard, in one or more views of a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.engine = ScriptedEngine(model="scripted", num_gpu_blocks_override=48, max_num_seqs=3)
        self.dashboard = self.engine.dashboard()
        self._frames: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.dashboard._widget.send = lambda message, buffers: self._frames.put(
            [message, [base64.b64encode(each).decode() for each in buffers]]
        )
        page.set_content(f"<!doctype html><style>{DashboardWidget._css}</style><body>")
        page.evaluate(SCRIPT, [DashboardWidget._esm, list(PALETTE)])

    def _carry(self) -> None:
        for message in self.page.evaluate("outbox.splice(0)"):
            self.dashboard.receive(message)
        while not self._frames.empty():
            frame = self._frames.get()
            self.page.evaluate("([message, buffers]) => deliver(message, buffers)", frame)

    def wait(self, condition: str) -> None:
        """Until it is true of every view's data (`d`)."""

        self.wait_until(
            lambda: self.page.evaluate(
                "(condition) => [...document.querySelectorAll('.nbe')].every(({ dataset: d }) => "
                "d.step !== undefined && new Function('d', `return ${condition}`)(d))",
                condition,
            )
        )

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """While frames come and answers go."""

        def look() -> bool:
            self._carry()
            return holds()

        eventually(look)

    def part(self, role: str, name: str) -> Any:
        return self.page.locator(".nbe").first.get_by_role(role, name=name, exact=True)


@pytest.fixture
def views(browser: Any) -> Iterator[Views]:
    page = browser.new_page(viewport={"width": 1100, "height": 1300})
    page.set_default_timeout(10_000)
    views = Views(page)
    yield views
    views.engine.close()
    page.close()


def test_a_button_keeps_its_focus_when_the_request_above_it_ends(views: Views) -> None:
    for name in ("first", "second", "third"):
        views.engine.add_request("a b c", SamplingParams(max_tokens=20), request_id=name)
    views.engine.step()
    views.wait("+d.step === 1")
    button = views.part("button", "Why third")
    button.focus()
    views.engine.abort("first")
    views.engine.step()
    views.wait("+d.step === 2")
    assert views.part("button", "Why first").count() == 0
    assert button.evaluate("(node) => node === document.activeElement")


def test_a_step_that_is_lived_again_is_described_anew(views: Views) -> None:
    policies = [type(n, (), {"dynamic": False, "rank": lambda self, s: 0}) for n in ("One", "Two")]
    engine = views.engine
    engine.clock = lambda: 0.0  # else the two descriptions might differ in length
    engine.add_request("a b c", SamplingParams(max_tokens=20))
    engine.set_policy(policies[0])
    engine.step(4)
    views.wait("+d.step === 4")
    card = views.part("region", "Step inspector")
    assert "policy One" in card.inner_text()

    def live_again() -> None:  # between two frames
        engine.rewind(2)
        engine.set_policy(policies[1])
        engine.step()  # it is resumed
        engine.step()

    engine.submit(live_again).result()
    views.wait_until(lambda: "policy Two" in card.inner_text())


def test_names_texts_and_policies_are_shown_as_they_are(views: Views) -> None:
    hostile = "<img src=x onerror=alert(1)>'\"&amp; é"
    policy = type(hostile, (), {"dynamic": False, "rank": lambda self, sequence: 0})
    views.engine.set_policy(policy)
    views.engine.add_request(hostile, SamplingParams(max_tokens=20), request_id=hostile)
    views.engine.add_request("a", SamplingParams(max_tokens=20), request_id="<b>" * 85)
    views.engine.step(2)
    views.wait("+d.step === 2")
    views.page.locator(".nbe-name").first.click()
    views.part("button", f"Why {hostile}").click()
    views.part("slider", "Step timeline").focus()
    views.page.keyboard.press("Home")
    views.wait("+d.shown === 1 && +d.answered === 1")
    views.page.locator(".nbe-tl-plot").hover()
    views.wait("true")
    root = views.page.locator(".nbe")
    assert root.locator("img, tbody b b").count() == 0
    assert views.page.evaluate("alerts") == []
    assert root.inner_text().count(hostile) >= 3
    (selected,) = root.get_by_role("combobox", name="Policy").locator("option:checked").all()
    assert selected.inner_text() == hostile


def test_two_views_of_one_page_agree(views: Views) -> None:
    views.engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="one")
    views.engine.step(5)
    views.wait("+d.step === 5")
    views.page.evaluate("show()")
    views.wait("+d.step === 5")
    assert views.page.locator(".nbe").count() == 2
    views.part("slider", "Step timeline").focus()
    views.page.keyboard.press("Home")
    views.wait("+d.shown === 1")
    views.part("button", "Step").click()
    views.wait("+d.step === 6 && +d.shown === 1")
    views.part("slider", "Step timeline").focus()
    views.page.keyboard.press("Escape")
    views.wait("+d.shown === 6")


def test_a_lost_frame_is_asked_for_again(views: Views) -> None:
    views.engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="one")
    views.engine.step()
    views.wait("+d.step === 1")
    views.engine.step()
    eventually(lambda: not views._frames.empty())
    views._frames.get()
    views.engine.step()
    views.wait("+d.step === 3")
    text = views.part("region", "Requests").inner_text()
    assert "3 + 3" in text


def test_a_kernel_that_does_not_answer_is_said_to(views: Views) -> None:
    views.engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="one")
    views.wait("+d.step === 0")
    alert = views.page.get_by_role("alert")
    assert alert.count() == 0
    views.part("button", "Step").click()
    alert.get_by_text("No answer yet").wait_for()  # as long as no message is carried
    views.wait("+d.step === 1")
    assert alert.count() == 0


@pytest.mark.parametrize("width", [320, 366, 700])
def test_nothing_sticks_out_of_a_narrow_page(views: Views, width: int) -> None:
    name = "a-request-with-a-long-name-" * 9
    views.engine.add_request("a b c " * 20, SamplingParams(max_tokens=50), request_id=name)
    views.engine.add_request("a b c", SamplingParams(max_tokens=50, n=2))
    views.engine.step(20)
    views.page.set_viewport_size({"width": width, "height": 1300})
    views.wait("+d.step === 20")
    views.page.wait_for_timeout(100)
    views.wait("true")
    wide = views.page.evaluate(
        """() => {
          const root = document.querySelector(".nbe");
          const edge = root.getBoundingClientRect().right + 1;
          const scrolls = (node) => node.closest(".nbe-requests, .nbe-card, .nbe-map");
          const clipped = (node) => { // by something inside the edge
            for (let up = node.parentElement; up !== root; up = up.parentElement) {
              if (getComputedStyle(up).overflowX !== "visible" && up.getBoundingClientRect().right <= edge) return true;
            }
            return false;
          };
          return [...root.querySelectorAll("*")]
            .filter((node) => node.getBoundingClientRect().right > edge && !scrolls(node) && !clipped(node))
            .map((node) => node.className || node.tagName);
        }"""
    )
    assert wide == [], json.dumps(wide)


def test_a_click_shows_at_once_that_it_was_heard(views: Views) -> None:
    views.engine.add_request("a b c", SamplingParams(max_tokens=20))
    views.wait("+d.step === 0")
    views.engine.runner.gate.clear()  # a step that takes long
    bar = views.part("toolbar", "Engine controls")
    assert bar.get_attribute("aria-busy") == "false"
    views.part("button", "Step").click()
    assert bar.get_attribute("aria-busy") == "true"
    views.engine.runner.gate.set()
    views.wait("+d.step === 1")
    views.wait_until(lambda: bar.get_attribute("aria-busy") == "false")


def test_a_row_that_ends_under_the_pointer_lights_no_blocks_any_more(views: Views) -> None:
    for name in ("first", "second"):
        views.engine.add_request("a b c " * 20, SamplingParams(max_tokens=50), request_id=name)
    views.engine.step()
    views.wait("+d.step === 1")
    row = views.page.locator(".nbe-requests tbody tr")

    def picture() -> str:
        views.page.wait_for_timeout(50)  # it is drawn with the next paint
        return views.page.locator(".nbe-map canvas").evaluate("(canvas) => canvas.toDataURL()")

    dark = picture()
    row.nth(1).hover()
    assert picture() != dark, "the others' blocks are dimmed"
    views.engine.abort("second")
    views.wait_until(lambda: views.part("button", "Why second").count() == 0)
    after = picture()
    row.nth(0).hover()
    views.page.locator(".nbe-prompt").hover()
    assert picture() == after
