"""Traces: who asked for how much, and when. Nothing of what was said.

`Trace.of` takes one from an engine's history, `Trace.synthetic` draws one, `save` and `load` keep
it in a file; `simulate` plays it to a scheduler. A trace holds numbers only: instead of the tokens
of a block of a prompt or output it has an id, in order of first appearance, which two blocks share
when they are equal and all before them is. So the prefix cache hits in a simulation as it did in
truth, a conversation's next turn on generated blocks too, and no text can be told or guessed from
a trace.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from nbengine.core.history import History
from nbengine.core.prefix_cache import digest_of
from nbengine.core.records import Finish
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import MAX_NUM_SAMPLES, BeamSearchParams, SamplingParams
from nbengine.core.script import Candidates, Ending, Event, Part, Script
from nbengine.errors import InvalidField, TraceError

FORMAT, VERSION = "nbengine trace", 1
MOST_TOKENS = 1 << 24
"""Of a prompt or an output: what a file may ask memory for."""

_FILLER, _STOP, _FIRST = 0, 1, 2
"""Token ids of a simulation. A block is told by its last token alone, `_FIRST` and its id, because
the samples of a request may share the others."""

REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedOutput:
    """One sample of a request, or its whole beam search."""

    num_tokens: int
    """Tokens that it came to; of a beam search, the rounds that it took."""
    hash_ids: tuple[int, ...] = ()
    """Its full blocks, from the one in which the prompt ends. Blocks without an id are like no
    other. A beam search has none."""
    finish_reason: str | None = "stop"
    """`stop`, `length`, `abort` or `error`; None if it had not ended when the trace was taken."""
    finish_step: int | None = None
    """The trace's step in which it ended; of an aborted one, the step before which."""
    finish_time: float | None = None
    """Seconds since the trace began, when that step did."""

    def __post_init__(self) -> None:
        _check_int("num_tokens", self.num_tokens, 0, MOST_TOKENS)
        _check_ids(self.hash_ids)
        reasons = (*REASONS, None)
        _check("finish_reason", self.finish_reason, self.finish_reason in reasons, f"not {reasons}")
        if self.finish_step is not None:
            _check_int("finish_step", self.finish_step, 0, 2**53)
        if self.finish_time is not None:
            _check_time("finish_time", self.finish_time)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """One request."""

    request_id: str
    arrival_step: int
    """It arrived before this step; the trace's first is 1."""
    arrival_time: float = 0.0
    """Seconds since the trace began."""
    num_prompt_tokens: int
    hash_ids: tuple[int, ...] = ()
    """The prompt's full blocks. Blocks without an id are like no other."""
    outputs: tuple[TracedOutput, ...]
    """By sample; of a beam search, one."""
    max_tokens: int
    """Output tokens that were asked for, or that there was room for."""
    priority: int = 0
    cache_salt: int | None = None
    """Which salt, in order of first appearance; None for none."""
    beam_width: int | None = None
    """Of a beam search."""
    scores_prompt: bool = False
    """It asked for `prompt_logprobs`, and so took nothing from the prefix cache."""
    missing: str = ""
    """What the history did not reach: its `beginning` (it had arrived by the trace's first step,
    and may have computed some of its tokens), its `end` (it was unfinished in the last), or
    `beginning, end`."""

    def __post_init__(self) -> None:
        name = self.request_id
        _check("request_id", name, isinstance(name, str) and "#" not in name, "a str without '#'")
        _check_int("arrival_step", self.arrival_step, 1, 2**53)
        _check_time("arrival_time", self.arrival_time)
        _check_int("num_prompt_tokens", self.num_prompt_tokens, 1, MOST_TOKENS)
        _check_int("max_tokens", self.max_tokens, 1, MOST_TOKENS)
        _check_int("priority", self.priority, -(2**63), 2**63)
        _check_ids(self.hash_ids)
        if self.cache_salt is not None:
            _check_int("cache_salt", self.cache_salt, 0, 2**53)
        num = len(self.outputs)
        _check("outputs", f"{num} of them", 1 <= num <= MAX_NUM_SAMPLES, "at least one is needed")
        if self.beam_width is not None:
            _check_int("beam_width", self.beam_width, 1, MAX_NUM_SAMPLES)
            _check("outputs", f"{num} of them", num == 1, "a beam search has one")
        for output in self.outputs:
            enough = output.num_tokens <= self.max_tokens
            _check("num_tokens", output.num_tokens, enough, f"above max_tokens={self.max_tokens}")
        _check("scores_prompt", self.scores_prompt, isinstance(self.scores_prompt, bool), "a bool")
        allowed = ("", "beginning", "end", "beginning, end")
        _check("missing", self.missing, self.missing in allowed, f"must be one of {allowed}")

    @property
    def num_output_tokens(self) -> int:
        """Of all samples together."""
        return sum(output.num_tokens for output in self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Trace:
    """Requests in the order in which they arrived."""

    requests: tuple[TracedRequest, ...]
    block_size: int = 16
    """Tokens that an id of a block stands for."""
    first_step: int = 1
    """The step of the history that is the trace's first."""
    num_unknown: int = 0
    """Requests that the history told of and that are not in the trace, because it did not hold
    their prompts any more."""

    def __post_init__(self) -> None:
        _check_int("block_size", self.block_size, 1, MOST_TOKENS)
        _check_int("first_step", self.first_step, 1, 2**53)
        _check_int("num_unknown", self.num_unknown, 0, 2**53)
        for one, next_one in itertools.pairwise(self.requests):
            _check_order(one, next_one)

    @classmethod
    def of(cls, history: History) -> Trace:
        """The workload of a run, as far back as the history can rebuild its states.

        A request that was there before has no `beginning`: when it arrived is known in seconds but
        not in steps, so it arrives before the first. One that has no `end` is as long as it was in
        the latest record, and a simulation ends it there.

        Raises:
            UnknownStep: the history can't rebuild any state.
        """
        first = history.first_state
        state = history.state_at(first)
        script = Script.of((record for record in history if record.step > first), state)
        parts = [(1, part, first > 0) for part in script.present.values()]
        parts += [
            (event.step - first, event.part, False)
            for event in script.events
            if event.kind == "arrival" and event.part is not None
        ]
        begins = parts[0][1].request.arrival_time if parts else 0.0
        taker = _Taker(state.block_size, first, begins)
        requests = [taker.take(part, step, was_there) for step, part, was_there in parts]
        return cls(
            requests=tuple(requests),
            block_size=state.block_size,
            first_step=first + 1,
            num_unknown=len(script.unknown),
        )

    @classmethod
    def synthetic(
        cls,
        num_requests: int,
        *,
        rate: float = 0.5,
        prompt_tokens: int | Callable[[Random], int] = 200,
        output_tokens: int | Callable[[Random], int] = 60,
        spread: float = 0.7,
        num_prefixes: int = 0,
        prefix_tokens: int = 128,
        priorities: tuple[int, ...] = (0,),
        seconds_per_step: float = 0.02,
        block_size: int = 16,
        seed: int = 0,
    ) -> Trace:
        """Requests that nobody made, the same ones for the same `seed`.

        They arrive at random (Poisson), `rate` of them a step on average. Lengths are log-normal:
        `prompt_tokens` and `output_tokens` are medians, `spread` is the deviation of the logarithm
        (0: all are equal, 0.7: every sixth is twice as long or longer); or each is a function of a
        `random.Random`. With `num_prefixes`, each prompt has one of so many beginnings of
        `prefix_tokens` tokens in front (a system prompt). `max_tokens` is what a user might ask
        for: the next power of two. Priorities are drawn from `priorities`.

        Raises:
            InvalidField: a number that is out of range.
        """
        _check_int("num_requests", num_requests, 0, 10**7)
        _check_int("num_prefixes", num_prefixes, 0, 10**6)
        _check_int("prefix_tokens", prefix_tokens, 0, MOST_TOKENS)
        _check("rate", rate, _is_number(rate) and rate > 0, "must be positive")
        _check("spread", spread, _is_number(spread) and 0 <= spread <= 5, "must be 0 to 5")
        _check_time("seconds_per_step", seconds_per_step)
        _check("priorities", priorities, len(priorities) > 0, "must hold one at least")
        rng = Random(seed)
        shared_blocks = prefix_tokens // block_size if num_prefixes else 0
        requests, at = [], 0.0
        for number in range(num_requests):
            prefix = rng.randrange(num_prefixes) if num_prefixes else 0
            prompt = _draw("prompt_tokens", prompt_tokens, spread, rng)
            output = _draw("output_tokens", output_tokens, spread, rng)
            requests.append(
                TracedRequest(
                    request_id=f"req-{number}",
                    arrival_step=1 + int(at),
                    arrival_time=at * seconds_per_step,
                    num_prompt_tokens=prompt + (prefix_tokens if num_prefixes else 0),
                    hash_ids=tuple(
                        range(prefix * shared_blocks, (prefix + 1) * shared_blocks)
                    ),
                    outputs=(TracedOutput(num_tokens=output),),
                    max_tokens=1 << (output - 1).bit_length(),
                    priority=rng.choice(priorities),
                )
            )  # fmt: skip
            at += rng.expovariate(rate)
        return cls(requests=tuple(requests), block_size=block_size)

    # ------------------------------------------------------------------ files

    _HEADER: ClassVar[tuple[str, ...]] = ("block_size", "first_step", "num_unknown")

    def save(self, path: str | Path) -> None:
        """Write it as JSON Lines: what it is, then a request a line."""
        header = {"format": FORMAT, "version": VERSION, "num_requests": len(self.requests)}
        header |= {name: getattr(self, name) for name in self._HEADER}
        lines = [header, *map(dataclasses.asdict, self.requests)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            TraceError: a line is not what it should be; the message says which, and why. Or lines
                are missing.
            OSError: the file can't be read.
        """
        requests: list[TracedRequest] = []
        header: dict[str, Any] = {}
        number = 0
        try:
            with Path(path).open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    fields = json.loads(line, parse_constant=_no_constant)
                    if not isinstance(fields, dict):
                        raise ValueError("it is no JSON object")
                    if number == 1:
                        header = _checked_header(fields, cls._HEADER)
                        continue
                    request = _request_of(fields)
                    if requests:
                        _check_order(requests[-1], request)
                    requests.append(request)
            if not number:
                raise ValueError("the file is empty")
            number += 1
            if len(requests) != header["num_requests"]:
                raise ValueError(
                    f"the file ends after {len(requests)} of {header['num_requests']} requests"
                )
            return cls(requests=tuple(requests), **{name: header[name] for name in cls._HEADER})
        except (ValueError, TypeError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: {error}") from error

    # ------------------------------------------------------------------ playing

    def script(self) -> Script:
        """For `simulate`: requests whose tokens agree wherever the trace's blocks do."""
        events: list[tuple[int, bool, Event]] = []
        unique = itertools.count(1)
        for number, traced in enumerate(self.requests):
            part = _part_of(traced, number, self.block_size, unique)
            step, time = traced.arrival_step, traced.arrival_time
            events.append((step, True, Event(step, time, "arrival", part)))
            for ending in part.endings.values():
                if ending.finish.reason == "abort" and ending.step:
                    at = max(step, ending.step)
                    abort = Event(at, max(time, ending.time), "abort", part)
                    events.append((at, at == step, abort))
                    break
        # A step's aborts of what was there before its arrivals: a name may be taken again.
        events.sort(key=lambda each: each[:2])
        script = Script()
        script.events = [event for _, _, event in events]
        return script

    # ------------------------------------------------------------------ looks

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[TracedRequest]:
        return iter(self.requests)

    def __repr__(self) -> str:
        requests = self.requests
        if not requests:
            return "Trace(no requests)"
        n = len(requests)
        facts = [
            f"{n:,} requests in {requests[-1].arrival_step:,} steps",
            f"{sum(r.num_prompt_tokens for r in requests) / n:,.0f} prompt and "
            f"{sum(r.num_output_tokens for r in requests) / n:,.0f} output tokens on average",
        ]
        cut = {what: sum(what in r.missing for r in requests) for what in ("beginning", "end")}
        facts += [f"{count} without their {what}" for what, count in cut.items() if count]
        if self.num_unknown:
            facts.append(f"{self.num_unknown} more of which nothing is known")
        return f"Trace({', '.join(facts)})"


class _Taker:
    """Turns parts of a script into requests of a trace, numbering blocks and salts."""

    def __init__(self, block_size: int, first: int, begins: float) -> None:
        self.block_size, self.first, self.begins = block_size, first, begins
        self.ids: dict[bytes, int] = {}
        self.salts: dict[str, int] = {}

    def take(self, part: Part, arrival_step: int, was_there: bool) -> TracedRequest:
        request = part.request
        prompt, salt, size = request.prompt_token_ids, request.cache_salt, self.block_size
        digests = self._chain(b"", list(prompt), salt)
        hash_ids = self._numbered(digests)
        parent = digests[-1] if digests else b""
        tail = list(prompt[len(prompt) // size * size :])
        is_beams = isinstance(request.params, BeamSearchParams)
        if is_beams:
            rounds = [num_output + 1 for _, num_output in part.candidates]
            rounds += [len(tokens) for tokens in part.tokens.values()]
            outputs = [self._output(part, 0, max(rounds), [])]
        else:
            outputs = [
                self._output(part, i, len(tokens), self._chain(parent, tail + tokens, salt))
                for i, tokens in sorted(part.tokens.items())
            ]
            # Before it has split, a request of several samples is one sequence.
            outputs += outputs[:1] * (request.num_sequences - len(outputs))
        missing = ["beginning"] * was_there + ["end"] * any(
            o.finish_reason is None for o in outputs
        )
        return TracedRequest(
            request_id=request.request_id,
            arrival_step=arrival_step,
            arrival_time=request.arrival_time - self.begins,
            num_prompt_tokens=len(prompt),
            hash_ids=hash_ids,
            outputs=tuple(outputs),
            max_tokens=request.max_total_tokens - len(prompt),
            priority=request.priority,
            cache_salt=None if salt is None else self.salts.setdefault(salt, len(self.salts)),
            beam_width=request.num_sequences if is_beams else None,
            scores_prompt=getattr(request.params, "prompt_logprobs", None) is not None,
            missing=", ".join(missing),
        )

    def _output(
        self, part: Part, index: int, num_tokens: int, digests: list[bytes]
    ) -> TracedOutput:
        ending = part.ending_of(index)
        if ending is None:
            return TracedOutput(
                num_tokens=num_tokens, hash_ids=self._numbered(digests), finish_reason=None
            )
        reason = ending.finish.reason
        return TracedOutput(
            num_tokens=num_tokens,
            hash_ids=self._numbered(digests),
            finish_reason="stop" if reason == "pruned" else reason,
            finish_step=max(0, ending.step - self.first),
            finish_time=max(0.0, ending.time - self.begins),
        )

    def _chain(self, parent: bytes, tokens: list[int], salt: str | None) -> list[bytes]:
        size = self.block_size
        digests = []
        for start in range(0, len(tokens) - size + 1, size):
            parent = digest_of(parent, tokens[start : start + size], salt)
            digests.append(parent)
        return digests

    def _numbered(self, digests: list[bytes]) -> tuple[int, ...]:
        return tuple(self.ids.setdefault(digest, len(self.ids)) for digest in digests)


def _part_of(traced: TracedRequest, number: int, block_size: int, unique: Iterator[int]) -> Part:
    """The request with made-up tokens."""
    length = traced.num_prompt_tokens
    prompt = _tokens(0, length, traced.hash_ids, block_size, unique)
    request_params: SamplingParams | BeamSearchParams
    if traced.beam_width is not None:
        request_params = BeamSearchParams(
            beam_width=traced.beam_width, max_tokens=traced.max_tokens
        )
    else:
        request_params = SamplingParams(
            n=len(traced.outputs),
            max_tokens=traced.max_tokens,
            prompt_logprobs=0 if traced.scores_prompt else None,
        )
    request = Request(
        traced.request_id,
        tuple(prompt),
        request_params,
        arrival=number,
        arrival_time=traced.arrival_time,
        priority=traced.priority,
        cache_salt=None if traced.cache_salt is None else str(traced.cache_salt),
        seed=number,
        eos_token_ids=frozenset({_STOP}),
        stop_token_ids=frozenset({_STOP}),
        max_total_tokens=length + traced.max_tokens,
    )
    part = Part(request, {})
    for index, output in enumerate(traced.outputs):
        goes_on = output.finish_reason in ("abort", "error")
        num_tokens = output.num_tokens if goes_on else max(1, output.num_tokens)
        tokens = _tokens(length, num_tokens, output.hash_ids, block_size, unique)
        is_short = output.finish_reason != "length" or num_tokens < traced.max_tokens
        if is_short and not goes_on:
            tokens[-1] = _STOP  # never computed, so in no block
        part.tokens[index] = tokens
        if goes_on:
            finish = Finish(traced.request_id, str(output.finish_reason), "as in the trace")
            part.endings[index] = Ending(
                finish, output.finish_step or 0, output.finish_time or 0.0, False
            )
    if part.is_beam_search:
        part.draw_candidates = _beams(part, len(part.tokens[0]), goes_on)
    return part


def _tokens(
    start: int, num_tokens: int, ids: tuple[int, ...], size: int, unique: Iterator[int]
) -> list[int]:
    """Those at positions `start` and on, of which `ids` are the blocks that end among them."""
    tokens = [_FILLER] * num_tokens
    ends = range(size - 1 - start % size, num_tokens, size)
    for end, each in itertools.zip_longest(ends, ids[: len(ends)]):
        tokens[end] = -next(unique) if each is None else _FIRST + each
    return tokens


def _beams(part: Part, rounds: int, is_cut: bool) -> Callable[[Sequence], Candidates | None]:
    """Candidates for so many rounds: which beams go on is drawn, anew but always alike."""
    width = part.request.num_sequences

    def draw(beam: Sequence) -> Candidates | None:
        num_output = len(beam.tokens) - beam.num_prompt_tokens
        if is_cut and num_output >= rounds:
            return None
        if (
            not is_cut
            and num_output == rounds - 1
            and len(beam.tokens) + 1 < (part.request.max_total_tokens)
        ):
            return [(_STOP, -1.0)]
        rng = Random(hash((part.request.seed, beam.index, num_output, beam.tokens[-1])))
        logprobs = sorted((-rng.random() for _ in range(2 * width)), reverse=True)
        return [(-(1 << 40) - rng.getrandbits(40), logprob) for logprob in logprobs]

    return draw


# ------------------------------------------------------------------ checks


def _request_of(fields: dict[str, Any]) -> TracedRequest:
    outputs = fields.get("outputs")
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise ValueError("outputs must be a list of objects")
    made = [TracedOutput(**_with_tuple(output)) for output in outputs]
    return TracedRequest(**_with_tuple(fields) | {"outputs": tuple(made)})


def _with_tuple(fields: dict[str, Any]) -> dict[str, Any]:
    ids = fields.get("hash_ids", [])
    if not isinstance(ids, list):
        raise ValueError("hash_ids must be a list of integers")
    return fields | {"hash_ids": tuple(ids)}


def _checked_header(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    if fields.get("format") != FORMAT:
        raise ValueError(f"the file is no {FORMAT}: its first line must say so")
    if fields.get("version") != VERSION:
        raise ValueError(f"it has version {fields.get('version')!r}, and known is {VERSION}")
    expected = {"format", "version", "num_requests", *names}
    if fields.keys() != expected:
        raise ValueError(f"the header has {sorted(fields)}, and should have {sorted(expected)}")
    _check_int("num_requests", fields["num_requests"], 0, 2**53)
    return fields


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _check_order(one: TracedRequest, next_one: TracedRequest) -> None:
    for name in ("arrival_step", "arrival_time"):
        before, after = getattr(one, name), getattr(next_one, name)
        _check(name, after, before <= after, f"requests are in order, and before it came {before}")


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    holds = is_int and least <= value <= most
    _check(name, value, holds, f"must be an integer, {least} to {most}")


def _check_ids(ids: Any) -> None:
    _check("hash_ids", ids, isinstance(ids, tuple), "must be a tuple of integers")
    for each in ids:
        _check_int("hash_ids", each, 0, 2**53)


def _check_time(name: str, value: Any) -> None:
    _check(name, value, _is_number(value) and value >= 0, "must be seconds, 0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _draw(name: str, length: int | Callable[[Random], int], spread: float, rng: Random) -> int:
    if callable(length):
        value = length(rng)
    else:
        _check_int(name, length, 1, MOST_TOKENS)
        value = min(MOST_TOKENS, max(1, round(rng.lognormvariate(math.log(length), spread))))
    _check_int(name, value, 1, MOST_TOKENS)
    return value


def _check(name: str, value: Any, holds: object, problem: str) -> None:
    if not holds:
        raise InvalidField(name, value, problem)
