"""What a caller gets back, with vLLM's names, attributes and meanings; and `RequestState`, which
gathers it while the request runs: text, logprobs, times.

The engine's thread owns a `RequestState`; the outputs it makes are never changed afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from nbengine.core.logprobs import Logprob
from nbengine.core.request import LiveRequest, Sequence, Status
from nbengine.core.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nbengine.detokenizer import IncrementalDetokenizer
from nbengine.tokenizer import Tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    """Sum of the sampled tokens' logprobs; None unless logprobs were asked for."""
    logprobs: list[dict[int, Logprob]] | None
    """For each output token, its candidates by token id: the model's own log-probabilities, before
    temperature, penalties and masks."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None while unfinished."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it, or the error's text."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds on the engine's monotonic clock."""

    arrival_time: float
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    """The end of each step that gave it output tokens: one a sample."""
    finished_time: float | None = None
    num_preemptions: int = 0

    @property
    def first_token_time(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def last_token_time(self) -> float | None:
        return self.token_times[-1] if self.token_times else None

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to the first step that worked on it."""
        return _difference(self.first_scheduled_time, self.arrival_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token, in seconds from arrival."""
        return _difference(self.first_token_time, self.arrival_time)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from the first step that worked on it to its first token."""
        return _difference(self.first_token_time, self.first_scheduled_time)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between one output token (of every sample) and the next."""
        return [later - earlier for earlier, later in pairwise(self.token_times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds: the mean of the latencies between."""
        elapsed = _difference(self.last_token_time, self.first_token_time)
        return elapsed / (len(self.token_times) - 1) if elapsed else None

    def __str__(self) -> str:
        def ms(seconds: float | None) -> str:
            return "not yet" if seconds is None else f"{1e3 * seconds:.1f} ms"

        return (
            f"in the queue {ms(self.time_in_queue)}, prefill {ms(self.prefill_time)}, first token "
            f"after {ms(self.ttft)}, then {ms(self.tpot)} a token; "
            f"{self.num_preemptions} {'preemption' if self.num_preemptions == 1 else 'preemptions'}"
        )


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


@dataclass(slots=True)
class RequestOutput:
    """A request's outputs so far, or in the end."""

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """For each prompt token (the first has None), if they were asked for."""
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    """Prompt tokens that were taken from the prefix cache."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        from nbengine.jupyter.views import output_text

        printer.text(output_text(self))

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import output_html

        return output_html(self)


@dataclass(slots=True)
class BeamSearchSequence:
    """One finished beam."""

    tokens: list[int]
    """Prompt and output tokens."""
    text: str | None
    """Prompt and output text, as in vLLM."""
    cum_logprob: float
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Sample:
    """One sequence's text and logprobs."""

    sequence: Sequence
    detokenizer: IncrementalDetokenizer | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float = 0.0
    num_tokens: int = 0
    """Output tokens that the detokenizer has seen."""
    num_delivered: int = 0
    """Output tokens that a DELTA output has delivered."""


Subscriber = Callable[["RequestOutput | BaseException"], None]


@dataclass(slots=True)
class RequestState:
    """A request's outputs in the making."""

    live: LiveRequest
    prompt: str | None
    tokenizer: Tokenizer | None
    metrics: RequestMetrics
    subscriber: Subscriber | None = None
    """Gets each output, or the exception that ended the step it was computed in. Called on the
    engine's thread, it must return at once; if it raises, that is logged, and it gets no more."""
    samples: dict[str, _Sample] = field(default_factory=dict)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.params, SamplingParams) and self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # the first token follows nothing

    @property
    def request_id(self) -> str:
        return self.live.request.request_id

    @property
    def params(self) -> SamplingParams | BeamSearchParams:
        return self.live.request.params

    @property
    def finished(self) -> bool:
        return self.live.is_finished

    @property
    def wants_every_output(self) -> bool:
        params = self.params
        return (
            isinstance(params, SamplingParams)
            and params.output_kind is not RequestOutputKind.FINAL_ONLY
        )

    def text_of(self, seq: Sequence) -> str:
        """A sequence's output text so far."""
        if isinstance(self.params, BeamSearchParams) and self.tokenizer is not None:
            return self.tokenizer.decode(seq.output_token_ids)
        sample = self.samples.get(seq.seq_id)
        return sample.detokenizer.text if sample and sample.detokenizer else ""

    def update(self, seq: Sequence, entry: dict[int, Logprob] | None) -> str | None:
        """Take in the token that was just appended to `seq`; returns the stop string it completed,
        if any."""
        params = self.params
        if isinstance(params, BeamSearchParams):
            return None
        sample = self.samples.get(seq.seq_id)
        if sample is None:
            sample = self.samples[seq.seq_id] = self._new_sample(seq, params)
        token = seq.tokens[-1]
        sample.num_tokens += 1
        if entry is not None and sample.logprobs is not None:
            sample.logprobs.append(self._decoded(entry))
            sample.cumulative_logprob += entry[token].logprob
        if sample.detokenizer is None:
            return None
        ended_by_token = seq.finish_reason == "stop"
        if params.include_stop_str_in_output or not ended_by_token:
            sample.detokenizer.append(token)
        stop = sample.detokenizer.finish() if seq.is_finished else sample.detokenizer.stop_string
        # A stop token was there first; a length limit yields to a stop string in the last token.
        return None if ended_by_token else stop

    def _new_sample(self, seq: Sequence, params: SamplingParams) -> _Sample:
        detokenizer = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer,
                stop=params.stop or (),
                min_tokens=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
            )
        return _Sample(seq, detokenizer, [] if params.logprobs is not None else None)

    def take_prompt_logprobs(self, start: int, rows: list[dict[int, Logprob]]) -> None:
        """Logprobs of the prompt tokens from position `start` on. What was computed before a
        preemption is computed, and comes, again."""
        assert self.prompt_logprobs is not None
        del self.prompt_logprobs[start:]
        self.prompt_logprobs += map(self._decoded, rows)

    def _decoded(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        params = self.params
        if self.tokenizer is None or not (isinstance(params, SamplingParams) and params.detokenize):
            return entry
        decode = self.tokenizer.decode  # special tokens too: this is no text
        return {
            token: Logprob(lp.logprob, lp.rank, decode([token], skip_special_tokens=False))
            for token, lp in entry.items()
        }

    def output(self) -> RequestOutput:
        """Everything so far. May be asked for at any time."""
        return self._output(is_delta=False)

    def next_output(self) -> RequestOutput:
        """What the subscriber gets now: everything so far, or for DELTA requests what is new since
        the last call."""
        params = self.params
        return self._output(
            is_delta=isinstance(params, SamplingParams)
            and params.output_kind is RequestOutputKind.DELTA
        )

    def _output(self, *, is_delta: bool) -> RequestOutput:
        request, params = self.live.request, self.params
        sequences = self.live.sequences
        if isinstance(params, BeamSearchParams):
            outputs = self._beam_outputs()
        else:
            for seq in sequences:  # one that ended without a token has its reason to tell
                if seq.is_finished and seq.seq_id not in self.samples:
                    self.samples[seq.seq_id] = self._new_sample(seq, params)
            outputs = [
                self._completion(sample, is_delta)
                for sample in sorted(self.samples.values(), key=lambda s: s.sequence.index)
            ]
        return RequestOutput(
            request.request_id,
            self.prompt,
            list(request.prompt_token_ids),
            None if self.prompt_logprobs is None else list(self.prompt_logprobs),
            outputs,
            self.finished,
            self.metrics_now(),
            sequences[0].num_cached_tokens if sequences else 0,
        )

    def metrics_now(self) -> RequestMetrics:
        """A copy."""
        return dataclasses.replace(
            self.metrics,
            token_times=list(self.metrics.token_times),
            num_preemptions=sum(seq.num_preemptions for seq in self.live.sequences),
        )

    @property
    def size(self) -> int:
        """Tokens and logprobs kept."""
        logprobs = [row for sample in self.samples.values() for row in sample.logprobs or ()]
        logprobs += [row for row in self.prompt_logprobs or () if row is not None]
        tokens = len(self.live.request.prompt_token_ids) + sum(
            len(seq.tokens) for seq in self.live.sequences
        )
        return tokens + sum(map(len, logprobs))

    def rewound(self, live: LiveRequest, now: float) -> RequestState:
        """The same request cut back to `live`, its state at `now`, an earlier time: text and logprobs
        of the tokens that it had then. A subscriber stays, and gets again what comes after them."""
        num_tokens = max(len(seq.output_token_ids) for seq in live.sequences)
        metrics = dataclasses.replace(
            self.metrics,
            token_times=[time for time in self.metrics.token_times if time <= now],
            finished_time=None,
        )
        if all(seq.status is Status.WAITING for seq in live.sequences):
            metrics.first_scheduled_time = None
        state = RequestState(live, self.prompt, self.tokenizer, metrics, self.subscriber)
        if num_tokens:
            is_forgotten = not self.samples and not isinstance(self.params, BeamSearchParams)
            state.prompt_logprobs = None if is_forgotten else self.prompt_logprobs
        if isinstance(self.params, SamplingParams):
            for seq in live.sequences:
                if seq.output_token_ids:
                    state.samples[seq.seq_id] = state._sample_again(
                        seq, self.params, self.samples.get(seq.seq_id)
                    )
        return state

    def _sample_again(
        self, seq: Sequence, params: SamplingParams, before: _Sample | None
    ) -> _Sample:
        sample = self._new_sample(seq, params)
        tokens = seq.output_token_ids
        sample.num_tokens = len(tokens)
        if before is not None:
            sample.num_delivered = min(before.num_delivered, len(tokens))
        if before is None or before.logprobs is None:
            sample.logprobs = None  # or those of its first tokens are forgotten
        elif sample.logprobs is not None:
            sample.logprobs = before.logprobs[: len(tokens)]
            sample.cumulative_logprob = sum(
                entry[token].logprob for entry, token in zip(sample.logprobs, tokens, strict=True)
            )
        if sample.detokenizer is not None:
            is_ended_by_token = seq.finish_reason == "stop" and not isinstance(seq.stop_reason, str)
            if is_ended_by_token and not params.include_stop_str_in_output:
                tokens = tokens[:-1]
            for number, token in enumerate(tokens, 1):
                sample.detokenizer.append(token)
                if number == sample.num_delivered:
                    sample.detokenizer.take_delta()
            if seq.is_finished:
                sample.detokenizer.finish()
                if sample.num_delivered == sample.num_tokens:
                    sample.detokenizer.take_delta()  # with what had been held back
        return sample

    def retire(self) -> None:
        """Drop what only a running request needs."""
        self.subscriber = None
        for seq in self.live.sequences:
            seq.contents = []

    def _completion(self, sample: _Sample, is_delta: bool) -> CompletionOutput:
        seq, detokenizer = sample.sequence, sample.detokenizer
        tokens = seq.output_token_ids[: sample.num_tokens]
        start = 0
        if is_delta:
            start, sample.num_delivered = sample.num_delivered, sample.num_tokens
        text = ""
        if detokenizer is not None:
            if seq.is_finished:  # also by an abort, which no token tells
                detokenizer.finish()
            text = detokenizer.take_delta() if is_delta else detokenizer.text
        return CompletionOutput(
            seq.index,
            text,
            tokens[start:],
            sample.cumulative_logprob if sample.logprobs is not None else None,
            sample.logprobs[start:] if sample.logprobs is not None else None,
            seq.finish_reason,
            seq.stop_reason,
        )

    def _beam_outputs(self) -> list[CompletionOutput]:
        def text(tokens: list[int]) -> str:
            return "" if self.tokenizer is None else self.tokenizer.decode(tokens)

        if self.finished:
            return [
                CompletionOutput(
                    i, text(list(h.token_ids)), list(h.token_ids), h.cumulative_logprob, None,
                    h.finish_reason, h.stop_reason,
                )
                for i, h in enumerate(self.live.hypotheses)
            ]  # fmt: skip
        beams = sorted(
            (s for s in self.live.sequences if not s.is_finished),
            key=lambda s: -s.cumulative_logprob,
        )
        return [
            CompletionOutput(i, text(s.output_token_ids), s.output_token_ids,
                             s.cumulative_logprob, None)
            for i, s in enumerate(beams)
        ]  # fmt: skip
