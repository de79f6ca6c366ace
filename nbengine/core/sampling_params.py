"""What a caller may ask of the sampler, under vLLM's names and defaults, and the one validator of it.

Every way in (`LLM`, `Engine`, a magic, a route) builds a `SamplingParams` or `BeamSearchParams`:
the constructor checks all that can be checked without a model and raises `InvalidField`, naming
field and value. `validate_for_model` and `validate_prompt_token_ids` then check what depends on the
model, before anything is queued. Past these three, no field needs another look: numbers are finite
`int`s and `float`s of plain Python, collections are copies that the caller can't reach.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from nbengine.errors import InvalidField, InvalidRequest, shown

MAX_NUM_SAMPLES = 16384
"""The largest `n` and `beam_width`. Each sample becomes a Python object as soon as the request is
admitted, so an unbounded `n` exhausts memory before the scheduler has a say; vLLM's limit is the
same. What a given engine can seat is far smaller, and checked by the engine."""

MIN_TEMPERATURE = 0.01
"""Positive temperatures below this are raised to it, as in vLLM: smaller ones overflow when logits
are divided by them, and the result is greedy already."""

_INT64_MAX = 2**63 - 1
_INT64_MIN = -(2**63)


class RequestOutputKind(enum.Enum):
    """What each `RequestOutput` of a stream holds."""

    CUMULATIVE = 0
    """The whole output so far."""
    DELTA = 1
    """What is new since the last one."""
    FINAL_ONLY = 2
    """One output only, when the request has finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How output tokens are chosen and when to stop.

    Raises `InvalidField` for any value out of range or of the wrong type. Sequences are stored as
    tuples (an absent one as the empty tuple, but `allowed_token_ids` as None), `logit_bias` as a
    dict of its own.
    """

    n: int = 1
    """Output sequences for this prompt. With a seed, each still has its own randomness."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated; -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated; -2 to 2."""
    repetition_penalty: float = 1.0
    """Logits of tokens seen in prompt or output are divided by it if positive, else multiplied."""
    temperature: float = 1.0
    """0 is greedy. Positive values below `MIN_TEMPERATURE` are raised to it."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to this; above 0, at most 1."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 (or -1, which is stored as 0) keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 to 1."""
    seed: int | None = None
    """64-bit signed. None (or -1, as in vLLM) lets the engine draw one."""
    stop: str | Collection[str] | None = None
    """Strings that end the output. They are left out of the text unless
    `include_stop_str_in_output`."""
    stop_token_ids: Collection[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """Output tokens at most; None for as many as the context holds."""
    min_tokens: int = 0
    """No end-of-sequence token, stop token or stop string before this many output tokens."""
    logprobs: int | None = None
    """For each output token, log-probabilities of this many most likely tokens and of the one
    chosen; -1 for the whole vocabulary."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these token ids; -100 to 100. Numeric strings are accepted as ids,
    because JSON has no other keys."""
    allowed_token_ids: Collection[int] | None = None
    """Only these may be generated."""
    bad_words: Collection[str] | None = None
    """Words that must not be generated, alone or after a space."""
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        stored = {
            "n": _integer("n", self.n, 1, MAX_NUM_SAMPLES),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, -2, 2),
            # Beyond these bounds float32 logits over- or underflow.
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6),
            "temperature": _temperature(self.temperature),
            "top_p": _number("top_p", self.top_p, 0, 1, low_excluded=True),
            "top_k": max(0, _integer("top_k", self.top_k, -1, _INT64_MAX)),
            "min_p": _number("min_p", self.min_p, 0, 1),
            "seed": None if self.seed is None else _seed(self.seed),
            "stop": _strings("stop", self.stop),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "max_tokens": _optional_integer("max_tokens", self.max_tokens, 1),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0, _INT64_MAX),
            "logprobs": _optional_integer("logprobs", self.logprobs, -1),
            "prompt_logprobs": _optional_integer("prompt_logprobs", self.prompt_logprobs, -1),
            "logit_bias": _logit_bias(self.logit_bias),
            "allowed_token_ids": None
            if self.allowed_token_ids is None
            else _token_ids("allowed_token_ids", self.allowed_token_ids),
            "bad_words": _strings("bad_words", self.bad_words),
        }
        for name, value in stored.items():
            object.__setattr__(self, name, value)
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
        ):
            _boolean(name, getattr(self, name))
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidField("output_kind", self.output_kind, "must be a RequestOutputKind")
        self._check_fields_against_each_other()

    def _check_fields_against_each_other(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidField(
                "min_tokens", self.min_tokens, f"must not be above max_tokens={self.max_tokens}"
            )
        if self.greedy and self.n > 1:
            raise InvalidField(
                "n",
                self.n,
                "must be 1 when greedy (temperature=0), because all samples would be the same; "
                "set a temperature above 0, or use beam search",
            )
        if self.stop and not self.detokenize:
            raise InvalidField(
                "stop",
                self.stop,
                "needs detokenize=True, because stop strings are looked for in the text; "
                "use stop_token_ids to stop without it",
            )
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidField(
                "allowed_token_ids",
                self.allowed_token_ids,
                "allows no token at all; name at least one, or leave it None to allow all",
            )

    @property
    def greedy(self) -> bool:
        """Whether each output token is simply the most likely one."""
        return self.temperature == 0.0

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated like any other."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` likeliest sequences at each token.

    Raises `InvalidField` for any value out of range or of the wrong type.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Divides the logits before beams are scored; 0 scores by the model's own probabilities."""
    length_penalty: float = 1.0
    """A beam's score is its summed log-probability over its length to this power."""
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stored = {
            "beam_width": _integer("beam_width", self.beam_width, 1, MAX_NUM_SAMPLES),
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, _INT64_MAX),
            "temperature": _temperature(self.temperature),
            # Lengths go up to a million; beyond these powers a score is 0 or infinite.
            "length_penalty": _number("length_penalty", self.length_penalty, -20, 20),
        }
        for name, value in stored.items():
            object.__setattr__(self, name, value)
        _boolean("ignore_eos", self.ignore_eos)
        _boolean("include_stop_str_in_output", self.include_stop_str_in_output)

    def clone(self, **changes: Any) -> BeamSearchParams:
        """A copy with some fields changed, validated like any other."""
        return dataclasses.replace(self, **changes)


def validate_for_model(
    params: SamplingParams | BeamSearchParams,
    *,
    vocab_size: int,
    max_model_len: int,
    num_prompt_tokens: int,
    max_logprobs: int = 20,
) -> None:
    """Check what only a model can decide; raises `InvalidField`.

    `vocab_size` is the width of the model's logits, which may differ from the tokenizer's length:
    token ids index logits. `max_logprobs` is the most that a request may ask for, -1 for no limit.
    """
    if isinstance(params, BeamSearchParams):
        if 2 * params.beam_width > vocab_size:
            raise InvalidField(
                "beam_width",
                params.beam_width,
                f"needs 2 * beam_width = {2 * params.beam_width} candidate tokens, and the "
                f"vocabulary has {vocab_size}",
            )
        return

    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        ids: Iterable[int] = getattr(params, name) or ()
        beyond = [token_id for token_id in ids if token_id >= vocab_size]
        if beyond:
            raise InvalidField(
                name,
                beyond,
                f"not in the model's vocabulary, whose ids are 0 to {vocab_size - 1}",
            )
    limit = vocab_size if max_logprobs == -1 else max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        wanted = vocab_size if asked == -1 else asked
        if wanted is not None and wanted > limit:
            whole = f" (the whole vocabulary, {vocab_size})" if asked == -1 else ""
            raise InvalidField(
                name, asked, f"more{whole} than max_logprobs={max_logprobs} of this engine"
            )
    room = max_model_len - num_prompt_tokens
    if params.min_tokens > room:
        raise InvalidField(
            "min_tokens",
            params.min_tokens,
            f"only {room} output tokens fit after a prompt of {num_prompt_tokens} "
            f"(max_model_len={max_model_len})",
        )


def validate_prompt_token_ids(
    ids: Collection[int], vocab_size: int, max_model_len: int
) -> tuple[int, ...]:
    """The prompt as a tuple of plain ints (NumPy integers are converted).

    Raises `InvalidRequest` for an empty prompt, an entry that is no integer in [0, vocab_size), or
    a prompt that leaves no room for an output token.
    """
    try:
        if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Collection):
            raise TypeError
        num_tokens = len(ids)  # before all are looked at: a range may be longer than memory
    except TypeError as error:  # also from an array without dimensions
        raise InvalidRequest(
            f"prompt token ids must be a list of integers, not {type(ids).__name__}; "
            "pass a text as the prompt itself"
        ) from error
    if not num_tokens:
        raise InvalidRequest("the prompt is empty: it needs at least one token")
    if num_tokens >= max_model_len:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens and max_model_len is {max_model_len}, which must "
            f"leave room for at least one output token: shorten the prompt by "
            f"{num_tokens - max_model_len + 1}, or raise max_model_len"
        )
    prompt = tuple(ids)
    for index, token_id in enumerate(prompt):
        if type(token_id) is not int and not _is_integer(token_id):
            raise InvalidRequest(
                f"prompt token {index} is {shown(token_id)} ({type(token_id).__name__}), "
                "but token ids are integers"
            )
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"prompt token {index} has id {shown(token_id)}, but the model's vocabulary has ids 0 to "
                f"{vocab_size - 1}: was the prompt encoded with another model's tokenizer?"
            )
    return tuple(map(int, prompt))


def _is_integer(value: object) -> bool:
    """Integers of Python and NumPy. A bool is one to Python, but never means a number here."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not _is_integer(value):
        raise InvalidField(name, value, f"must be an integer, not {type(value).__name__}")
    if not low <= value <= high:
        bounds = f"at least {low}" if value < low else f"at most {high}"
        raise InvalidField(name, value, f"must be {bounds}")
    return int(value)


def _optional_integer(name: str, value: Any, low: int) -> int | None:
    return None if value is None else _integer(name, value, low, _INT64_MAX)


def _number(name: str, value: Any, low: float, high: float, *, low_excluded: bool = False) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InvalidField(name, value, f"must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond 1.8e308
        number = math.inf
    # NaN fails every comparison, so the test asks for what is right, not for what is wrong.
    if not (low <= number <= high) or (low_excluded and number == low):
        bounds = f"above {low:g} and at most {high:g}" if low_excluded else f"{low:g} to {high:g}"
        raise InvalidField(name, value, f"must be in the range {bounds}")
    return number


def _temperature(value: Any) -> float:
    temperature = _number("temperature", value, 0, 1e6)
    return max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0


def _seed(value: Any) -> int | None:
    seed = _integer("seed", value, _INT64_MIN, _INT64_MAX)
    return None if seed == -1 else seed


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidField(name, value, f"must be True or False, not {type(value).__name__}")


def _members(name: str, value: Any, of: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Collection):
        raise InvalidField(name, value, f"must be a list of {of}, not {type(value).__name__}")
    return tuple(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    words = (value,) if isinstance(value, str) else _members(name, value, "strings")
    for word in words:
        if not isinstance(word, str):
            raise InvalidField(name, value, f"must hold strings, not {type(word).__name__}")
        if not word:
            raise InvalidField(name, value, "must not hold the empty string")
    return words


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_integer(name, item, 0, _INT64_MAX) for item in _members(name, value, "token ids"))


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidField(
            "logit_bias", value, f"must be a dict of token id to bias, not {type(value).__name__}"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # int() would also take "1_0", " 1" and the digits of other scripts.
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
            token_id = _integer("logit_bias", int(key), 0, _INT64_MAX)
        else:
            token_id = _integer("logit_bias", key, 0, _INT64_MAX)
        if token_id in biases:
            raise InvalidField("logit_bias", value, f"names token id {token_id} twice")
        try:
            biases[token_id] = _number("logit_bias", bias, -100, 100)
        except InvalidField as refusal:  # say which of the biases
            raise InvalidField("logit_bias", {token_id: bias}, refusal.problem) from None
    return biases


__all__ = [
    "MAX_NUM_SAMPLES",
    "MIN_TEMPERATURE",
    "BeamSearchParams",
    "RequestOutputKind",
    "SamplingParams",
    "validate_for_model",
    "validate_prompt_token_ids",
]
