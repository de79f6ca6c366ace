"""One-line schedulers for the core's tests, and an executor with no model behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from nbengine.core.history import History
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import LiveRequest, Request, Sequence
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import Scheduler, SchedulerConfig
from nbengine.core.state import Keyframe


def next_token(seq: Sequence, index: int) -> int:
    """A token that depends on the sequence's whole past, as a model's would."""
    text = f"{seq.tokens}/{seq.request.seed}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=2).digest(), "big") + 1000


def candidates(seq: Sequence, n: int) -> list[tuple[int, float]]:
    """`n` next tokens, with log-probabilities that hardly ever tie between beams."""
    tokens = [next_token(seq, k) for k in range(n)]
    return sorted(((t, -0.5 - t / 65536) for t in tokens), key=lambda c: -c[1])


class FakeExecutor:
    """Samples by hashing; remembers how many tokens it computed."""

    def __init__(self) -> None:
        self.num_computed: dict[str, int] = {}

    def execute(self, plan: StepPlan) -> StepOutput:
        output = StepOutput()
        for seq, n in plan.scheduled:
            self.num_computed[seq.seq_id] = self.num_computed.get(seq.seq_id, 0) + n
            if seq.num_computed_tokens + n < len(seq.tokens):
                continue
            if isinstance(seq.request.params, BeamSearchParams):
                width = 2 * seq.request.params.beam_width
                output.candidates[seq.seq_id] = candidates(seq, width)
            else:
                output.samples[seq.seq_id] = [
                    next_token(seq, seq.index + k) for k in range(1 + seq.pending_forks)
                ]
        return output


class Bench:
    """A scheduler with its executor, steppable by hand."""

    def __init__(self, policy: Any = "fcfs", **config: Any) -> None:
        self.scheduler = Scheduler(SchedulerConfig(**config), policy)
        self.executor = FakeExecutor()
        self.num_added = 0

    def add(
        self,
        prompt: list[int] | int,
        max_tokens: int = 8,
        params: SamplingParams | BeamSearchParams | None = None,
        **fields: Any,
    ) -> LiveRequest:
        """A prompt of given tokens, or of so many that no other request has."""
        first = 1_000_000 * (self.num_added + 1)
        ids = tuple(range(first, first + prompt)) if isinstance(prompt, int) else tuple(prompt)
        params = params or SamplingParams(max_tokens=max_tokens)
        fields = {
            "request_id": f"req-{self.num_added}",
            "arrival": self.num_added,
            "max_total_tokens": len(ids) + (params.max_tokens or 0),
        } | fields
        self.num_added += 1
        return self.scheduler.add(Request(prompt_token_ids=ids, params=params, **fields))

    def step(self) -> StepRecord:
        plan = self.scheduler.schedule()
        self.scheduler.commit(self.executor.execute(plan))
        self.scheduler.pool.check_integrity()
        return self.scheduler.seal(Phases())

    def run(self, max_steps: int = 10_000) -> list[StepRecord]:
        records = []
        while self.scheduler.has_work:
            records.append(self.step())
            assert len(records) < max_steps, "no end in sight"
        return records


@pytest.fixture
def bench() -> Callable[..., Bench]:
    return Bench


class RecordedBench(Bench):
    """With a history, as an engine has one."""

    def __init__(self, policy: Any = "fcfs", **config: Any) -> None:
        super().__init__(policy, **config)
        self.history = History()
        self.history.keep(Keyframe(self.scheduler))

    def step(self) -> StepRecord:
        record = super().step()
        self.history.append(record)
        return record


@pytest.fixture
def recorded() -> Callable[..., RecordedBench]:
    return RecordedBench
