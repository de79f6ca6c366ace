"""The history: bounded, addressed by step, safe to read while it grows."""

from __future__ import annotations

import pytest

from nbengine.core.history import History
from nbengine.errors import UnknownStep


@pytest.fixture
def records(bench):
    b = bench(num_blocks=100)
    for _ in range(4):
        b.add(20, max_tokens=5)
    return b.run()


def test_records_are_found_by_step_and_from_the_end(records):
    history = History()
    for record in records:
        history.append(record)
    assert [history[step].step for step in (1, 3, 5, -1, -5)] == [1, 3, 5, 5, 1]
    assert [r.step for r in history] == [1, 2, 3, 4, 5]
    assert [r.step for r in reversed(history)] == [5, 4, 3, 2, 1]
    assert "steps 1 to 5" in repr(history)


@pytest.mark.parametrize("step", [-3, 0, 1, 2, 3, 6, 100])
def test_a_step_that_was_dropped_or_not_taken_is_unknown(records, step):
    history = History(max_records=2)  # keeps 4 and 5
    for record in records:
        history.append(record)
    with pytest.raises(UnknownStep, match="steps 4 to 5"):
        history[step]


def test_an_empty_history_says_so():
    assert repr(History()) == "History(empty)"
    with pytest.raises(UnknownStep, match="no step yet"):
        History()[-1]


def test_memory_is_bounded_and_the_newest_record_always_kept(records):
    history = History(max_bytes=records[0].nbytes + records[1].nbytes)
    for record in records:
        history.append(record)
        assert history.nbytes <= history.max_bytes or len(history) == 1
        assert history.nbytes == sum(r.nbytes for r in history)
    tiny = History(max_bytes=1)
    for record in records:
        tiny.append(record)
    assert [r.step for r in tiny] == [5]
