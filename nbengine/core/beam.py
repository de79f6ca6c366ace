"""Beam search, one step at a time.

Beams are sequences like any others: they share blocks, are preempted and recomputed one by one.
A beam whose candidates are known waits (it is idle) until its siblings have theirs; then the best
`beam_width` continuations live on, a beam that several of them continue is forked, and one that
none continues is dropped. Candidates, order and scores are those of vLLM's `LLM.beam_search`.
"""

from __future__ import annotations

from typing import NamedTuple

from nbengine.core.request import Hypothesis, Sequence
from nbengine.core.sampling_params import BeamSearchParams


class Continuation(NamedTuple):
    """One more token for one beam."""

    parent: Sequence
    token_id: int
    cumulative_logprob: float


def score(cumulative_logprob: float, length: int, length_penalty: float) -> float:
    """A beam of `length` tokens (prompt included), for comparing beams of unequal lengths."""
    return cumulative_logprob / max(1, length) ** length_penalty


def expand(
    beams: list[Sequence], params: BeamSearchParams, eos_token_ids: frozenset[int]
) -> tuple[list[Continuation], list[Hypothesis]]:
    """The best `beam_width` continuations of all beams' candidates, best first, and the
    hypotheses that ended with this token."""
    going: list[Continuation] = []
    ended: list[Hypothesis] = []
    for beam in beams:
        for token_id, logprob in beam.candidates or ():
            total = beam.cumulative_logprob + logprob
            if token_id in eos_token_ids and not params.ignore_eos:
                output = tuple(beam.output_token_ids)
                if params.include_stop_str_in_output:
                    output += (token_id,)
                ended.append(
                    Hypothesis(
                        output,
                        total,
                        score(total, len(beam.tokens), params.length_penalty),
                        "stop",
                        token_id,
                    )
                )
            else:
                going.append(Continuation(beam, token_id, total))
    going.sort(key=lambda c: -c.cumulative_logprob)  # stable: equals keep their order
    return going[: params.beam_width], ended


def finished_beam(beam: Sequence, params: BeamSearchParams) -> Hypothesis:
    """A beam that reached the length limit."""
    total = beam.cumulative_logprob
    return Hypothesis(
        tuple(beam.output_token_ids),
        total,
        score(total, len(beam.tokens), params.length_penalty),
        "length",
    )
