"""Timelines: valid trace events for any life, and what they tell of small ones."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from nbengine.core.history import History
from nbengine.core.lives import Life
from nbengine.core.perfetto import events_of, to_perfetto
from nbengine.core.records import Phases
from nbengine.core.sampling_params import SamplingParams
from nbengine.core.simulate import simulate
from nbengine.core.trace import Trace

REQUIRED = {
    "X": {"name", "ph", "ts", "dur", "pid", "tid"},
    "i": {"name", "ph", "ts", "pid", "tid", "s"},
    "C": {"name", "ph", "ts", "pid", "args"},
    "M": {"name", "ph", "pid", "args"},
}


def check(events):
    """What the viewers need: fields, finite times in order, and slices that nest or are apart."""
    open_until = defaultdict(list)
    last = 0.0
    for event in events:
        assert event.keys() >= REQUIRED[event["ph"]], event
        assert event["ts"] >= last, "by time"
        last = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] >= 0
            stack = open_until[event["pid"], event["tid"]]
            begin, end = nanoseconds(event["ts"]), nanoseconds(event["ts"] + event["dur"])
            while stack and stack[-1] <= begin:
                stack.pop()
            assert not stack or end <= stack[-1], f"{event} overlaps what it is not inside of"
            stack.append(end)
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())


def nanoseconds(microseconds):
    return round(microseconds * 1000)


def track(events, name):
    """(slice, milliseconds) and instants of one sequence's track."""
    (tid,) = {
        event["tid"]
        for event in events
        if event["name"] == "thread_name" and event["pid"] == 2 and event["args"]["name"] == name
    }
    own = [event for event in events if (event["pid"], event.get("tid")) == (2, tid)]
    slices = [(e["name"], e["ts"] / 1000, e["dur"] / 1000) for e in own if e["ph"] == "X"]
    return slices, [(e["name"], e["ts"] / 1000) for e in own if e["ph"] == "i"]


def timed(bench, seconds=0.01, gap=0.002):
    """Gives a bench a clock: steps of so many seconds, and a gap between them."""
    now = [5.0]
    bench.scheduler.clock = lambda: now[0]

    def step():
        plan = bench.scheduler.schedule()
        bench.scheduler.commit(bench.executor.execute(plan))
        record = bench.scheduler.seal(
            Phases(schedule=0.1 * seconds, execute=0.8 * seconds, commit=0.1 * seconds)
        )
        now[0] += seconds + gap
        return record

    bench.step = step
    return bench


def test_any_life_is_a_valid_timeline(tmp_path):
    """Steps that fail, rewinds, beams, names that are taken again; with times, and by steps."""
    kinds = set()
    for seed in range(80):
        records = []
        Life(seed, lambda _, record, records=records: records.append(record)).run()
        events = events_of(records)
        check(events)
        kinds |= {event["name"].rpartition(" ")[0] or event["name"] for event in events}
    assert kinds >= {
        *("waiting", "prefill", "recompute", "decode", "preempted", "swapped", "finished:"),
        *("KV", "sequences", "tokens a", "computes", "admitted"),
    }


def test_a_simulation_by_time_is_valid_too(tmp_path):
    trace = Trace.synthetic(30, seed=4)
    simulated = simulate(trace, num_blocks=60, step_time=(0.013, 1e-4))
    path = simulated.history.export(tmp_path / "trace.json")
    document = json.loads(path.read_text())
    check(document["traceEvents"])
    last = simulated.history[-1]
    ends = max(e["ts"] + e["dur"] for e in document["traceEvents"] if e["ph"] == "X")
    assert ends == pytest.approx(1e6 * (last.time + last.phases.total))


def test_steps_hold_their_phases(bench):
    b = timed(bench(num_blocks=100))
    b.add(20, max_tokens=2)
    steps = [
        (e["name"], e["ts"], e["dur"])
        for e in events_of(b.run())
        if e["ph"] == "X" and e["pid"] == 1
    ]
    assert steps == [
        ("step 1: 20 tokens", 0, 10_000),
        ("schedule", 0, 1000), ("execute", 1000, 8000), ("commit", 9000, 1000),
        ("step 2: 1 tokens", 12_000, 10_000),
        ("schedule", 12_000, 1000), ("execute", 13_000, 8000), ("commit", 21_000, 1000),
    ]  # fmt: skip


def test_a_step_never_reaches_into_the_next(bench):
    """The record's time is taken a moment after the phases begin to be measured."""
    b = timed(bench(num_blocks=100), gap=-1e-5)
    b.add(20, max_tokens=3)
    events = events_of(b.run())
    check(events)
    first, *_ = (e for e in events if e["ph"] == "X" and e["pid"] == 1)
    assert first["dur"] == 9990


def test_a_request_waits_computes_its_prompt_in_chunks_and_decodes(bench):
    b = bench(num_blocks=100, max_num_batched_tokens=16, max_num_seqs=1)
    b.add(4, max_tokens=2)
    b.add(40, max_tokens=3)
    slices, instants = track(events_of(b.run()), "req-1")
    assert slices == [
        ("waiting", 0, 2),
        ("prefill 16", 2, 1), ("prefill 16", 3, 1), ("prefill 8", 4, 1),
        ("decode", 5, 2),
    ]  # fmt: skip
    assert instants == [("admitted", 2), ("finished: length", 7)]


def test_preemption_and_prefix_hits_are_seen(bench):
    b = bench(num_blocks=10)
    b.add(80, max_tokens=3)
    b.add(80, max_tokens=3)
    slices, instants = track(events_of(b.run()), "req-1")
    assert slices == [
        ("prefill 80", 0, 1), ("preempted", 1, 2), ("recompute 17", 3, 1), ("decode", 4, 1),
    ]  # fmt: skip
    assert [name for name, _ in instants] == [
        "admitted",
        "preempted (recompute)",
        "resumed, 64 tokens cached",
        "finished: length",
    ]


def test_a_single_token_that_is_computed_again_is_not_decoded(bench):
    """Two prompts of 64 in 9 blocks: the second finds no fifth block, and all its 4 again."""
    b = bench(num_blocks=9)
    b.add(64, max_tokens=4)
    b.add(64, max_tokens=3)
    slices, _ = track(events_of(b.run()), "req-1")
    assert [name for name, *_ in slices] == ["prefill 64", "preempted", "recompute 1", "decode"]


def test_what_has_not_ended_is_drawn_to_the_end(bench):
    b = bench(num_blocks=100, max_num_seqs=1)
    b.add(20, max_tokens=9)
    b.add(20, max_tokens=9)
    events = events_of([b.step(), b.step()])
    assert track(events, "req-0")[0] == [("prefill 20", 0, 1), ("decode", 1, 1)]
    assert track(events, "req-1")[0] == [("waiting", 0, 2)]


def test_what_comes_back_from_host_memory_decodes_on(bench):
    b = bench(num_blocks=10, preemption_mode="swap", num_host_blocks=20)
    b.add(80, max_tokens=3)
    b.add(80, max_tokens=3)
    slices, _ = track(events_of(b.run()), "req-1")
    assert slices == [("prefill 80", 0, 1), ("swapped out", 1, 2), ("decode", 3, 2)]


def test_samples_have_tracks_of_their_own_from_where_they_split(bench):
    b = bench(num_blocks=100)
    b.add(20, params=SamplingParams(n=2, max_tokens=3))
    events = events_of(b.run())
    assert track(events, "req-0")[0] == [("prefill 20", 0, 1), ("decode", 1, 2)]
    assert track(events, "req-0#1")[0] == [("decode", 1, 2)]


def test_a_request_arrives_when_it_did_and_not_when_its_step_began(bench):
    b = timed(bench(num_blocks=100, max_num_seqs=1))
    b.add(20, max_tokens=3, arrival_time=5.0)
    records = [b.step()]
    b.add(20, max_tokens=1, arrival_time=5.007)
    (name, begin, dur), *_ = track(events_of([*records, *b.run()]), "req-1")[0]
    assert (name, begin, dur) == ("waiting", pytest.approx(7), pytest.approx(36 - 7))


def test_counters_follow_the_records(bench):
    b = bench(num_blocks=10)
    b.add(40, max_tokens=2)
    events = events_of(b.run())
    found = {(e["name"], e["ts"]): e["args"] for e in events if e["ph"] == "C"}
    assert found["KV blocks", 1000] == {"held": 3, "cached": 0, "free": 7}
    assert found["tokens a step", 0] == {"computed": 40}
    assert found["sequences", 2000] == {"running": 0, "waiting": 0}


def test_nothing_is_a_valid_timeline(tmp_path):
    path = to_perfetto([], tmp_path / "empty.json")
    check(json.loads(path.read_text())["traceEvents"])
    assert History().export(tmp_path / "too.json").read_text() == path.read_text()
