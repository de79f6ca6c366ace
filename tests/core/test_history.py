"""The history: bounded, addressed by step, safe to read while it grows."""

from __future__ import annotations

from collections import deque

import pytest

from nbengine.core.history import History
from nbengine.core.state import Keyframe
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


class _Dropping(deque):
    """Drops its oldest right after it was looked at, as the engine's thread may at any time."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if index == 0 and len(self) > 3:
            self.popleft()
        return found


def test_what_is_read_while_the_oldest_are_dropped_is_what_was_asked_for(bench):
    b = bench(num_blocks=100)
    history = History()
    history.keep(Keyframe(b.scheduler))
    b.add(20, max_tokens=9)
    for record in b.run():
        history.append(record)
    records = tuple(history)
    history._records = _Dropping(records)
    assert history[7] is records[6]
    history._records = _Dropping(records)
    assert history.state_at(8).step == 8
    with pytest.raises(UnknownStep):
        history[1]


def test_going_back_to_one_step_again_and_again_takes_no_more_memory(recorded):
    b = recorded(num_blocks=100)
    b.add(20, max_tokens=9)
    for _ in range(3):
        b.step()
    sizes = set()
    for _ in range(5):
        b.scheduler.rewind(b.history.state_at(2))
        b.history.cut(2)
        b.history.keep(Keyframe(b.scheduler))
        sizes.add(b.history.nbytes)
        b.step()
    assert len(sizes) == 1
    assert b.history.state_at(2).sequences["req-0"].num_computed_tokens == 0


def test_the_batch_of_a_step_is_as_it_was_computed(recorded):
    b = recorded(num_blocks=8, block_size=4)
    b.add(6, max_tokens=3)
    b.step()
    b.add(5, max_tokens=2)
    b.run()
    (first, one), (second, chunk) = b.history.batch_at(2)
    assert (first.seq_id, first.num_computed_tokens, one) == ("req-0", 6, 1)
    assert (second.seq_id, second.num_computed_tokens, chunk) == ("req-1", 0, 5)
    assert (len(first.tokens), len(second.tokens)) == (7, 5)
    assert len(first.block_table) == len(second.block_table) == 2
    ((first, one), (second, _)) = b.history.batch_at(3)
    assert [len(seq.block_table) for seq in (first, second)] == [2, 2], "both ended in this step"
    with pytest.raises(UnknownStep):
        b.history.batch_at(4)
