"""A request and its sequences: the facts that the scheduler decides over.

A `Request` is what a caller asked for; a `Sequence` is one of its samples (or one beam). The
scheduler, the executor and the views all read the same few fields, and there is one rule in place
of a prefill and a decode phase: a sequence has `tokens` known and `num_computed_tokens` of them in
the KV cache, and each step computes some of the rest. When none is left over, the step samples the
next token.
"""

from __future__ import annotations

import copy
import enum
from dataclasses import dataclass, field
from typing import Any

from nbengine.core.prefix_cache import BlockContent
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams


class Status(enum.StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    """Back in the waiting queue with its tokens kept: its blocks were released (recompute) or
    copied to host memory (swap)."""
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asked for. Immutable: everything that changes lives in the sequences."""

    request_id: str
    """Without `#`, which sets off the sample's index in the ids of sequences."""
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | BeamSearchParams
    arrival: int = 0
    """Rank of arrival: 0 for the engine's first request, then 1, 2, ... Ties in every policy go to
    the smaller one."""
    arrival_time: float = 0.0
    """Seconds on the engine's clock."""
    priority: int = 0
    """For the `priority` policy: smaller runs sooner, as in vLLM."""
    cache_salt: str | None = None
    """Requests share prefix-cache blocks only with requests of the same salt."""
    seed: int = 0
    """64-bit seed of the request's randomness: the caller's, or one drawn by the engine."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-sequence tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """What ends a sequence: those above unless `ignore_eos`, and the caller's stop_token_ids."""
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    """`params.bad_words` as token sequences."""
    max_total_tokens: int = 0
    """Prompt and output tokens together may not pass this (max_tokens, max_model_len)."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_sequences(self) -> int:
        """How many sequences, and so seats, the request takes once its prompt is computed."""
        if isinstance(self.params, BeamSearchParams):
            return self.params.beam_width
        return self.params.n


@dataclass(slots=True, eq=False, repr=False)
class Sequence:
    """One sample (or beam) of a request. Identity is by object; `seq_id` names it for people:
    the request's id, with `#1`, `#2`, ... for its further samples."""

    seq_id: str
    request: Request
    index: int
    """Which of the request's samples this is: 0 to n-1. Randomness depends on (seed, index,
    position) alone."""
    tokens: list[int]
    """Prompt tokens, then output tokens."""
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    """How many of `tokens` have their keys and values in the cache."""
    block_table: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    """Blocks in host memory that hold this sequence's KV while it is swapped out."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache when the sequence was first admitted."""
    num_preemptions: int = 0
    pending_forks: int = 0
    """Further samples that this sequence splits into once its prompt is computed; they keep their
    seats from admission on."""
    order: tuple[Any, int, int] = (0, 0, 0)
    """(policy's rank, arrival, index): the place in every queue."""
    contents: list[BlockContent] = field(default_factory=list)
    """The names of its full blocks in the prefix cache: derived from `tokens`, kept for speed."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`, once finished."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for the end-of-sequence token."""
    cumulative_logprob: float = 0.0
    """Beams only: sum of the model's log-probabilities of the output tokens."""
    candidates: list[tuple[int, float]] | None = None
    """Beams only: (token id, logprob) of this beam's best continuations, kept while the request's
    other beams are still to be computed."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.request.prompt_token_ids) :]

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def needs_every_prompt_token(self) -> bool:
        """Its prompt is being scored (prompt_logprobs), which prefix hits would leave gaps in."""
        params = self.request.params
        return (
            isinstance(params, SamplingParams)
            and params.prompt_logprobs is not None
            and len(self.tokens) == self.num_prompt_tokens
        )

    @property
    def is_idle(self) -> bool:
        """Nothing to compute: a beam that waits for its siblings."""
        return self.candidates is not None

    def fork(self, index: int) -> Sequence:
        """Another sample with the same past, which holds nothing yet."""
        child = Sequence(
            f"{self.request.request_id}#{index}",
            self.request,
            index,
            list(self.tokens),
            num_cached_tokens=self.num_cached_tokens,
            contents=list(self.contents),
            cumulative_logprob=self.cumulative_logprob,
        )
        child.order = (self.order[0], self.order[1], index)
        return child

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        """It has finished, and holds nothing any more."""
        self.status = Status.FINISHED
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.candidates = None
        self.host_blocks = []

    def clone(self, tokens: list[int]) -> Sequence:
        """A copy with these tokens, which shares nothing that may change."""
        twin = copy.copy(self)
        twin.tokens = tokens
        twin.block_table = list(self.block_table)
        twin.host_blocks = list(self.host_blocks)
        twin.contents = []
        return twin

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status}, {len(self.tokens)} tokens, "
            f"{self.num_computed_tokens} computed, {len(self.block_table)} blocks)"
        )


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam."""

    token_ids: tuple[int, ...]
    """Output tokens, without the end-of-sequence token unless it was asked for."""
    cumulative_logprob: float
    score: float
    """cumulative_logprob / length ** length_penalty, prompt included, as vLLM ranks beams."""
    finish_reason: str
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request in the engine, with all the sequences it has had."""

    request: Request
    sequences: list[Sequence]
    hypotheses: list[Hypothesis] = field(default_factory=list)
    """Beams only: the finished ones, best first once the request has ended."""

    num_indices: int = 1
    """Beams only: sample indices given out so far."""

    def next_index(self) -> int:
        """A sample index that no sequence of the request has had."""
        self.num_indices += 1
        return self.num_indices - 1

    @classmethod
    def of(cls, request: Request) -> LiveRequest:
        """A request that has just arrived: one sequence, which splits once its prompt is computed."""
        first = Sequence(
            request.request_id,
            request,
            0,
            list(request.prompt_token_ids),
            pending_forks=request.num_sequences - 1,
        )
        return cls(request, [first])

    def with_sequences(self, sequences: list[Sequence]) -> LiveRequest:
        """The same request with other sequences."""
        return LiveRequest(self.request, sequences, list(self.hypotheses), self.num_indices)

    @property
    def is_finished(self) -> bool:
        return all(seq.is_finished for seq in self.sequences)
