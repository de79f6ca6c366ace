"""The step timeline and the charts, alone on a bare page with made-up steps, in a real browser.

No kernel and no Jupyter: the modules are served to the page as one, as the widget joins them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.widget import DashboardWidget
from tests.browser.lab import REPOSITORY

JUPYTER = REPOSITORY / "nbengine" / "jupyter"
MODULES = (
    *("dom.js", "block_map.js", "redraw.js", "step_axis.js", "entries.js", "lanes.js"),
    *("timeline.js", "charts.js"),
)
PAGE = f"""\
<!doctype html><meta charset="utf-8">
<link rel="stylesheet" href="/timeline.css">
<style>
  body {{ margin: 0; background: #fff; color: #222; }}
  body.dark {{ background: #111; color: #eee; }}
  #host {{ width: 1000px; }}
</style>
<body><div id="host"></div><div style="height: 3000px"></div>
<script type="module">
import * as views from "/views.js";
import * as made from "/made_up_steps.js";

const palette = {json.dumps(PALETTE)};

// steps: {{"41": [[slot, code, n], ...], ...}}, or null for a row that the page lacks
function handMade(steps, fields = {{}}) {{
  const rows = new Map();
  for (const [step, entries] of Object.entries(steps)) {{
    rows.set(+step, entries && {{
      step: +step, time: step * 0.1, seconds: 0.1, phases: [0.01, 0.01, 0.07, 0.01],
      numTokens: entries.filter(([, code]) => code < 3).reduce((sum, entry) => sum + entry[2], 0), budget: 64,
      numSampled: entries.filter(([, code]) => code === 2).length, numHitTokens: 0, numLookedUp: 0,
      numHeld: 6, numCached: 3, numFree: 1, numRunning: 2, numWaiting: 1, failed: false,
      entries: Uint32Array.from(entries.flatMap(([slot, code, n]) => [slot, (code << 24) | n])),
      ...fields[step],
    }});
  }}
  const slots = new Set(Object.values(steps).flatMap((entries) => (entries ?? []).map(([slot]) => slot)));
  const names = new Map([...slots].map((slot) => [slot, {{ id: `req-${{slot}}`, request: `req-${{slot}}`, colour: slot % 16 }}]));
  const numbers = [...rows.keys()];
  return {{ steps: {{ first: numbers[0], last: numbers.at(-1), get: (step) => rows.get(step) ?? undefined, rows }}, names }};
}}

// A view and its owner, which does as it is told and writes down what that was.
function show(create, data) {{
  window.view?.destroy();
  window.calls = [];
  window.data = {{ cursor: null, selected: null, isLive: false, range: null, ...data }};
  const owner = (name, act) => (...values) => {{
    calls.push([name, ...values]);
    act?.(...values);
    view.update(window.data);
  }};
  window.view = views[create]({{
    palette,
    onCursor: owner("cursor", (step) => (window.data.cursor = step)),
    onSelect: owner("select", (id) => (window.data.selected = id)),
    onRange: owner("range"),
    onMissing: owner("missing"),
  }});
  document.querySelector("#host").replaceChildren(view.element);
  view.update(window.data);
}}
Object.assign(window, {{ palette, views, made, handMade, show, isReady: true }});
</script>
"""

# A life of three sequences in six steps; req-2 waits, and hits the prefix cache when it is admitted.
LIVES = {
    38: [[0, 1, 64]],
    39: [[0, 1, 30], [1, 1, 34]],
    40: [[0, 2, 1], [1, 1, 20], [2, 3, 40]],
    41: [[0, 1, 32], [1, 2, 1], [2, 3, 40]],
    42: [[0, 4, 96], [1, 2, 1], [2, 6, 16], [2, 1, 24]],
    43: [[1, 2, 1], [1, 5, 0], [2, 2, 1]],
}


class ViewPage:
    """A page with one view, and what a user does to it."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def show(self, data: str, create: str = "createTimeline") -> None:
        """Show the data of a JavaScript expression, and wait until it is drawn."""
        self.page.mouse.move(0, 2000)
        self.page.evaluate(
            f"document.body.className = ''; document.querySelector('#host').style.width = '1000px';"
            f"show({json.dumps(create)}, {data})"
        )
        self.settle()

    def show_lives(self, **fields: Any) -> None:
        self.show(f"{{ ...handMade({json.dumps(LIVES)}), ...{json.dumps(fields)} }}")

    def settle(self) -> None:
        """Wait for three frames: callbacks in one may ask for the next."""
        self.page.evaluate(
            "() => new Promise((done) => { let n = 3;"
            "const next = () => (n-- ? requestAnimationFrame(next) : done()); next(); })"
        )

    def update(self, script: str) -> None:
        """Change the owner's `data`, and hand it over."""
        self.page.evaluate(f"{{ {script}; view.update(window.data) }}")
        self.settle()

    @property
    def plot(self) -> Any:
        return self.page.get_by_role("slider", name="Step timeline")

    def value_text(self) -> str:
        return self.plot.get_attribute("aria-valuetext")

    def press(self, *keys: str) -> None:
        self.plot.focus()
        for key in keys:
            self.page.keyboard.press(key)
            self.settle()

    def names(self) -> list[str]:
        lines = self.page.locator(".nbe-tl-line")
        tops = lines.evaluate_all("(all) => all.map((line) => [line.offsetTop, line.innerText])")
        return [text.split()[0] for _, text in sorted(tops)]

    def values(self) -> dict[str, str]:
        """What stands on the right of each sequence."""
        lines = self.page.locator(".nbe-tl-line").evaluate_all(
            "(all) => all.map((line) => [...line.children].map((part) => part.innerText))"
        )
        return dict(lines)

    def calls(self, name: str) -> list[list[Any]]:
        """What the owner was told, and forget it."""
        found = self.page.evaluate("calls.splice(0)")
        return [values for kind, *values in found if kind == name]

    def point(self, column: float, line: float = 0) -> tuple[float, float]:
        """The middle of a column and a line, in an unzoomed timeline."""
        box = self.plot.bounding_box()
        span = int(box["width"]) // 8
        return box["x"] + (column + 0.5) * box["width"] / span, box["y"] + 18 * line + 9

    def ruler_point(self, column: float) -> tuple[float, float]:
        x, y = self.point(column)
        return x, y - 24


@pytest.fixture(scope="module")
def page(browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(10_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    serve_views(page)
    yield page
    page.close()
    assert errors == []


def serve_views(page: Any) -> None:
    """Open the bare page in a page of a browser, with the modules as `views` and `made`."""
    views = "\n".join((JUPYTER / name).read_text("utf-8") for name in MODULES)
    serve(page, "/", "text/html", PAGE)
    serve(page, "/views.js", "text/javascript", views)
    serve(page, "/timeline.css", "text/css", (JUPYTER / "timeline.css").read_text("utf-8"))
    made_up = Path(__file__).with_name("made_up_steps.js").read_text("utf-8")
    serve(page, "/made_up_steps.js", "text/javascript", made_up)
    page.goto("http://views.test/")
    page.wait_for_function("window.isReady")


def serve(page: Any, path: str, kind: str, body: str) -> None:
    def answer(route: Any) -> None:
        route.fulfill(body=body, content_type=kind)

    page.route(f"http://views.test{path}", answer)


@pytest.fixture
def view(page: Any) -> ViewPage:
    return ViewPage(page)


def test_the_widgets_files_join_into_one_module(page: Any, view: ViewPage) -> None:
    serve(page, "/joined.js", "text/javascript", DashboardWidget._esm)
    names = page.evaluate("import('/joined.js').then((module) => Object.keys(module))")
    assert {"createTimeline", "createCharts", "default"} <= set(names)


def test_before_the_first_step_it_says_so(view: ViewPage) -> None:
    view.show("{ steps: null, names: new Map() }")
    assert "No step yet" in view.page.locator(".nbe-tl-empty").inner_text()
    assert view.value_text() == "no step yet"
    view.press("ArrowLeft", "+", "Home")
    assert view.calls("cursor") == []
    view.update(f"Object.assign(window.data, handMade({json.dumps(LIVES)}))")
    assert not view.page.locator(".nbe-tl-empty").is_visible()
    assert view.plot.get_attribute("aria-valuenow") == "43"
    view.page.evaluate("view.update({ ...window.data, steps: null })")
    view.press("ArrowLeft", "+")
    assert view.names() == [] and view.value_text() == "no step yet"


def test_the_cursors_step_is_told_in_words_and_beside_each_sequence(view: ViewPage) -> None:
    view.show_lives(cursor=41)
    assert view.value_text() == "step 41: req-0 prefill 32, req-1 decode 1, req-2 waits"
    bounds = [view.plot.get_attribute(f"aria-value{name}") for name in ("min", "now", "max")]
    assert bounds == ["38", "41", "43"]
    assert view.values() == {"req-0": "prefill 32", "req-1": "decode", "req-2": "waits"}
    summary = view.page.locator(".nbe-tl-summary").inner_text()
    assert summary == "step 41 · 33 of 64 tokens · 100 ms"


def test_several_entries_of_a_sequence_are_told_together(view: ViewPage) -> None:
    view.show_lives(cursor=42)
    assert view.value_text() == (
        "step 42: req-0 preempted, 96 tokens lost, req-1 decode 1, "
        "req-2 prefix hit 16 and prefill 24"
    )
    assert view.values()["req-2"] == "prefill 24", "what was computed, not what was found"


def test_of_many_sequences_eight_are_told_the_selected_one_first(view: ViewPage) -> None:
    step = {7: [[slot, 2, 1] for slot in range(20)]}
    view.show(f"{{ ...handMade({json.dumps(step)}), selected: 'req-13' }}")
    text = view.value_text()
    assert text.startswith("step 7: req-13 decode 1, req-0 decode 1, ")
    assert text.endswith("req-6 decode 1, and 12 more")


def test_sequences_in_view_stand_in_the_order_of_their_first_step(view: ViewPage) -> None:
    view.show(
        "handMade(Object.fromEntries(Array.from({ length: 300 }, (_, step) =>"
        "[step, step < 10 ? [[5, 2, 1]] : step < 250 ? [[9, 2, 1]] : [[3, 2, 1], [9, 2, 1]]])))"
    )
    assert view.names() == ["req-9", "req-3"], "req-5 ended before the steps in view"
    view.press("Home")
    assert view.names() == ["req-5", "req-9"]


def test_arrow_keys_move_the_cursor_and_its_end_follows_the_newest(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 60 })")
    view.press("ArrowLeft", "Shift+ArrowLeft", "ArrowRight", "PageDown", "PageUp", "PageUp", "Home")
    assert view.calls("cursor") == [[58], [48], [49], [59], [49], [39], [0]]
    view.press("ArrowLeft")
    assert view.calls("cursor") == [[0]], "there is nothing before the first step"
    view.press("End", "ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "Escape")
    assert view.calls("cursor") == [[None], [58], [59], [None], [58], [None]]


def test_keys_with_a_modifier_are_left_to_the_page(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 60 })")
    view.press("Control+ArrowLeft", "Alt+ArrowLeft", "x")
    assert view.calls("cursor") == []


def test_up_and_down_select_a_sequence_and_its_name_does_too(view: ViewPage) -> None:
    view.show_lives()
    view.press("ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp")
    assert view.calls("select") == [["req-0"], ["req-1"], ["req-0"]]
    button = view.page.get_by_role("button", name="req-2")
    button.click()
    view.settle()
    assert button.get_attribute("aria-pressed") == "true"
    assert view.page.get_by_role("button", name="req-0").get_attribute("aria-pressed") == "false"
    button.click()
    assert view.calls("select") == [["req-2"], [None]]


def test_a_click_moves_the_cursor_to_the_column_under_it(view: ViewPage) -> None:
    view.show_lives()
    view.page.mouse.click(*view.point(column=2))
    view.settle()
    assert view.calls("cursor") == [[40]]
    view.page.mouse.click(*view.point(column=20))
    view.settle()
    assert view.calls("cursor") == [[None]], "past the newest step is the newest, whichever it is"


def test_dragging_tells_of_one_step_a_frame_and_goes_on_outside(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 90 })")
    view.page.mouse.move(*view.point(column=10))
    view.page.mouse.down()
    view.settle()
    assert view.calls("cursor") == [[10]]
    x, y = view.point(column=20)
    view.page.evaluate(
        """([x, y]) => {
          const plot = document.querySelector(".nbe-tl-plot");
          for (let i = 0; i < 40; i++) {
            plot.dispatchEvent(new PointerEvent("pointermove", { clientX: x + 8 * i, clientY: y, bubbles: true }));
          }
        }""",
        [x, y],
    )
    view.settle()
    assert view.calls("cursor") == [[59]], "the last of forty"
    view.page.mouse.move(0, y + 400)
    view.settle()
    assert view.calls("cursor") == [[0]]
    view.page.mouse.up()
    view.page.mouse.move(*view.point(column=30))
    view.settle()
    assert view.calls("cursor") == []


def test_a_cursor_of_the_past_holds_the_view_while_steps_go_on(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 400 })")
    view.press("ArrowLeft")
    ((held_from, held_to),) = view.calls("range")
    more = "window.data.steps = made.makeSteps({ numSteps: 450 }).steps"
    view.update(more)
    assert view.calls("range") == [], "the charts are to stay where they are"
    view.page.get_by_role("button", name="Live").click()
    view.settle()
    assert view.plot.get_attribute("aria-valuenow") == "449"
    calls = view.page.evaluate("calls.splice(0)")
    assert ["cursor", None] in calls and ["range", None, None] in calls
    assert held_to == 399 and held_to - held_from == 98


def test_a_click_holds_the_columns_that_were_drawn_when_it_came(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 400 })")
    x, y = view.point(column=50)
    view.page.evaluate(
        """([x, y]) => {
          window.data.steps = made.makeSteps({ numSteps: 450 }).steps;
          view.update(window.data); // and no frame yet
          const plot = document.querySelector(".nbe-tl-plot");
          plot.setPointerCapture = () => {}; // there is no such pointer
          plot.dispatchEvent(new PointerEvent("pointerdown", { clientX: x, clientY: y, button: 0 }));
          plot.dispatchEvent(new PointerEvent("pointerup"));
        }""",
        [x, y],
    )
    view.settle()
    calls = view.page.evaluate("calls.splice(0)")
    assert ["cursor", 301 + 50] in calls and ["range", 301, 399] in calls


def test_an_owner_that_is_behind_does_not_pull_the_cursor_out_of_the_hand(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 90 })")
    view.page.mouse.move(*view.point(column=10))
    view.page.mouse.down()
    view.settle()
    view.update("window.data.cursor = 3")
    assert view.plot.get_attribute("aria-valuenow") == "10"
    view.page.mouse.up()
    view.update("")
    assert view.plot.get_attribute("aria-valuenow") == "3"


def test_live_is_pressed_while_the_newest_step_is_followed(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 400 })")
    live = view.page.get_by_role("button", name="Live")
    assert live.get_attribute("aria-pressed") == "true"
    view.update("window.data.cursor = 300")
    assert live.get_attribute("aria-pressed") == "false"
    view.update("window.data.cursor = null")
    assert live.get_attribute("aria-pressed") == "true"


def test_a_cursor_from_outside_is_brought_into_view(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 1000 })")
    view.update("window.data.cursor = 100")
    ((first, last),) = view.calls("range")
    assert first <= 100 <= last
    assert view.page.locator(".nbe-tl-chip").inner_text() == "100"


def test_the_ruler_selects_a_range_and_escape_or_a_double_click_leaves_it(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 90 })")
    for leave in ("escape", "double click"):
        view.page.mouse.move(*view.ruler_point(column=20))
        view.page.mouse.down()
        view.page.mouse.move(*view.ruler_point(column=39), steps=3)
        view.settle()
        brush = view.page.locator(".nbe-tl-brush").bounding_box()
        assert abs(brush["x"] - view.ruler_point(column=20)[0]) <= 1
        assert abs(brush["width"] - 19 * 8) <= 1
        view.page.mouse.up()
        view.settle()
        assert view.calls("range") == [[20, 39]]
        if leave == "escape":
            view.press("Escape")
        else:
            view.page.mouse.dblclick(*view.point(column=50))
            view.settle()
        assert view.calls("range")[-1] == [None, None]
        assert view.page.evaluate("window.data.cursor") is None


def test_a_brush_is_given_up_with_escape_and_a_click_on_the_ruler_moves_the_cursor(
    view: ViewPage,
) -> None:
    view.show("made.makeSteps({ numSteps: 90 })")
    view.plot.focus()
    view.page.mouse.move(*view.ruler_point(column=20))
    view.page.mouse.down()
    view.page.mouse.move(*view.ruler_point(column=39), steps=3)
    view.page.keyboard.press("Escape")
    view.page.mouse.up()
    view.settle()
    assert view.calls("range") == []
    view.page.mouse.click(*view.ruler_point(column=30))
    view.settle()
    assert view.calls("cursor")[-1] == [30]


def test_plus_and_minus_zoom_around_the_cursor(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 1000 })")
    view.update("window.data.cursor = 500")
    ((first, last),) = view.calls("range")
    view.press("+")
    ((nearer_first, nearer_last),) = view.calls("range")
    assert first < nearer_first <= 500 <= nearer_last < last
    view.press(*["-"] * 10)
    assert view.calls("range")[-1] == [0, 999], "no farther than all steps"
    view.press(*["+"] * 20)
    first, last = view.calls("range")[-1]
    assert last - first + 1 == 8 and first <= 500 <= last


def test_keys_faster_than_frames_zoom_as_slow_ones_do(view: ViewPage) -> None:
    ranges = []
    for is_fast in (False, True):
        view.show("made.makeSteps({ numSteps: 1000 })")
        if is_fast:
            view.page.evaluate(
                """for (const key of "++-") {
                  document.querySelector(".nbe-tl-plot").dispatchEvent(new KeyboardEvent("keydown", { key }));
                }"""
            )
            view.settle()
        else:
            view.press("+", "+", "-")
        ranges.append(view.calls("range")[-1])
    assert ranges[0] == ranges[1]


def wheel(view: ViewPage, column: float, **event: Any) -> bool:
    """Turn the wheel over a column; whether the page may not scroll for it."""
    x, y = view.point(column)
    taken = view.page.evaluate(
        """([x, y, event]) => !document.querySelector(".nbe-tl-plot").dispatchEvent(
          new WheelEvent("wheel", { clientX: x, clientY: y, bubbles: true, cancelable: true, ...event }))""",
        [x, y, event],
    )
    view.settle()
    return bool(taken)


def test_the_wheel_is_the_pages_until_one_has_zoomed(view: ViewPage) -> None:
    view.show(
        "handMade(Object.fromEntries(Array.from({ length: 500 }, (_, step) => [step, [[0, 2, 1]]])))"
    )
    assert not wheel(view, 50, deltaY=-40)
    assert view.calls("range") == []
    assert wheel(view, 50, deltaX=-40), "sideways no page scrolls"
    view.press("Escape")
    view.calls("range")
    assert wheel(view, 50, deltaY=-100, ctrlKey=True)
    ((first, last),) = view.calls("range")
    span = last - first + 1
    assert span == round(99 * 2.718281828**-0.4)
    assert first < 401 + 50 < last, "the column under the pointer stays"
    assert wheel(view, 50, deltaY=-140)
    ((panned, _),) = view.calls("range")
    assert panned < first
    view.press("Home")
    assert not wheel(view, 50, deltaY=-140), "at the first step there is nowhere to pan to"


def test_the_wheel_scrolls_lines_where_they_do_not_all_fit(view: ViewPage) -> None:
    view.show("made.makeFullSteps({ numSteps: 500, numSequences: 30 })")
    assert wheel(view, 50, deltaY=-100, ctrlKey=True)
    view.calls("range")
    assert not wheel(view, 50, deltaY=-140)
    assert view.calls("range") == []


def test_steps_that_the_page_lacks_are_asked_for_once_until_they_come(view: ViewPage) -> None:
    lives = {step: None if step in (3, 4, 5) else [[0, 2, 1]] for step in range(20)}
    view.show(f"handMade({json.dumps(lives)})")
    assert view.calls("missing") == [[3, 5]]
    view.update("")
    view.press("ArrowLeft")
    assert view.calls("missing") == []
    view.update("window.data.cursor = 4")
    assert view.value_text() == "step 4: not on this page yet"
    view.update("window.data.steps.rows.set(4, window.data.steps.get(2))")
    assert view.value_text() == "step 4: req-0 decode 1"
    assert view.calls("missing") == []
    view.update("window.data.steps.rows.delete(4)")
    assert view.calls("missing") == [[4, 4]], "it came, and went"


def test_missing_steps_are_asked_for_again_when_they_come_back_into_view(view: ViewPage) -> None:
    view.show(
        "handMade(Object.fromEntries(Array.from({ length: 800 }, (_, step) =>"
        "[step, step >= 790 && step < 795 ? null : [[0, 2, 1]]])))"
    )
    assert view.calls("missing") == [[790, 794]]
    view.press("Home", "End")
    assert view.calls("missing") == [[790, 794]]


def test_a_rewound_step_shows_what_was_done_the_second_time(view: ViewPage) -> None:
    view.show_lives()
    assert view.names() == ["req-0", "req-1", "req-2"]
    view.update(
        "window.data.steps = { ...window.data.steps, last: 39 };"
        "window.data.steps.rows.set(39, { ...window.data.steps.get(39), entries: Uint32Array.of(0, (2 << 24) | 1) })"
    )
    assert view.names() == ["req-0"]
    assert view.value_text() == "step 39: req-0 decode 1"


def test_a_tip_tells_what_a_sequence_did_in_the_step_under_the_pointer(view: ViewPage) -> None:
    view.show_lives()
    view.page.mouse.move(*view.point(column=4, line=2))
    view.settle()
    tip = view.page.get_by_role("tooltip")
    text = tip.inner_text()
    assert "step 42 25 of 64 tokens · 100 ms" in text
    assert "req-2 16 tokens from the prefix cache, prefill of 24 tokens" in text
    assert "schedule 10.0 · prepare 10.0 · execute 70.0 · commit 10.0 ms" in text
    view.page.mouse.move(*view.point(column=0, line=2))
    view.settle()
    assert "req-2 nothing" in tip.inner_text()
    view.page.mouse.move(*view.point(column=40, line=2))
    view.settle()
    assert not tip.is_visible(), "no step is there yet"


def test_where_steps_are_narrower_than_pixels_the_tip_sums_them_up(view: ViewPage) -> None:
    view.show("made.makeFullSteps({ numSteps: 8000, numSequences: 3 })")
    view.press(*["-"] * 12)
    assert view.calls("range")[-1] == [0, 7999]
    x, y = view.point(column=0)
    view.page.mouse.move(x, y)
    view.settle()
    text = view.page.get_by_role("tooltip").inner_text()
    assert text.startswith("steps 4") and " to " in text
    assert "decode of " in text


def test_a_failed_step_is_told_of(view: ViewPage) -> None:
    view.show(f"handMade({json.dumps(LIVES)}, {{ 43: {{ failed: true }} }})")
    assert view.value_text().startswith("step 43, taken back: ")
    assert "taken back" in view.page.locator(".nbe-tl-summary").inner_text()


def test_of_five_hundred_sequences_only_those_in_sight_have_nodes(view: ViewPage) -> None:
    view.show("made.makeFullSteps({ numSteps: 20, numSequences: 500 })")
    lines = view.page.locator(".nbe-tl-line")
    assert 18 <= lines.count() < 50
    view.page.locator(".nbe-tl-scroller").evaluate("(node) => (node.scrollTop = 450 * 18)")
    view.settle()
    assert "req-455" in view.names() and "req-0" not in view.names()
    assert lines.count() < 50
    view.page.get_by_role("button", name="req-455").click()
    view.press("ArrowDown")
    assert view.calls("select") == [["req-455"], ["req-456"]]


def test_lines_scroll_with_the_running_sequences_until_the_user_scrolls(view: ViewPage) -> None:
    steps = "handMade({ 0: [...Array(100).keys()].map((slot) => [slot, slot === %d ? 2 : 3, 1]) })"
    view.show(steps % 70)
    assert "req-70" in view.names() and "req-0" not in view.names()
    view.page.locator(".nbe-tl-scroller").evaluate("(node) => (node.scrollTop = 0)")
    view.settle()
    view.update(f"Object.assign(window.data, {steps % 90})")
    assert "req-0" in view.names()
    view.page.get_by_role("button", name="Live").click()
    view.settle()
    assert "req-90" in view.names()


COLOURS = """(canvas) => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(data.buffer)).size;
}"""


def test_something_is_drawn_and_drawn_anew_in_another_theme(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 200, rate: 0.13 })")
    assert view.plot.evaluate(COLOURS) > 8
    ruler = view.page.locator(".nbe-tl-ruler")
    before = ruler.evaluate("(canvas) => canvas.toDataURL()")
    view.page.evaluate("document.body.className = 'dark'")
    view.page.wait_for_function(
        "(before) => document.querySelector('.nbe-tl-ruler').toDataURL() !== before", arg=before
    )


def test_it_fits_its_container_and_the_screens_pixels(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 200 })")
    assert view.plot.bounding_box()["width"] == 1000 - 104 - 104
    view.page.evaluate("document.querySelector('#host').style.width = '500px'")
    view.settle()
    assert view.plot.bounding_box()["width"] == 500 - 72 - 90
    assert view.plot.evaluate(
        "(canvas) => canvas.width / canvas.clientWidth"
    ) == view.page.evaluate("devicePixelRatio")


@pytest.mark.parametrize("create", ["createTimeline", "createCharts"])
@pytest.mark.parametrize("is_pending", [False, True])
def test_a_destroyed_view_draws_no_more(view: ViewPage, create: str, is_pending: bool) -> None:
    view.show("made.makeSteps({ numSteps: 200 })", create)
    result = view.page.evaluate(
        """async (isPending) => {
          const { element } = window.view;
          const plot = element.querySelector(".nbe-tl-plot, .nbe-ch-plot");
          const html = element.innerHTML;
          if (isPending) window.view.update({ ...window.data, cursor: 5 });
          window.view.destroy();
          const isGone = !element.isConnected;
          document.querySelector("#host").append(element);
          let numFrames = 0;
          const real = window.requestAnimationFrame;
          window.requestAnimationFrame = (act) => ((numFrames += 1), real(act));
          plot.dispatchEvent(new PointerEvent("pointermove", { clientX: 300, clientY: 50 }));
          plot.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
          document.body.className = "dark";
          document.querySelector("#host").style.width = "700px";
          await new Promise((done) => setTimeout(done, 100));
          window.requestAnimationFrame = real;
          element.remove();
          return { isGone, numFrames, isSame: element.innerHTML === html };
        }""",
        is_pending,
    )
    assert result == {"isGone": True, "numFrames": 0, "isSame": True}
    assert view.calls("cursor") == []


# ---------------------------------------------------------------- charts


def labels(view: ViewPage) -> dict[str, str]:
    """What a screen reader hears of each chart, by its title."""
    charts = view.page.get_by_role("img").evaluate_all(
        "(all) => all.map((canvas) => canvas.getAttribute('aria-label'))"
    )
    return {label.partition(" at ")[0].partition(":")[0]: label for label in charts}


def rows(**steps: dict[str, Any]) -> str:
    """Steps of 0.1 s each, with fields of some set: `s1={"numSampled": 2}`."""
    given = {int(name[1:]): fields for name, fields in steps.items()}
    empty: dict[int, list[Any]] = {step: [] for step in range(max(given) + 1)}
    return f"handMade({json.dumps(empty)}, {json.dumps(given)})"


def test_charts_without_steps_say_so(view: ViewPage) -> None:
    view.show("{ steps: null, names: new Map() }", "createCharts")
    assert labels(view)["Output"] == "Output: no step yet"
    assert view.page.locator(".nbe-ch-values").first.inner_text() == "–"


def test_charts_tell_the_values_at_the_cursor(view: ViewPage) -> None:
    at_two = {"numHeld": 12, "numCached": 5, "numFree": 3, "numRunning": 4, "numWaiting": 7}
    view.show(f"{{ ...{rows(s2=at_two, s3={})}, cursor: 2 }}", "createCharts")
    found = labels(view)
    assert found["KV blocks"] == "KV blocks at step 2: 60% held, 25% cached, 15% free"
    assert found["Queues"] == "Queues at step 2: 4 running, 7 waiting"
    assert found["Prefix hits"] == "Prefix hits at step 2: of tokens looked up unknown"
    view.update("window.data.cursor = null")
    assert labels(view)["Queues"] == "Queues at step 3: 2 running, 1 waiting"


def figures(view: ViewPage, data: str, name: str, first: int, last: int) -> list[float | None]:
    values = view.page.evaluate(
        f"[...views.stepFigures(({data}).steps, {first}, {last}).{name}]"
        ".map((value) => (Number.isNaN(value) ? null : +value.toFixed(6)))"
    )
    return list(values)


def test_a_rate_is_of_the_tokens_of_half_a_second(view: ViewPage) -> None:
    eighths = {
        f"s{step}": {"numSampled": 2 if step < 4 else 6, "time": step / 8, "seconds": 1 / 8}
        for step in range(8)
    }
    data = rows(**eighths)
    # Four steps are half a second: 2 tokens in each of the first four, then 6 in place of 2.
    assert figures(view, data, "output", 0, 7) == [16, 16, 16, 16, 24, 32, 40, 48]
    assert figures(view, data, "output", 6, 7) == [40, 48], "steps before those in view count"


def test_a_pause_missing_rows_and_a_clock_that_went_back_are_no_part_of_a_rate(
    view: ViewPage,
) -> None:
    paused = rows(
        s0={"numSampled": 2}, s1={"numSampled": 3, "time": 60.0}, s2={"numSampled": 5, "time": 60.1}
    )
    assert figures(view, paused, "output", 0, 2) == [20, 30, 40]
    lacking = {0: [[0, 2, 1]], 1: None, 2: [[0, 2, 1], [1, 2, 1]]}
    assert figures(view, f"handMade({json.dumps(lacking)})", "output", 0, 2) == [10, None, 20]
    back = rows(s0={"numSampled": 2, "time": 9.0}, s1={"numSampled": 3, "time": 1.0})
    assert figures(view, back, "output", 0, 1) == [20, 30]


def test_prefill_counts_what_was_computed_and_not_what_was_found(view: ViewPage) -> None:
    steps = {0: [[0, 6, 16], [0, 1, 40], [1, 2, 1], [2, 3, 99]], 1: [[0, 1, 20], [1, 2, 1]]}
    assert figures(view, f"handMade({json.dumps(steps)})", "prefill", 0, 1) == [400, 300]


def test_a_hit_rate_is_of_the_lookups_of_the_last_steps(view: ViewPage) -> None:
    data = rows(
        s0={"numHitTokens": 30, "numLookedUp": 60},
        s2={"numHitTokens": 0, "numLookedUp": 60},
        s129={"numHitTokens": 0, "numLookedUp": 0},
        s140={},
    )
    assert figures(view, data, "hitRate", 0, 2) == [0.5, 0.5, 0.25]
    # 128 steps: step 128 no more knows step 0, and step 130 knows none.
    assert figures(view, data, "hitRate", 127, 130) == [0.25, 0, 0, None]


def test_a_click_in_a_chart_moves_the_cursor_and_the_pointer_reads_values_off(
    view: ViewPage,
) -> None:
    counts = {f"s{step}": {"numRunning": step, "numWaiting": 0} for step in range(30)}
    view.show(rows(**counts), "createCharts")
    box = view.page.locator(".nbe-ch-plot").last.bounding_box()
    column = box["width"] / (int(box["width"]) // 8)
    view.page.mouse.move(box["x"] + 12.5 * column, box["y"] + 10)
    view.settle()
    assert labels(view)["Queues"] == "Queues at step 12: 12 running, 0 waiting"
    assert view.page.locator(".nbe-ch-chip").inner_text() == "step 12"
    view.page.mouse.down()
    view.settle()
    view.page.mouse.move(box["x"] + 80 * column, box["y"] + 10)
    view.page.mouse.up()
    view.settle()
    assert view.calls("cursor") == [[12], [None]]
    view.page.mouse.move(box["x"] - 50, box["y"] + 10)
    view.settle()
    assert labels(view)["Queues"] == "Queues at step 29: 29 running, 0 waiting"


def test_charts_show_the_timelines_range_with_the_cursor_on_the_same_pixel(view: ViewPage) -> None:
    def cursor_centre(mark: str) -> float:
        box = view.page.locator(mark).bounding_box()
        return float(box["x"] + box["width"] / 2)

    data = "{ ...made.makeSteps({ numSteps: 300 }), cursor: 250 }"
    for zoomed in (False, True):
        view.show(data)
        if zoomed:
            view.press("+", "+")
        first, last = view.calls("range")[-1]
        timeline = cursor_centre(".nbe-tl-cursor")
        view.show(f"{{ ...{data}, range: [{first}, {last}] }}", "createCharts")
        assert view.calls("missing") == []
        assert abs(cursor_centre(".nbe-ch-cursor") - timeline) <= 0.5


def test_charts_ask_for_rows_that_the_page_lacks(view: ViewPage) -> None:
    lives = {step: None if step in (3, 4) else [[0, 2, 1]] for step in range(20)}
    view.show(f"handMade({json.dumps(lives)})", "createCharts")
    view.update("")
    assert view.calls("missing") == [[3, 4]]


def test_charts_are_drawn_and_drawn_anew_in_another_theme(view: ViewPage) -> None:
    view.show("made.makeSteps({ numSteps: 200, rate: 0.13 })", "createCharts")
    for canvas in view.page.locator(".nbe-ch-plot").all():
        assert canvas.evaluate(COLOURS) > 4
    plot = view.page.locator(".nbe-ch-plot").first
    before = plot.evaluate("(canvas) => canvas.toDataURL()")
    view.page.evaluate("document.body.className = 'dark'")
    view.page.wait_for_function(
        "(before) => document.querySelector('.nbe-ch-plot').toDataURL() !== before", arg=before
    )
