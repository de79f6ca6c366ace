"""The one way in: what a caller asks for becomes a `Request`, or is refused.

`Engine` makes an `Admission` when its model is loaded; `add_request`, `stream`, `LLM`, the magics and
the dashboard all come through it, so that no field reaches the scheduler or a kernel unchecked. It
keeps nothing, and may be called on any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbengine.config import EngineConfig
from nbengine.core.request import Request
from nbengine.core.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    validate_for_model,
    validate_prompt_token_ids,
)
from nbengine.errors import InvalidField, InvalidRequest

if TYPE_CHECKING:
    from nbengine.tokenizer import Tokenizer

Prompt = str | Seq[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; a mapping may carry a
`cache_salt`."""

Params = SamplingParams | BeamSearchParams

MAX_SALT_LENGTH = 128
MAX_ID_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Admission:
    """What a model and a configuration can serve."""

    config: EngineConfig
    tokenizer: Tokenizer | None
    vocab_size: int
    eos_token_ids: frozenset[int]

    def check(
        self,
        prompt: Prompt,
        params: Params | None,
        *,
        request_id: object,
        priority: object,
        cache_salt: object,
    ) -> tuple[Request, str | None]:
        """The request, without seed and rank of arrival, and its prompt's text if it was given as
        text.

        Raises:
            InvalidRequest, InvalidField: see `Engine.add_request`.
        """
        text, ids, salt = self._parse_prompt(prompt)
        salt = _checked_salt(cache_salt if cache_salt is not None else salt)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidField("params", params, "must be SamplingParams or BeamSearchParams")
        longest = self.config.max_model_len
        assert longest is not None
        validate_for_model(
            params,
            vocab_size=self.vocab_size,
            max_model_len=longest,
            num_prompt_tokens=len(ids),
            max_logprobs=self.config.max_logprobs,
        )
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**63:
            raise InvalidField("priority", priority, "must be a 64-bit integer")
        if (
            not isinstance(request_id, str)
            or not 1 <= len(request_id) <= MAX_ID_LENGTH
            or "#" in request_id
        ):
            raise InvalidField(
                "request_id",
                request_id,
                f'must be a string of 1 to {MAX_ID_LENGTH} characters without "#"',
            )
        stops, bad_words = self._token_ids_of(params)
        max_tokens = params.max_tokens
        request = Request(
            request_id,
            ids,
            params,
            priority=priority,
            cache_salt=salt,
            eos_token_ids=self.eos_token_ids,
            stop_token_ids=stops,
            bad_words_token_ids=bad_words,
            max_total_tokens=longest if max_tokens is None else min(longest, len(ids) + max_tokens),
        )
        return request, text

    def _token_ids_of(self, params: Params) -> tuple[frozenset[int], tuple[tuple[int, ...], ...]]:
        """What ends a sequence, and what it must not say."""
        if isinstance(params, BeamSearchParams):
            return frozenset(), ()
        stops = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops |= self.eos_token_ids
        if self.tokenizer is None:
            for name in ("stop", "bad_words"):
                if value := getattr(params, name):
                    raise InvalidField(name, value, "needs a tokenizer (skip_tokenizer_init)")
            return stops, ()
        words = params.bad_words
        return stops, self.tokenizer.bad_words_token_ids(words) if words else ()

    def _parse_prompt(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...], str | None]:
        """Text (if given as text), token ids and salt of a prompt in any of its forms."""
        salt = None
        text: str | None = None
        ids: Any = None
        if isinstance(prompt, Mapping):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown:
                raise InvalidRequest(
                    f"a prompt has no {sorted(map(str, unknown))}: its keys are prompt or "
                    "prompt_token_ids, and cache_salt"
                )
            salt, text, ids = (prompt.get(k) for k in ("cache_salt", "prompt", "prompt_token_ids"))
            if text is not None and not isinstance(text, str):
                raise InvalidRequest(f"a prompt's text is a str, not {type(text).__name__}")
        elif isinstance(prompt, str):
            text = prompt
        else:
            ids = prompt
        if ids is None:
            if text is None:
                raise InvalidRequest("a prompt needs a text or prompt_token_ids")
            if self.tokenizer is None:
                raise InvalidRequest(
                    "this engine has no tokenizer (skip_tokenizer_init): give prompt_token_ids"
                )
            self._check_text_length(self.tokenizer, text)
            ids = self.tokenizer.encode(text)
        assert self.config.max_model_len is not None
        return (
            text,
            validate_prompt_token_ids(ids, self.vocab_size, self.config.max_model_len),
            salt,
        )

    def _check_text_length(self, tokenizer: Tokenizer, text: str) -> None:
        """Refuse a text that can't fit before it is tokenised: that takes seconds a megabyte, in
        which no other Python thread runs, the engine's neither."""
        assert self.config.max_model_len is not None
        longest = tokenizer.max_token_length * self.config.max_model_len
        if len(text) > longest:
            raise InvalidRequest(
                f"the prompt has {len(text):,} characters, and max_model_len="
                f"{self.config.max_model_len} tokens hold at most {longest:,}: shorten it"
            )


def _checked_salt(salt: object) -> str | None:
    if salt is None:
        return None
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise InvalidField(
            "cache_salt", salt, f"must be a string of 1 to {MAX_SALT_LENGTH} characters"
        )
    return salt
