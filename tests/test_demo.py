"""The demo's play over the real scheduler with no model behind it: everybody finishes, and what it
promises to show does happen. Its picture fits every terminal."""

from __future__ import annotations

import io
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import Request, Sequence
from nbengine.core.scheduler import Scheduler, SchedulerConfig
from nbengine.core.snapshot import Snapshot
from nbengine.core.state import State
from nbengine.demo import ENGINE, PLAN, Frame, play, summary, tell, times_to_first_token, watch
from nbengine.terminal_view import block_map, colours_of, decisions, picture, wrapped
from tests.core.conftest import FakeExecutor

SECONDS_A_STEP = 0.01


class WordTokenizer:
    """Four tokens for three words, about as many as a real vocabulary makes of English."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(f"<start> {m['role']} {m['content']} <end>" for m in messages)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = []
        for i, word in enumerate(text.split()):
            ids += [zlib.crc32(word.encode()) % 40_000] * (2 if i % 3 == 0 else 1)
        return ids


class ModellessEngine:
    """What the demo needs of an engine; each token's text is one word."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=ENGINE["num_gpu_blocks_override"],
                max_num_batched_tokens=ENGINE["max_num_batched_tokens"],
                max_num_seqs=ENGINE["max_num_seqs"],
            )
        )
        self.executor = FakeExecutor()
        self.sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add_request(self, prompt: Any, params: Any, request_id: str) -> str:
        ids = tuple(prompt["prompt_token_ids"])
        live = self.scheduler.add(
            Request(
                request_id,
                ids,
                params,
                arrival=len(self.sequences),
                max_total_tokens=len(ids) + params.max_tokens,
            )
        )
        (self.sequences[request_id],) = live.sequences
        return request_id

    def step(self) -> StepRecord:
        self.scheduler.commit(self.executor.execute(self.scheduler.schedule()))
        return self.scheduler.seal(Phases(execute=SECONDS_A_STEP))

    def text(self, sequence: Sequence) -> str:
        return " ".join(f"word{token}" for token in sequence.output_token_ids)

    def snapshot(self) -> Snapshot:
        return State.of(self.scheduler).snapshot(self.text)

    def output(self, request_id: str) -> Any:
        sequence = self.sequences[request_id]
        answer = SimpleNamespace(text=self.text(sequence), token_ids=sequence.output_token_ids)
        return SimpleNamespace(outputs=[answer])


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    llm = SimpleNamespace(engine=ModellessEngine(), get_tokenizer=WordTokenizer)
    return [
        Frame(frame.conversations, frame.snapshot, list(frame.records))
        for frame in play(llm, PLAN)  # type: ignore[arg-type]
    ]


def drawn(renderable: Any, columns: int, rows: int, **options: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=columns, height=rows, **options)
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_every_conversation_gets_all_its_tokens(frames: list[Frame]) -> None:
    last = frames[-1].conversations
    assert [c.name for c in last] == [p.name for p in PLAN]
    assert {c.state for c in last} == {"length"}
    assert [c.num_output_tokens for c in last] == [p.max_tokens for p in PLAN]
    assert all(len(c.text.split()) == c.num_output_tokens for c in last)


def test_the_run_shows_what_the_demo_promises(frames: list[Frame]) -> None:
    records = frames[-1].records
    hits = {a.seq_id: a.prefix.num_hit_tokens for r in records for a in r.admitted if not a.resumed}
    assert hits["C"] >= 128
    assert hits["G"] >= 128
    assert [r for r in records if r.preempted]
    assert [r for r in records if 1 < r.scheduled.get("D", 0) < r.num_tokens]  # a chunk and others
    told = "\n".join(summary(records))
    for word in ("prefix cache", "chunked prefill", "preemption", "first token"):
        assert word in told


def test_time_to_first_token_counts_the_steps_from_arrival_to_first_token(
    frames: list[Frame],
) -> None:
    records = frames[-1].records
    times = times_to_first_token(records)
    for name, seconds in times.items():
        arrived = next(r.step for r in records if name in [q.request_id for q in r.added])
        sampled = next(r.step for r in records if name in r.sampled)
        assert seconds == pytest.approx((sampled - arrived + 1) * SECONDS_A_STEP)
    assert len(times) == len(PLAN)


@pytest.mark.parametrize("size", [(200, 60), (120, 40), (80, 24), (72, 20), (40, 10)])
def test_picture_fits_the_terminal(frames: list[Frame], size: tuple[int, int]) -> None:
    for frame in frames[::7]:
        lines = drawn(
            picture("title", frame.conversations, frame.snapshot, frame.records, size), *size
        )
        assert len(lines) <= size[1]
        assert max(map(len, lines)) <= size[0]


def test_blocks_are_told_apart_without_colour(frames: list[Frame]) -> None:
    seen = set()
    for frame in frames:
        snapshot = frame.snapshot
        cells, _, _ = block_map(snapshot, colours_of(frame.conversations), 32).plain.partition(
            "\n\n"
        )
        marks = cells.split()
        seen |= set(marks)
        assert len(marks) == snapshot.num_blocks
        assert marks.count(".") == snapshot.num_free_blocks
        assert marks.count("+") == len(snapshot.cached_blocks)
        for block, names in snapshot.holders().items():
            assert marks[block] == (names[0] if len(names) == 1 else str(len(names)))
    assert {".", "+", "2", "A", "D"} <= seen


def test_decisions_name_who_gave_way_to_whom(frames: list[Frame]) -> None:
    loser, winner, record = next(
        (p.seq_id, p.in_favour_of, record)
        for record in frames[-1].records
        for p in record.preempted[:1]
        if p.in_favour_of != p.seq_id
    )
    assert decisions(record)[0] == f"{loser} preempted for {winner}"


def test_long_words_and_wide_characters_are_wrapped_by_cells() -> None:
    assert wrapped("a bb ccc", 4) == ["a bb", "ccc"]
    assert wrapped("abcdefgh i", 3) == ["abc", "def", "gh", "i"]
    assert wrapped("日本語", 4) == ["日本", "語"]
    assert wrapped("one\n\ntwo", 9) == ["one", "two"]


def test_without_a_terminal_decisions_are_printed_as_plain_lines(frames: list[Frame]) -> None:
    console = Console(file=io.StringIO(), width=80)
    assert watch(console, iter(frames)) is frames[-1]
    tell(console, frames[-1])
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in printed
    assert "A enters" in printed
    assert "preempted for" in printed
    assert "What the scheduler did" in printed
    assert "make lab" in printed


def test_an_interrupt_ends_the_show_and_keeps_what_was_seen(frames: list[Frame]) -> None:
    def interrupted() -> Any:
        yield frames[0]
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    assert watch(console, interrupted()) is frames[0]
