"""The dashboard without a page: frames, the publisher, commands, and what closing leaves."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from html.parser import HTMLParser
from random import Random
from typing import Any

import comm
import pytest

from nbengine import SamplingParams
from nbengine.errors import EngineClosed
from nbengine.jupyter import dashboard as dashboard_module
from nbengine.jupyter.block_map import BlockKind
from nbengine.jupyter.cells import ADDED, DECODE, PREFILL, ROW_NUMBERS, WAIT
from nbengine.jupyter.dashboard import INSTALL_HINT, Dashboard
from nbengine.jupyter.frame import MAX_FINISHED, Feed, gather
from tests.jupyter.scripted import ScriptedEngine
from tests.waiting import eventually

MakeEngine = Callable[..., ScriptedEngine]


class Page:
    """A page that draws at once (or not): it puts the messages together as a browser would."""

    def __init__(self, dashboard: Dashboard, *, answers: bool = True) -> None:
        self.dashboard, self.widget = dashboard, dashboard._widget
        self.seqs: list[int] = []
        self.threads: set[str] = set()
        self.num_bytes = 0
        self.answers = answers
        self.rows: dict[str, dict[str, Any]] = {}
        self.names: dict[int, str] = {}
        self.steps: dict[int, list[float]] = {}
        self.entries: dict[int, list[tuple[int, int, int]]] = {}
        self.cells = array("I")
        self.past: dict[str, Any] | None = None
        self.past_cells = array("I")
        self.state: dict[str, Any] = {}
        self.widget.send = self._on_message
        self.send("ready")

    def _on_message(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        self.threads.add(threading.current_thread().name)
        self.num_bytes += sum(map(len, buffers))
        text, *buffers = buffers
        content = json.loads(text)
        live = content["live"]
        seq = message["seq"]
        if live["is_whole"]:
            self.rows.clear()
            self.cells = array("I", buffers[2])
        else:
            assert seq == self.seqs[-1] + 1, "a difference to what was never told"
            pairs = iter(array("I", buffers[2]))
            for block, cell in zip(pairs, pairs, strict=True):
                self.cells[block] = cell
        if live["is_cut"] or live["is_fresh"]:
            self.steps.clear()
        if live["is_fresh"]:
            self.names.clear()
        parts = [live]
        rest = buffers[5:]
        self._learn_steps(*buffers[:2])
        if "steps" in content:
            parts.append(content["steps"])
            self._learn_steps(*rest[:2])
            rest = rest[2:]
        if "past" in content:
            self.past, self.past_cells = content["past"], array("I", rest[0])
            parts.append(self.past)
        for part in parts:
            self.names |= {slot: name for slot, name, _ in part["names"]}
        for row in live["rows"]:
            self.rows[row["id"]] = self.rows.get(row["id"], {}) | row
        self.seqs.append(seq)
        self.state = (
            content
            | live
            | {
                "sequences": [self.rows[name] for name in live["order"]],
                "notice": content["notice"],
                "table": list(array("I", buffers[4])),
                "tails": list(array("I", buffers[3])),
            }
        )
        if self.answers:
            self.send("drawn", seq=seq)

    def _learn_steps(self, numbers: bytes, entries: bytes) -> None:
        rows, codes = array("d", numbers), iter(array("I", entries))
        for at in range(0, len(rows), ROW_NUMBERS):
            row = rows[at : at + ROW_NUMBERS].tolist()
            self.steps[int(row[0])] = row
            if row[-1] >= 0:
                same = [(next(codes), *divmod(next(codes), 1 << 24)) for _ in range(int(row[-1]))]
            self.entries[int(row[0])] = same

    def send(self, kind: str, **fields: Any) -> None:
        self.dashboard.receive({"type": kind, **fields})

    def wait(self, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first state of which `holds` is true."""
        return eventually(lambda: (state := self.state) and holds(state) and state)


@pytest.fixture
def show() -> Any:
    """`page = show(engine)`: its dashboard on a page that draws at once."""
    return lambda engine, **options: Page(engine.dashboard(), **options)


def dashboard_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "nbengine-dashboard"]


# ---------------------------------------------------------------------- what is shown


def told(engine: ScriptedEngine, feed: Feed | None = None) -> tuple[dict[str, Any], list[bytes]]:
    feed = feed or Feed()
    return feed.message(gather(engine, feed))


def test_a_frame_holds_queues_blocks_and_steps(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=8, max_num_seqs=2)
    engine.add_request([3] * 20, SamplingParams(max_tokens=8, n=2))
    engine.add_request([4] * 20, SamplingParams(max_tokens=8))
    engine.step(2)
    content, (numbers, entries, cells, tails, _) = told(engine)
    assert content["order"] == ["req-0", "req-0#1", "req-1"]
    assert [s["status"] for s in content["rows"]] == ["running", "running", "waiting"]
    assert content["rows"][2]["why"] == "waits: seats (1 needed, 0 left)"
    assert array("d", numbers)[::ROW_NUMBERS].tolist() == [1, 2]
    held = [cell for cell in array("I", cells) if cell]
    kinds = sorted(BlockKind(cell & 3).name for cell in held)
    assert kinds == ["HELD", "HELD", "SHARED"], "the prompt's full block is shared"
    assert max(cell >> 2 & 255 for cell in held) == 2
    assert array("I", tails)[1::2].tolist() == [5, 5], "20 prompt tokens and one more: 16 + 5"
    names = {slot: name for slot, name, _ in content["names"]}
    first = list(array("I", entries))
    happened = [(names[s], c >> 24, c & 0xFFFFFF) for s, c in zip(*[iter(first)] * 2, strict=True)]
    assert happened == [
        ("req-0", ADDED, 0),
        ("req-1", ADDED, 0),
        ("req-0", PREFILL, 20),
        ("req-1", WAIT, 20),
        ("req-0", DECODE, 1),
        ("req-0#1", DECODE, 1),
        ("req-1", WAIT, 20),
    ]


def test_everyone_behind_the_head_of_the_queue_is_told_whom_it_waits_for(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(max_num_seqs=1)
    for _ in range(3):
        engine.add_request("a b c", SamplingParams(max_tokens=8))
    engine.step()
    content, _ = told(engine)
    reasons = [row["why"] for row in content["rows"]]
    assert reasons == ["", "waits: seats (1 needed, 0 left)", "waits behind req-1"]


def test_a_row_tells_the_time_to_the_first_token_and_the_speed(make_engine: MakeEngine) -> None:
    engine = make_engine()
    now = 0.0
    engine.clock = engine.scheduler.clock = lambda: now
    engine.add_request("a b c", SamplingParams(max_tokens=40))

    def half_a_second() -> None:
        nonlocal now
        now += 0.5

    engine.runner.on_compute = half_a_second
    engine.step(3)
    content, _ = told(engine)
    (row,) = content["rows"]
    assert (row["ttft"], row["speed"]) == (0.5, 2.0)
    now += 1000.0
    engine.step(21)
    content, _ = told(engine)
    assert content["rows"][0]["speed"] == 2.0, "a pause is forgotten"


def test_differences_add_up_to_the_whole(make_engine: MakeEngine) -> None:
    """After any number of steps, aborts and rewinds, a page knows what a new page is told."""
    rng = Random(0)
    engine = make_engine(num_gpu_blocks_override=24, max_num_batched_tokens=24)
    page = Page(engine.dashboard())
    page.wait(lambda state: True)
    feed = Feed()
    differences = []
    for round_ in range(60):
        for _ in range(rng.randint(0, 2)):
            prompt = [rng.randint(1, 2)] * rng.randint(1, 60)
            params = SamplingParams(max_tokens=rng.randint(1, 30), n=rng.choice([1, 1, 2]))
            engine.add_request(prompt, params)
        if engine.has_work:
            engine.step(rng.randint(1, 12))
        if rng.random() < 0.2 and engine.scheduler.live:
            engine.abort(rng.choice(list(engine.scheduler.live)))
        if rng.random() < 0.1:
            engine.rewind(max(0, engine.scheduler.step_count - rng.randint(0, 5)))
        content, buffers = told(engine, feed)
        whole, (_, _, cells, tails, _) = told(engine)
        if content["is_whole"]:
            known = array("I", buffers[2])
        else:
            differences.append(len(buffers[2]))
            pairs = iter(array("I", buffers[2]))
            for block, cell in zip(pairs, pairs, strict=True):
                known[block] = cell
        names = {slot: name for slot, name, _ in feed.slots.names()}
        fresh = {slot: name for slot, name, _ in whole["names"]}
        step = engine.scheduler.step_count
        assert [_shown(cell, names) for cell in known] == [
            _shown(cell, fresh) for cell in array("I", cells)
        ], (round_, step)
        assert buffers[3] == tails
    assert len(differences) > 25
    page.wait(lambda state: state["step"] == engine.scheduler.step_count)
    assert sorted(page.steps) == [record.step for record in engine.history]
    for record in engine.history:
        computed = {
            page.names[slot]: n for slot, code, n in page.entries[record.step] if code < WAIT
        }
        assert computed == record.scheduled, record.step
    assert page.names == {slot: name for slot, name, _ in page.dashboard._feed.slots.names()}


def _shown(cell: int, names: dict[int, str]) -> tuple[int, int, str]:
    return cell & 3, cell >> 2 & 255, names[cell >> 10] if cell & 3 == BlockKind.HELD else ""


def test_only_differences_travel(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine(num_gpu_blocks_override=16_000)
    page = show(engine)
    page.wait(lambda state: state["num_blocks"] == 16_000)
    for _ in range(20):
        engine.add_request("a b c", SamplingParams(max_tokens=100))
    engine.step()
    page.wait(lambda state: state["step"] == 1)
    before, frames = page.num_bytes, len(page.seqs)
    for _ in range(20):
        engine.step()
        page.wait(lambda state: state["step"] == engine.scheduler.step_count)
    a_frame = (page.num_bytes - before) / (len(page.seqs) - frames)
    assert a_frame < 16_000, "a quarter of what the blocks alone would take"


def test_requests_that_ended_between_two_frames_stay_to_be_read(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="aborted")
    feed = Feed()
    told(engine, feed)
    engine.abort("aborted")
    for i in range(MAX_FINISHED):
        engine.add_request("a b c", SamplingParams(max_tokens=1), request_id=f"short-{i}")
    engine.run()
    finished = told(engine, feed)[0]["finished"]
    assert len(finished) == MAX_FINISHED
    assert {f["reason"] for f in finished} <= {"length", "abort"}
    assert told(engine, feed)[0]["finished"] == finished


def test_the_cursor_shows_an_earlier_step(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine(num_gpu_blocks_override=8, max_num_seqs=2)
    for _ in range(3):
        engine.add_request([3] * 20, SamplingParams(max_tokens=12))
    states = {}
    while engine.has_work:
        record = engine.step()
        states[record.step] = engine.snapshot()
    page = show(engine)
    for step in (3, 9, 1, 5):
        page.send("cursor", step=step)
        page.wait(lambda state, step=step: state["cursor"] == step and page.past["step"] == step)
        snapshot = states[step]
        assert [row["id"] for row in page.past["rows"]] == [
            s.seq_id for s in (*snapshot.running, *snapshot.waiting)
        ]
        assert [row["num_computed"] for row in page.past["rows"]] == [
            s.num_computed_tokens for s in (*snapshot.running, *snapshot.waiting)
        ]
        assert [cell >> 2 & 255 for cell in page.past_cells] == list(snapshot.ref_counts)
        assert f"Step {step}" in page.past["record"]
    page.send("rewind", step=5)
    page.wait(lambda state: state["step"] == 5 and state["cursor"] is None)
    assert sorted(page.steps) == [1, 2, 3, 4, 5], "the future is gone"
    page.send("step", n=1)
    page.wait(lambda state: state["step"] == 6)


def test_a_rewind_says_why_nothing_runs_and_then_which_tokens_differ(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(temperature=0, max_tokens=9))
    engine.run()
    page = show(engine)
    page.send("rewind", step=5)
    notice = page.wait(lambda state: state["step"] == 5)["notice"]
    assert notice["text"].startswith("Back after step 5.")
    page.send("step", n=1)
    page.wait(lambda state: state["step"] == 6 and state["notice"] is None)
    execute = engine.runner.execute

    def other(plan: Any) -> Any:
        output = execute(plan)
        output.samples = {
            name: [token + 1 for token in ids] for name, ids in output.samples.items()
        }
        return output

    engine.runner.execute = other
    page.send("step", n=1)
    notice = page.wait(lambda state: state["step"] == 7 and state["notice"])["notice"]
    assert "req-0: output token 6, in step 7, is" in notice["text"]
    engine.runner.execute = execute
    page.send("step", n=10)
    page.wait(lambda state: state["finished"] and "req-0" in state["notice"]["text"])
    page.send("rewind", step=8)
    page.wait(lambda state: state["step"] == 8)
    page.send("step", n=10)
    page.wait(lambda state: state["finished"] and state["notice"] is None)


def test_a_cursor_beyond_the_history_is_let_go(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=5))
    engine.run()
    page = show(engine)
    page.send("cursor", step=3)
    page.wait(lambda state: state["cursor"] == 3)
    page.send("cursor", step=99)
    page.wait(lambda state: state["cursor"] is None)


def test_a_cursor_that_stays_through_a_rewind_shows_the_new_life(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="old")
    engine.step(11)
    page = show(engine)
    page.send("cursor", step=9)
    page.wait(lambda _: page.past is not None)
    assert [row["id"] for row in page.past["rows"]] == ["old"]

    def live_again() -> None:  # between two frames, so that none sees the engine at step 5
        engine.rewind(5)
        engine.abort("old")
        engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="new")
        for _ in range(9):
            engine.step()

    engine.submit(live_again).result()
    state = page.wait(lambda state: state["step"] == 14)
    assert state["cursor"] == 9
    assert [row["id"] for row in page.past["rows"]] == ["new"]


def test_a_selected_sequences_table_comes_with_every_frame(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    engine.add_request([3] * 40, SamplingParams(max_tokens=12), request_id="a")
    engine.step(2)
    page = show(engine)
    page.send("select", id="a")
    page.wait(lambda state: state["table"] == [0, 1, 2])
    engine.step(8)
    page.wait(lambda state: state["table"] == [0, 1, 2, 3])
    page.send("select", id=None)
    page.wait(lambda state: state["table"] == [])


def test_a_block_tells_its_tokens_holders_and_hash(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    engine.add_request([3] * 20, SamplingParams(max_tokens=12, n=2), request_id="a")
    engine.step(3)
    page = show(engine)
    page.send("block", block=0)
    block = page.wait(lambda state: state["block"])["block"]
    assert block["holders"] == ["a", "a#1"] and block["kind"] == "shared"
    assert block["token_ids"] == [3] * 16 and len(block["texts"]) == 16
    assert block["hash"] == engine.snapshot().contents[0].digest.hex()
    page.send("block", block=63)
    page.wait(lambda state: state["block"]["kind"] == "free")
    page.send("block", block=None)
    page.wait(lambda state: state["block"] is None)


def test_a_block_that_is_looked_at_is_told_as_it_is_now_or_at_the_cursor(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine(num_gpu_blocks_override=4)
    engine.add_request([1] * 20, SamplingParams(max_tokens=10), request_id="old")
    engine.step(2)
    page = show(engine)
    page.send("block", block=1)
    page.wait(lambda state: state["block"] and len(state["block"]["token_ids"]) == 5)
    engine.step()
    page.wait(lambda state: len(state["block"]["token_ids"]) == 6)
    engine.abort("old")
    engine.add_request([2] * 60, SamplingParams(max_tokens=4), request_id="new")
    engine.step()
    block = page.wait(lambda state: state["step"] == 4)["block"]
    assert block["holders"] == ["new"] and block["token_ids"] == [2] * 16
    assert block["step"] == 4
    page.send("cursor", step=3)
    block = page.wait(lambda state: state["cursor"] == 3)["block"]
    assert block["holders"] == ["old"] and len(block["texts"]) == 6
    assert block["step"] == 3


def test_a_new_page_is_told_only_the_names_that_it_needs(
    make_engine: MakeEngine, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbengine.jupyter.frame.MAX_STEPS", 3)
    engine = make_engine()
    page = show(engine)
    for _ in range(50):
        engine.add_request("a b c", SamplingParams(max_tokens=1))
        engine.run()
        page.wait(lambda state: state["step"] == engine.scheduler.step_count)
    assert len(page.names) == 50
    page.send("ready")
    page.wait(lambda state: len(page.names) == 3)
    page.send("steps", first=10, last=10)
    eventually(lambda: "req-9" in page.names.values())


def test_steps_from_before_the_page_was_there_come_when_asked_for(
    make_engine: MakeEngine, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbengine.jupyter.frame.MAX_STEPS", 10)
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=50))
    engine.run()
    page = show(engine)
    page.wait(lambda state: state["step"] == 50)
    assert sorted(page.steps) == list(range(41, 51))
    page.send("steps", first=1, last=20)
    eventually(lambda: set(range(11, 21)) <= page.steps.keys())


def test_tokens_a_second_are_counted_over_slow_steps_and_fall_to_nothing_when_idle(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    now = 0.0
    engine.clock = lambda: now
    engine.scheduler.clock = engine.clock
    engine.add_request("a b c", SamplingParams(max_tokens=10, n=2))

    def three_seconds() -> None:
        nonlocal now
        now += 3.0

    engine.runner.on_compute = three_seconds
    engine.run(5)
    feed = Feed()
    assert told(engine, feed)[0]["tokens_per_second"] == pytest.approx(2 / 3, abs=0.05)
    now += 60
    assert told(engine, feed)[0]["tokens_per_second"] == 0


def test_a_failed_run_is_kept_as_text_and_keeps_no_engine_alive(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c")
    engine.runner.error = RuntimeError("the model broke")
    engine.start()
    eventually(lambda: engine.error)
    failure = gather(engine, Feed()).failure
    assert failure is not None
    assert "RuntimeError: the model broke" in failure.text
    assert "Traceback" in failure.detail


# ---------------------------------------------------------------------- threads


def test_only_the_publisher_writes_to_the_widget(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    page = show(engine)
    engine.add_request("a b c", SamplingParams(max_tokens=40))
    page.send("run")
    page.wait(lambda state: state["finished"])
    assert page.threads == {"nbengine-dashboard"}


def test_a_flood_of_steps_is_shown_by_few_frames_and_ends_with_the_last_state(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine(max_model_len=1024)
    engine.runner.seconds_per_step = 0.0005
    page = show(engine)
    began = time.monotonic()
    engine.add_request("a b c", SamplingParams(max_tokens=1000))
    engine.run()
    state = page.wait(lambda state: state["step"] == 1000)
    assert state["finished"][0]["num_output"] == 1000
    assert len(page.seqs) <= 3 + 30 * (time.monotonic() - began), "30 a second at most"
    assert page.seqs == sorted(set(page.seqs))


def test_nothing_is_sent_before_the_page_has_drawn_the_last_frame(
    make_engine: MakeEngine, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbengine.jupyter.publisher.FIRST_RETRY_SECONDS", 1000.0)
    engine = make_engine()
    page = show(engine, answers=False)
    eventually(lambda: page.seqs)
    seen = len(page.seqs)
    engine.runner.seconds_per_step = 0.005
    engine.add_request("a b c", SamplingParams(max_tokens=100))
    engine.run()
    assert len(page.seqs) <= seen + 1, "at most one was under way"
    page.answers = True
    page.send("drawn", seq=page.seqs[-1])
    page.wait(lambda state: state["step"] == 100)


def test_a_lost_frame_is_made_good_after_a_while(
    make_engine: MakeEngine, show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbengine.jupyter.publisher.FIRST_RETRY_SECONDS", 0.05)
    engine = make_engine()
    page = show(engine, answers=False)
    eventually(lambda: page.seqs)
    engine.add_request("a b c")
    page.wait(lambda state: state["num_waiting"] == 1)


def test_a_page_that_connects_late_gets_the_whole_state(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    page = show(engine)
    page.wait(lambda state: state["step"] == 0)
    seen = len(page.seqs)
    page.send("ready")
    eventually(lambda: len(page.seqs) > seen)
    assert page.state["num_blocks"] == 64


# ---------------------------------------------------------------------- commands


def test_buttons_step_run_pause_abort_and_explain(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    page = show(engine)
    page.send("add", prompt="a b c", max_tokens=500, temperature=0.5, chat=False)
    page.wait(lambda state: state["num_waiting"] == 1)
    page.send("step", n=1)
    page.wait(lambda state: state["step"] == 1)
    page.send("step", n=10)
    page.wait(lambda state: state["step"] == 11)
    page.send("why", id="req-0")
    assert "req-0" in page.wait(lambda state: state["explanation"])["explanation"]
    page.send("why", id=None)
    page.wait(lambda state: not state["explanation"])
    page.send("abort", id="req-0")
    page.wait(lambda state: state["finished"])
    page.send("run")
    page.wait(lambda state: state["is_running"])
    page.send("pause")
    page.wait(lambda state: not state["is_running"])
    assert page.state["notice"] is None


def test_a_chat_request_goes_through_the_models_template(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    page = show(engine)
    page.send("add", prompt="hello", max_tokens=4, temperature=0, chat=True)
    page.wait(lambda state: state["num_waiting"] == 1)
    assert engine.output("req-0").prompt == "<user> hello <assistant>"


def test_a_message_during_a_step_returns_at_once_and_is_answered_after_it(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    page = show(engine)
    engine.add_request("a b c", SamplingParams(max_tokens=100))
    engine.runner.gate.clear()  # the step that begins now hangs
    page.send("run")
    eventually(lambda: engine.is_running)
    page.send("pause")  # returns, although the engine's thread is inside a step
    assert engine.is_running
    engine.runner.gate.set()
    page.wait(lambda state: not state["is_running"])
    assert engine.has_work


def test_others_get_their_turn_within_ten_steps(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=100), request_id="long")
    engine.runner.seconds_per_step = 0.01
    page = show(engine)
    page.send("step", n=1000)
    eventually(lambda: engine.scheduler.step_count > 1)
    page.send("abort", id="long")
    page.wait(lambda state: state["finished"])
    assert engine.scheduler.step_count < 100


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"type": "add", "prompt": "  "}, "type a prompt first"),
        ({"type": "add", "prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"type": "add", "prompt": "a", "temperature": None}, "temperature"),
        ({"type": "add", "prompt": "a " * 5000}, "5000"),
        ({"type": "step", "n": 10**9}, "n=1000000000"),
        ({"type": "step", "n": 1}, "nothing to compute"),
        ({"type": "abort", "id": "nobody"}, "nobody"),
        ({"type": "rewind", "step": 7}, "no state after step 7"),
        ({"type": "rewind", "step": None}, "must be an integer"),
        ({"type": "policy", "name": "lifo"}, "known names are fcfs"),
        ({"type": "budget", "tokens": 10**6}, "the engine was started with"),
        ({"type": "budget", "tokens": None}, "must be a positive integer"),
        ({"type": "run", "until": "never"}, "the names are preemption"),
        ({"type": "block", "block": 64}, "blocks 0 to 63"),
        ({"type": "kernels", "step": 1}, "this engine has no ops to look at"),
    ],
)
def test_a_bad_message_is_answered_with_its_error(
    make_engine: MakeEngine, show: Any, message: dict[str, Any], said: str
) -> None:
    page = show(make_engine())
    page.dashboard.receive(message)
    notice = page.wait(lambda state: state["notice"])["notice"]
    assert said in notice["text"]
    assert not notice["detail"], "a user's mistake needs no traceback"


@pytest.mark.parametrize(
    "message",
    [
        *(None, 3, [], {}, {"type": None}, {"type": "rm"}, {"type": []}, {"type": {}}),
        *({"type": "cursor", "step": "x"}, {"type": "select", "id": 3}, {"type": "steps"}),
    ],
)
def test_a_message_that_means_nothing_is_passed_over(make_engine: MakeEngine, message: Any) -> None:
    make_engine().dashboard().receive(message)


def test_the_error_of_a_background_run_is_shown_with_its_traceback(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    page = show(engine)
    engine.add_request("a b c")
    engine.runner.error = RuntimeError("the model broke")
    page.send("run")
    notice = page.wait(lambda state: state["notice"])["notice"]
    assert "the model broke" in notice["text"]
    assert "Traceback" in notice["detail"]
    assert not page.state["is_running"]
    page.send("run")  # and on it goes: the step was taken back
    page.wait(lambda state: state["notice"] is None and state["finished"])


def test_policy_and_budget_are_changed_live(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    page = show(engine)
    page.send("policy", name="sjf")
    page.wait(lambda state: state["policy"] == "ShortestJobFirst")
    page.send("budget", tokens=16)
    page.wait(lambda state: state["budget"] == 16 and state["max_budget"] == 2048)


def test_run_until_stops_there_once(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    for n in (5, 9):
        engine.add_request("a b c", SamplingParams(max_tokens=n))
    page = show(engine)
    page.send("run", until="finish")
    state = page.wait(lambda state: state["stopped"])
    assert state["step"] == 5 and not state["is_running"]
    assert "stopped at 'finish'" in state["stopped"]
    page.send("run")
    page.wait(lambda state: state["step"] == 9 and not state["stopped"])


def test_several_steps_end_at_a_breakpoint(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=50))
    engine.break_on(lambda record: record.step == 4)
    page = show(engine)
    page.send("step", n=10)
    page.wait(lambda state: state["stopped"])
    page.send("why", id="req-0")  # what was still to be done would be done before it
    page.wait(lambda state: state["explanation"])
    assert engine.scheduler.step_count == 4


# ---------------------------------------------------------------------- its life


def test_an_engine_has_one_dashboard(make_engine: MakeEngine) -> None:
    engine = make_engine()
    first = engine.dashboard()
    assert engine.dashboard() is first
    first.close()
    assert engine.dashboard() is not first


@pytest.mark.parametrize("what", ["dashboard", "engine"])
def test_closing_leaves_neither_thread_nor_comm(make_engine: MakeEngine, what: str) -> None:
    eventually(lambda: not dashboard_threads())  # those of the tests before
    comms = set(comm.get_comm_manager().comms)
    engine = make_engine()
    dashboard = engine.dashboard()
    assert len(dashboard_threads()) == 1
    assert set(comm.get_comm_manager().comms) > comms
    (dashboard if what == "dashboard" else engine).close()
    eventually(lambda: not dashboard_threads())
    assert set(comm.get_comm_manager().comms) == comms
    dashboard.close()  # again: nothing
    if what == "engine":
        with pytest.raises(EngineClosed):
            engine.dashboard()


def test_closing_on_the_engines_thread_waits_for_no_frame_that_waits_for_it(
    make_engine: MakeEngine, show: Any
) -> None:
    engine = make_engine()
    page = show(engine)
    page.wait(lambda state: state["step"] == 0)
    has_closed = threading.Event()

    def close() -> None:
        page.send("select", id=None)  # a frame is due, and asks this thread for the state
        eventually(lambda: not engine._thread._commands.empty())
        page.dashboard.close()
        has_closed.set()

    engine.submit(close)
    assert has_closed.wait(10)
    eventually(lambda: not page.dashboard._publisher.is_alive)


def test_a_widget_that_was_closed_by_others_is_replaced(make_engine: MakeEngine, show: Any) -> None:
    engine = make_engine()
    page = show(engine)
    page.widget.close()
    assert engine.dashboard() is not page.dashboard
    page.send("select", id=None)
    eventually(lambda: not page.dashboard._publisher.is_alive)


def test_a_dashboard_keeps_no_engine_alive() -> None:
    engine = ScriptedEngine(model="scripted")
    engine.add_request("a b c")
    engine.step()
    dashboard = engine.dashboard()
    Page(dashboard).wait(lambda state: state["step"] == 1)
    gone = weakref.ref(engine)
    del engine
    eventually(lambda: gc.collect() is not None and gone() is None)
    eventually(lambda: dashboard.is_closed)
    assert "req-0" in repr(dashboard), "the last picture stays"


def test_closing_an_engine_while_the_publisher_gathers_hangs_nobody(
    make_engine: MakeEngine,
) -> None:
    for _ in range(20):
        engine = make_engine()
        page = Page(engine.dashboard())
        engine.add_request("a b c", SamplingParams(max_tokens=200))
        engine.start()
        eventually(lambda page=page: page.seqs)
        engine.close()
        page.dashboard.close()


def test_a_command_that_came_too_late_is_not_waited_for(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine, "submit", lambda command: Future())
    engine.close()
    with pytest.raises(EngineClosed):
        gather(engine, Feed())


# ---------------------------------------------------------------------- still forms


def test_the_bundle_carries_a_picture_beside_the_live_view(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c")
    engine.step()
    dashboard = engine.dashboard()
    bundle = dashboard._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == dashboard._widget.model_id
    assert "data:image/svg+xml" in bundle["text/html"]
    assert "req-0" in bundle["text/html"]
    assert "req-0" in bundle["text/plain"]
    engine.close()
    eventually(lambda: dashboard.is_closed)
    closed = dashboard._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" not in closed
    assert "closed" in closed["text/plain"]


def test_without_the_notebook_extras_it_is_a_still_picture(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard_module, "_make_widget", lambda: None)
    eventually(lambda: not dashboard_threads())
    engine = make_engine()
    engine.add_request("a b c")
    text = str(Dashboard(engine))
    assert "req-0" in text
    assert INSTALL_HINT in text
    assert not dashboard_threads()


class _Tags(HTMLParser):
    """Every tag, and every attribute that runs code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += [name for name, _ in attributes if name.startswith("on")]


def test_names_and_texts_are_no_html(make_engine: MakeEngine, show: Any) -> None:
    hostile = '<x onload=alert(1)>\'" onload="alert(2)" é\u202e</td>&amp;'
    engine = make_engine(num_gpu_blocks_override=4, max_num_seqs=2)
    policy = type(hostile, (), {"dynamic": False, "rank": lambda self, sequence: 0})
    engine.set_policy(policy)
    long = hostile * (256 // len(hostile))
    for name in (hostile, long, "waits " + hostile):
        engine.add_request(hostile + " a" * 20, SamplingParams(max_tokens=20, n=1), request_id=name)
    engine.step(2)
    page = show(engine)
    page.send("select", id=hostile)
    state = page.wait(lambda state: state["step"] == 2 and state["selected"] == hostile)
    assert {row["id"] for row in state["sequences"]} == {hostile, long, "waits " + hostile}
    pictures = [
        state["record"],
        page.dashboard._still()["text/html"],
        engine.snapshot()._repr_html_(),
        engine.history._repr_html_(),
        engine._repr_html_(),
        engine.output(hostile)._repr_html_(),
    ]
    engine.runner.error = RuntimeError(hostile)
    with pytest.raises(RuntimeError):
        engine.step()
    pictures.append(page.wait(lambda state: "taken back" in state["record"])["record"])
    for html in pictures:
        found = _Tags(html)
        assert "x" not in found.tags and not found.scripts, html
        assert "alert(1)" in html, "it is shown as it is"
