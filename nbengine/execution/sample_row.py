"""What a sampler is told of each row of logits, and what it answers.

Both ways of sampling, by torch and by kernels, take `SampleRow`s, read off them which logits change
(`LogitChanges`) and give a `SamplerOutput`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nbengine.core.logprobs import Logprob
from nbengine.core.sampling_params import SamplingParams
from nbengine.errors import SamplingError


@dataclass(slots=True)
class SampleRow:
    """What the sampler must know of the sequence behind one row of logits."""

    seq_id: str
    params: SamplingParams
    seed: int
    """64-bit seed of the request."""
    sample_indices: Sequence[int]
    """Which of the request's samples to draw: all n of them where the sequence is about to fork,
    else the sequence's own."""
    tokens: Sequence[int]
    """Prompt and output tokens so far; the one to sample has position len(tokens)."""
    num_prompt_tokens: int
    eos_token_ids: Iterable[int] = ()
    bad_words_token_ids: Sequence[Sequence[int]] = ()
    """`params.bad_words` as token sequences (`Tokenizer.bad_words_token_ids`)."""


@dataclass(slots=True)
class SamplerOutput:
    """One entry a row, in the rows' order."""

    token_ids: list[list[int]]
    """One id for each of the row's `sample_indices`; none for a row in `errors`."""
    logprobs: list[list[dict[int, Logprob]] | None]
    """For rows that ask for logprobs, one dict for each sampled id, that id first."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """By row: why nothing could be sampled from it."""

    def fail(self, index: int, row: SampleRow, largest: float) -> None:
        """Nothing can be sampled from a row whose largest logit is this."""
        reason = (
            "every token is masked (allowed_token_ids, bad_words and min_tokens together, or the "
            "model's own logits, leave none)"
            if largest == -math.inf
            else f"the largest logit is {largest}: the model's computation overflowed"
        )
        self.errors[index] = SamplingError(f"no token can be sampled for {row.seq_id}: {reason}")
        self.token_ids[index] = []
        self.logprobs[index] = None


@dataclass(slots=True)
class LogitChanges:
    """Which rows of a step ask for masks, biases and penalties."""

    allowed: list[tuple[int, Iterable[int]]] = field(default_factory=list)
    """Rows, and the only ids they may draw."""
    banned: list[tuple[int, Iterable[int]]] = field(default_factory=list)
    """Rows, perhaps several times, and ids they must not draw."""
    biased: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    """Rows with a repetition penalty."""
    counted: list[int] = field(default_factory=list)
    """Rows with a frequency or presence penalty."""

    @classmethod
    def of(cls, rows: Sequence[SampleRow]) -> LogitChanges:
        changes = cls()
        for index, row in enumerate(rows):
            params = row.params
            if params.allowed_token_ids is not None:
                changes.allowed.append((index, params.allowed_token_ids))
            if row.bad_words_token_ids:
                changes.banned.append((index, _completed_by(row)))
            if len(row.tokens) - row.num_prompt_tokens < params.min_tokens:
                changes.banned.append((index, row.eos_token_ids))
                changes.banned.append((index, params.stop_token_ids or ()))
            if params.logit_bias:
                changes.biased.append(index)
            if params.repetition_penalty != 1.0:
                changes.repeated.append(index)
            if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
                changes.counted.append(index)
        return changes

    @property
    def of_single_logits(self) -> bool:
        """Whether there are any besides `allowed`."""
        return bool(self.banned or self.biased or self.repeated or self.counted)


def flat_places(
    ids_of_rows: Iterable[tuple[int, Iterable[int]]], vocab_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """row * vocab_size + id of (row, token ids) pairs, and which of the ids these are: an id outside
    the vocabulary is left out, because as an index it would be another row's token."""
    index_of_id: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    ids: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for index, row_ids in ids_of_rows:
        ids.append(np.fromiter(row_ids, np.int64))
        index_of_id.append(np.full(len(ids[-1]), index, np.int64))
    all_ids = np.concatenate(ids)
    inside = (all_ids >= 0) & (all_ids < vocab_size)
    return (np.concatenate(index_of_id) * vocab_size + all_ids)[inside], inside


def _completed_by(row: SampleRow) -> list[int]:
    """The ids that would complete one of the row's bad words as the next output token."""
    output_start = row.num_prompt_tokens
    ids = []
    for word in row.bad_words_token_ids:
        first = len(row.tokens) - len(word) + 1
        if first >= output_start and list(row.tokens[first:]) == list(word[:-1]):
            ids.append(word[-1])
    return ids
