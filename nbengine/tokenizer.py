"""Text to token ids and back, from a Hugging Face directory, a `tokenizer.json` or a GGUF file.

`load_tokenizer` finds out which; everything else speaks to the small class `Tokenizer` over the
`tokenizers` library. A directory is read through transformers, so that its special cases hold; a
GGUF's tokenizer is rebuilt from the file's own tokens and merges, which takes a fraction of a second
where reading the file with transformers takes several and drops the pre-tokenizer. No code that
comes with a model is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nbengine.chat_template import ChatTemplate
from nbengine.errors import InvalidRequest, ModelNotFound, UnsupportedModel, WeightsError


class Tokenizer:
    """Encodes and decodes for one model. Nothing changes after construction."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        special_tokens: dict[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        """`special_tokens` are the names that a chat template may use (`bos_token`, ...);
        `chat_template` is its source, or sources by name ("default", "tool_use")."""
        self.backend = backend
        self.eos_token_ids = frozenset(eos_token_ids)
        """Tokens that end an answer."""
        self.special_tokens = dict(special_tokens or {})
        self._chat_templates = (
            chat_template if isinstance(chat_template, dict) else {"default": chat_template}
        )
        self.special_token_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        """Tokens that `skip_special_tokens` leaves out of the text."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the largest id. The model's logits may be wider."""
        self.max_token_length = max(map(len, vocabulary), default=0)
        """Characters of the longest token."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids. The names of special tokens inside the text become those tokens, as in
        transformers. Raises `InvalidRequest` for what is no text."""
        if not isinstance(text, str):
            raise InvalidRequest(f"a prompt must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"the text holds half of a surrogate pair at character {error.start}, "
                "which is no Unicode character"
            ) from error
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the tokenizer has no token for are left out."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def bad_words_token_ids(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as token sequences: as it is at the start of a text, and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word, " " + word.lstrip()):
                sequences[tuple(self.encode(text, add_special_tokens=False))] = None
        return tuple(sequence for sequence in sequences if sequence)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as this model's prompt. It names its special tokens itself: encode it
        with `add_special_tokens=False`.

        Raises `InvalidRequest` for malformed messages, for what the template refuses, and where the
        model has no template.
        """
        template = self._tool_template if variables.get("tools") else self._default_template
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **variables},
        )

    @cached_property
    def _default_template(self) -> ChatTemplate:
        source = self._chat_templates.get("default")
        if source is None:
            raise InvalidRequest(
                "this model has no chat template, so it was not trained to chat: "
                "use generate() with a prompt of your own"
            )
        return ChatTemplate(source)

    @cached_property
    def _tool_template(self) -> ChatTemplate:
        source = self._chat_templates.get("tool_use")
        return self._default_template if source is None else ChatTemplate(source)


def load_tokenizer(path: str | Path, tokenizer: str | Path | None = None) -> Tokenizer:
    """The tokenizer of the model at `path`, or the one at `tokenizer` if that is given: a directory
    in Hugging Face layout, a `tokenizer.json` or a GGUF file.

    Raises `ModelNotFound`, `UnsupportedModel` and, for an unreadable file, `WeightsError`.
    """
    source = Path(path if tokenizer is None else tokenizer).expanduser()
    if source.is_dir():
        return _from_directory(source)
    if not source.is_file():
        raise ModelNotFound(
            f"no tokenizer at {source}: give a directory with tokenizer.json, the file itself, or "
            "a .gguf file"
        )
    if source.name == "tokenizer.json" and (source.parent / "tokenizer_config.json").is_file():
        return _from_directory(source.parent)
    with source.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    return _from_gguf(source) if is_gguf else _from_json(source)


def _from_directory(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the many formats raise
        raise UnsupportedModel(f"no tokenizer can be read from {directory}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(
            f"{directory} has a tokenizer without a fast form ({type(loaded).__name__}); "
            "add its tokenizer.json"
        )
    eos = {loaded.eos_token_id, *_eos_of_generation_config(directory)} - {None}
    names = {
        name: str(token)
        for name, token in loaded.special_tokens_map.items()
        if not isinstance(token, list)
    }
    return Tokenizer(
        backend, eos_token_ids=eos, special_tokens=names, chat_template=loaded.chat_template
    )


def _eos_of_generation_config(directory: Path) -> list[int]:
    """Chat models name there the tokens that end a turn, beside the one that ends a text."""
    file = directory / "generation_config.json"
    if not file.is_file():
        return []
    try:
        eos = json.loads(file.read_text("utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file} can't be read as a JSON object: {error}") from error
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _from_json(file: Path) -> Tokenizer:
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"{file} is no GGUF and no tokenizer.json: {error}") from error


# GGUF. The names of the pre-tokenizers and their patterns are facts of the model families, as in
# each family's tokenizer.json.

_GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _GPT4_STYLE.format(digits=r"\p{N}{1,3}")
_QWEN2 = _GPT4_STYLE.format(digits=r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERNS = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r")
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")
_PREPEND_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Values of `tokenizer.ggml.token_type`."""


def _from_gguf(file: Path) -> Tokenizer:
    from nbengine.models.gguf import GgufHeader

    metadata = GgufHeader.read(file).metadata
    prefix = "tokenizer.ggml."
    values = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            f"{file} has a tokenizer of kind {kind!r}; 'gpt2' and 'llama' are read. "
            "Pass tokenizer= with a directory that holds the model's tokenizer.json"
        )
    tokens = _list(file, values, "tokens", str)
    if kind == "gpt2":
        backend = _byte_level_bpe(file, values, tokens)
    else:
        backend = _sentence_piece_bpe(file, values, tokens)
    _add_special_tokens(file, backend, values, tokens)

    def token(name: str) -> int | None:
        token_id = values.get(f"{name}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise WeightsError(f"{file} names {token_id!r} as its {name} token")
        return token_id

    bos, eos = token("bos"), token("eos")
    adds_bos = values.get("add_bos_token", kind == "llama" or values.get("pre") in _PREPEND_BOS)
    if adds_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=None, special_tokens=[(tokens[bos], bos)]
        )
    named = {"bos": bos, "eos": eos, "unk": token("unknown"), "pad": token("padding")}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        eos_token_ids=[i for i in (eos, token("eot"), token("eom")) if i is not None],
        special_tokens={f"{name}_token": tokens[i] for name, i in named.items() if i is not None},
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(
    file: Path, values: dict[str, object], tokens: list[str]
) -> tokenizers.Tokenizer:
    pre = str(values.get("pre"))
    split: pre_tokenizers.PreTokenizer
    if pre in _DIGITS_THEN_GPT2:
        split = pre_tokenizers.Digits(individual_digits=True)
    elif pre in _SPLIT_PATTERNS:
        split = pre_tokenizers.Split(Regex(_SPLIT_PATTERNS[pre]), "isolated")
    elif pre == "gpt-2":
        split = pre_tokenizers.Sequence([])
    else:
        known = ", ".join(sorted({*_SPLIT_PATTERNS, *_DIGITS_THEN_GPT2, "gpt-2"}))
        raise UnsupportedModel(
            f"{file} wants the pre-tokenizer {pre!r}; known are {known}. "
            "Pass tokenizer= with a directory that holds the model's tokenizer.json"
        )
    merges = [_merge(file, merge) for merge in _list(file, values, "merges", str)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _IGNORE_MERGES,
        )
    )
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre not in _SPLIT_PATTERNS
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _merge(file: Path, merge: str) -> tuple[str, str]:
    # A space inside a token is written as another character, so the first one separates.
    left, space, right = merge.partition(" ")
    if not space:
        raise WeightsError(f"{file} has the merge {merge!r}, which is no pair of tokens")
    return left, right


def _sentence_piece_bpe(
    file: Path, values: dict[str, object], tokens: list[str]
) -> tokenizers.Tokenizer:
    """SentencePiece joins the neighbours whose union has the best score. As a list of merges, that
    is: every way to cut every token in two tokens, in the order of the whole token's score."""
    scores = _list(file, values, "scores", float)
    if len(scores) != len(tokens):
        raise WeightsError(f"{file} has {len(tokens)} tokens but {len(scores)} scores")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token_id in sorted(range(len(tokens)), key=lambda i: (-scores[i], i)):
        token = tokens[token_id]
        cuts = [
            (token[:at], token[at:])
            for at in range(1, len(token))
            if token[:at] in vocabulary and token[at:] in vocabulary
        ]
        merges += sorted(cuts, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    unknown = values.get("unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise WeightsError(f"{file} names {unknown!r} as its unknown token")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", "▁")
    fused = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if values.get("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        backend.decoder = decoders.Sequence([*fused, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = replace
        backend.decoder = decoders.Sequence(fused)
    return backend


def _add_special_tokens(
    file: Path, backend: tokenizers.Tokenizer, values: dict[str, object], tokens: list[str]
) -> None:
    types = _list(file, values, "token_type", int)
    if len(types) != len(tokens):
        raise WeightsError(f"{file} has {len(tokens)} tokens but {len(types)} token types")
    backend.add_tokens(
        [
            AddedToken(token, special=kind in (_UNKNOWN, _CONTROL), normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )


def _list(file: Path, values: dict[str, object], key: str, kind: type) -> list[Any]:
    value = values.get(key)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise WeightsError(f"{file} lacks tokenizer.ggml.{key}, a list of {kind.__name__}")
    return value
