"""A model without a model: an executor whose KV cache can tell what was written to it.

In the place of keys and values each slot holds a hash of the whole past that it was computed from.
So a block that is shared wrongly, written without a copy, remembered too early, swapped to the
wrong place or read stale is seen at the first token that looks at it; and the sampled tokens depend
on the whole past, as a real model's do. Used by the simulation.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import NoReturn

from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import BeamSearchParams
from nbengine.core.scheduler import SchedulerConfig

VOCAB_SIZE = 61


def pasts(tokens: list[int], salt: str | None) -> list[int]:
    """For each position a number that stands for its keys and values: it depends on every token
    up to there, and on the salt, so that a hit across tenants is seen too."""
    root = 0 if salt is None else 1 + int.from_bytes(salt.encode(), "big")
    return list(accumulate(tokens, lambda past, token: hash((past, token)), initial=root))[1:]


def next_token(past: int, seed: int, index: int) -> int:
    return hash((past, seed, index)) % VOCAB_SIZE


def next_candidates(past: int, n: int) -> list[tuple[int, float]]:
    """The `n` likeliest next tokens, all different, with their log-probabilities."""
    tokens = [(past + k * 7) % VOCAB_SIZE for k in range(n)]
    scored = [(token, -1 - hash((past, token)) % 2**40 / 2**40) for token in tokens]
    return sorted(scored, key=lambda candidate: -candidate[1])


def undisturbed_outputs(request: Request) -> list[tuple[int, ...]]:
    """What the request's samples (or best beams) are, with endless memory and nothing amiss."""
    prompt, salt = list(request.prompt_token_ids), request.cache_salt
    outputs = []
    if isinstance(request.params, BeamSearchParams):
        return _undisturbed_beams(request, request.params)
    for index in range(request.params.n):
        tokens = list(prompt)
        while len(tokens) < request.max_total_tokens:
            tokens.append(next_token(pasts(tokens, salt)[-1], request.seed, index))
            num_output = len(tokens) - len(prompt)
            if tokens[-1] in request.stop_token_ids and num_output >= request.params.min_tokens:
                break
        outputs.append(tuple(tokens[len(prompt) :]))
    return outputs


def _undisturbed_beams(request: Request, params: BeamSearchParams) -> list[tuple[int, ...]]:
    beams = [(list(request.prompt_token_ids), 0.0)]
    ended: list[tuple[float, tuple[int, ...]]] = []  # (score, output)
    start, width = len(beams[0][0]), params.beam_width
    while beams and len(beams[0][0]) < request.max_total_tokens:
        grown = []
        for tokens, total in beams:
            past = pasts(tokens, request.cache_salt)[-1]
            for token, logprob in next_candidates(past, 2 * width):
                if token in request.eos_token_ids and not params.ignore_eos:
                    score = (total + logprob) / len(tokens) ** params.length_penalty
                    ended.append((score, tuple(tokens[start:])))
                else:
                    grown.append(([*tokens, token], total + logprob))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    for tokens, total in beams:
        ended.append((total / len(tokens) ** params.length_penalty, tuple(tokens[start:])))
    return [output for _, output in sorted(ended, key=lambda e: -e[0])[:width]]


class FakeDevice:
    """Executes plans over a KV cache of pasts, and checks all that it reads."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.size = config.block_size
        self.kv: list[int | None] = [None] * (config.num_blocks * self.size)
        self.host: list[int | None] = [None] * (config.num_host_blocks * self.size)

    def execute(self, plan: StepPlan) -> StepOutput:
        self._copy(plan.swap_out, self.kv, self.host)
        self._copy(plan.swap_in, self.host, self.kv)
        self._copy(plan.copies, self.kv, self.kv)
        past_of = {seq: pasts(seq.tokens, seq.request.cache_salt) for seq, _ in plan.scheduled}
        for seq, n in plan.scheduled:  # as on a real device: all are written, then read
            for i in range(seq.num_computed_tokens, seq.num_computed_tokens + n):
                self.kv[self._slot(seq, i)] = past_of[seq][i]
        output = StepOutput()
        for seq, n in plan.scheduled:
            end = seq.num_computed_tokens + n
            past = past_of[seq]
            if self._read(seq, end) != past[:end]:
                self._explain(seq, past[:end])
            if end == len(past):
                self._sample(seq, past[-1], output)
        return output

    def scramble(self, plan: StepPlan) -> None:
        """A step that fails half way leaves garbage wherever it was to write."""
        self._copy([(None, block) for _, block in plan.swap_out], self.kv, self.host)
        for _, block in (*plan.swap_in, *plan.copies):
            self._copy([(None, block)], self.kv, self.kv)
        for seq, n in plan.scheduled:
            for i in range(seq.num_computed_tokens, seq.num_computed_tokens + n):
                self.kv[self._slot(seq, i)] = None

    def _copy(
        self,
        moves: Iterable[tuple[int | None, int]],
        source: list[int | None],
        destination: list[int | None],
    ) -> None:
        """Copy blocks pairwise, reading all before writing any; a source of None is garbage."""
        size = self.size
        garbage = [None] * size
        contents = [
            garbage if block is None else source[block * size : (block + 1) * size]
            for block, _ in moves
        ]
        for (_, block), content in zip(moves, contents, strict=True):
            destination[block * size : (block + 1) * size] = content

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.size] * self.size + position % self.size

    def _read(self, seq: Sequence, end: int) -> list[int | None]:
        size = self.size
        return [past for b in seq.block_table for past in self.kv[b * size : (b + 1) * size]][:end]

    def _explain(self, seq: Sequence, expected: list[int]) -> NoReturn:
        found = self._read(seq, len(expected))
        at = next(i for i, past in enumerate(expected) if found[i : i + 1] != [past])
        what = "was never computed" if found[at] is None else "holds another past"
        raise AssertionError(
            f"{seq.seq_id} reads position {at} in block {seq.block_table[at // self.size]}, which "
            f"{what}; {seq!r}"
        )

    def _sample(self, seq: Sequence, past: int, output: StepOutput) -> None:
        request = seq.request
        if isinstance(request.params, BeamSearchParams):
            output.candidates[seq.seq_id] = next_candidates(past, 2 * request.params.beam_width)
        else:
            output.samples[seq.seq_id] = [
                next_token(past, request.seed, seq.index + k) for k in range(1 + seq.pending_forks)
            ]
