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
from typing import Any

import comm
import pytest

from nbengine import SamplingParams
from nbengine.errors import EngineClosed
from nbengine.jupyter import dashboard as dashboard_module
from nbengine.jupyter.dashboard import INSTALL_HINT, Dashboard
from nbengine.jupyter.frame import MAX_FINISHED, gather
from tests.jupyter.conftest import eventually
from tests.jupyter.scripted import ScriptedEngine

MakeEngine = Callable[..., ScriptedEngine]


class Page:
    """A page that draws at once (or not): it reads the widget's traits as a browser would."""

    def __init__(self, dashboard: Dashboard, *, answers: bool = True) -> None:
        self.dashboard, self.widget = dashboard, dashboard._widget
        self.seqs: list[int] = []
        self.threads: set[str] = set()
        self.answers = answers
        self.widget.observe(self._on_state, "state")
        self.send("ready")

    def _on_state(self, change: Any) -> None:
        self.threads.add(threading.current_thread().name)
        seq = json.loads(change["new"])["seq"]
        self.seqs.append(seq)
        if self.answers:
            self.send("drawn", seq=seq)

    def send(self, kind: str, **fields: Any) -> None:
        self.dashboard.receive({"type": kind, **fields})

    @property
    def state(self) -> dict[str, Any]:
        return json.loads(self.widget.state or "{}")

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


def test_a_frame_holds_queues_blocks_and_steps(make_engine: MakeEngine) -> None:
    engine = make_engine(num_gpu_blocks_override=8, max_num_seqs=2)
    engine.add_request([3] * 20, SamplingParams(max_tokens=8, n=2))
    engine.add_request([4] * 20, SamplingParams(max_tokens=8))
    engine.step(2)
    frame = gather(engine)
    state, buffers = frame.state(), frame.buffers()
    assert [s["id"] for s in state["sequences"]] == ["req-0", "req-0#1", "req-1"]
    assert [s["status"] for s in state["sequences"]] == ["running", "running", "waiting"]
    assert state["sequences"][2]["why"] == "waits: seats (1 needed, 0 left)"
    assert [step["step"] for step in state["log"]] == [2, 1]
    tables = array("I", buffers["tables"])
    lengths = [length for _, _, length, _ in state["running"]]
    assert len(tables) == sum(lengths) == 4
    assert tables[0] == tables[2], "the prompt's full block is shared"
    fills = [used for _, _, _, used in state["running"]]
    assert fills == [5, 5], "20 prompt tokens and one more: 16 + 5"


def test_everyone_behind_the_head_of_the_queue_is_told_whom_it_waits_for(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine(max_num_seqs=1)
    for _ in range(3):
        engine.add_request("a b c", SamplingParams(max_tokens=8))
    engine.step()
    reasons = [s["why"] for s in gather(engine).state()["sequences"]]
    assert reasons == ["", "waits: seats (1 needed, 0 left)", "waits behind req-1"]


def test_requests_that_ended_between_two_frames_stay_to_be_read(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c", SamplingParams(max_tokens=50), request_id="aborted")
    before = gather(engine)
    engine.abort("aborted")
    for i in range(MAX_FINISHED):
        engine.add_request("a b c", SamplingParams(max_tokens=1), request_id=f"short-{i}")
    engine.run()
    finished = gather(engine, before).state()["finished"]
    assert len(finished) == MAX_FINISHED
    assert {f["reason"] for f in finished} <= {"length", "abort"}
    again = gather(engine, gather(engine, before)).state()["finished"]
    assert again == finished


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
    assert gather(engine).tokens_per_second == pytest.approx(2 / 3)
    now += 60
    assert gather(engine).tokens_per_second == 0


def test_a_failed_run_is_kept_as_text_and_keeps_no_engine_alive(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c")
    engine.runner.error = RuntimeError("the model broke")
    engine.start()
    eventually(lambda: engine.error)
    failure = gather(engine).failure
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
    assert len(page.seqs) <= 3 + 20 * (time.monotonic() - began), "20 a second at most"
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


@pytest.mark.parametrize("message", [None, 3, [], {}, {"type": None}, {"type": "rm"}, {"type": []}])
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
        gather(engine)


# ---------------------------------------------------------------------- still forms


def test_the_bundle_carries_a_picture_beside_the_live_view(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add_request("a b c")
    engine.step()
    dashboard = engine.dashboard()
    bundle = dashboard._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == dashboard._widget.model_id
    assert "<svg" in bundle["text/html"]
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
