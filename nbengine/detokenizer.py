"""Text of a growing output, token by token, and the stop strings in it.

The engine keeps one `IncrementalDetokenizer` for each sequence and feeds it every sampled token.
What it has shown is never taken back: a character appears when its last byte has arrived, and a
suffix that may still become a stop string is held back. After `finish`, the text equals the
tokenizer's decoding of all tokens at once (up to a stop string). Each token costs time in its own
length only, and the state is a function of the tokens: to rewind, feed the kept ones to a new one.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection
from typing import Protocol

from nbengine.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one sequence."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: str | Collection[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = False,
    ) -> None:
        """The options are those of `SamplingParams`: a stop string that is complete before
        `min_tokens` tokens is text like any other."""
        self.num_tokens = 0
        self.stop_string: str | None = None
        """The stop string that was found; after it, tokens change nothing."""
        self._pieces = _pieces_of(tokenizer)
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._matchers = [_StopMatcher(s) for s in ((stop,) if isinstance(stop, str) else stop)]
        self._min_tokens = min_tokens
        self._include_stop = include_stop_str_in_output
        self._held = ""
        self._shown: list[str] = []
        self._delta: list[str] = []

    def append(self, token_id: int) -> str | None:
        """Take the next output token; returns the stop string that it completes, if any."""
        if self.stop_string is not None:
            return self.stop_string
        self.num_tokens += 1
        if token_id in self._skipped:
            return None
        return self._extend(self._pieces.append(token_id))

    def finish(self) -> str | None:
        """There are no more tokens: show what was held back, an unfinished character as U+FFFD.
        Returns the stop string that this completes, if any."""
        if self.stop_string is None:
            self._extend(self._pieces.finish())
        self._show(self._held)
        self._held = ""
        return self.stop_string

    @property
    def text(self) -> str:
        """All text that may be shown so far."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def take_delta(self) -> str:
        """What was added to `text` since the last call."""
        delta, self._delta = "".join(self._delta), []
        return delta

    def _extend(self, piece: str) -> str | None:
        if not self._matchers:
            self._show(piece)
            return None
        text = self._held + piece
        found = self._find(piece)
        if found is not None:
            end, stop = found
            end += len(self._held)
            self._show(text[: end if self._include_stop else end - len(stop)])
            self._held = ""
            self.stop_string = stop
            return stop
        num_held = max(matcher.num_matched for matcher in self._matchers)
        visible = len(text) - num_held
        self._show(text[:visible])
        self._held = text[visible:]
        return None

    def _find(self, piece: str) -> tuple[int, str] | None:
        """Where in `piece` the first stop string is complete, and which; of those that end at the
        same character, the longest, so that none of them is shown."""
        best: tuple[int, str] | None = None
        for matcher in self._matchers:
            for end in matcher.ends(piece):
                if self.num_tokens < self._min_tokens:
                    continue
                if best is None or (end, -len(matcher.stop)) < (best[0], -len(best[1])):
                    best = (end, matcher.stop)
                break
        return best

    def _show(self, text: str) -> None:
        if text:
            self._shown.append(text)
            self._delta.append(text)


class _StopMatcher:
    """Finds one string in a text that comes in pieces, in time linear in the text (Knuth, Morris,
    Pratt, "Fast pattern matching in strings", 1977)."""

    __slots__ = ("_fallback", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Length of the longest suffix of the text so far that begins the stop string."""
        # For each length of a match, the longest shorter one that the same text also is.
        self._fallback = [0, 0]
        for char in stop[1:]:
            length = self._fallback[-1]
            while length and stop[length] != char:
                length = self._fallback[length]
            self._fallback.append(length + (stop[length] == char))

    def ends(self, piece: str) -> list[int]:
        """The places in `piece` after which the string is complete."""
        stop, fallback, matched = self.stop, self._fallback, self.num_matched
        if not matched and stop[0] not in piece:
            return []
        found = []
        for place, char in enumerate(piece, start=1):
            while matched and stop[matched] != char:
                matched = fallback[matched]
            if stop[matched] == char:
                matched += 1
                if matched == len(stop):
                    found.append(place)
                    matched = fallback[matched]
        self.num_matched = matched
        return found


class _Pieces(Protocol):
    """Turns tokens into the text that is certain after each."""

    def append(self, token_id: int) -> str: ...

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        ...


def _pieces_of(tokenizer: Tokenizer) -> _Pieces:
    decoder = tokenizer.backend.decoder
    described = json.loads(decoder.__getstate__()) if decoder is not None else {}
    parts = described.get("decoders", [described])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"]:
        return _ByteLevelPieces(tokenizer)
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and parts[0] == replace:
        if len(parts) == 3:
            return _SentencePiecePieces(tokenizer, num_stripped=0)
        if parts[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return _SentencePiecePieces(tokenizer, num_stripped=1)
    return _AnyPieces(tokenizer)


class _ByteLevelPieces:
    """Tokens are bytes, each written as one printable character (GPT-2's alphabet)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token = tokenizer.backend.id_to_token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def append(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        try:
            data = bytes(map(_BYTE_OF_CHAR.__getitem__, token))
        except KeyError:  # an added token, whose characters are themselves
            data = token.encode()
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + i): byte for i, byte in enumerate(others)},
    }


_BYTE_OF_CHAR = _byte_of_char()


class _SentencePiecePieces:
    """Tokens are text with ▁ for a space, or single bytes like `<0x0A>`.

    A run of bytes is text only if the whole run is UTF-8 (else each byte is a U+FFFD), so it is
    certain when the run has ended.
    """

    def __init__(self, tokenizer: Tokenizer, num_stripped: int) -> None:
        self._token = tokenizer.backend.id_to_token
        self._run = bytearray()
        self._num_to_strip = num_stripped
        """Spaces at the very beginning that are still to be dropped."""

    def append(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return ""
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                self._run.append(int(token[3:5], 16))
                return ""
            except ValueError:
                pass
        return self._stripped(self._end_of_run() + token.replace("▁", " "))

    def finish(self) -> str:
        return self._stripped(self._end_of_run())

    def _end_of_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._num_to_strip and text:
            if not text.startswith(" "):
                self._num_to_strip = 0
            else:
                self._num_to_strip -= 1
                text = text[1:]
        return text


class _AnyPieces:
    """Any other decoder, as a black box: a token's text is what it adds to the decoding of the
    few tokens before it, once that does not end in the middle of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode: Callable[[list[int]], str] = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=False
        )
        self._before: list[int] = []
        self._pending: list[int] = []

    def append(self, token_id: int) -> str:
        self._pending.append(token_id)
        return self._added(wait=len(self._pending) < 8)

    def finish(self) -> str:
        return self._added(wait=False)

    def _added(self, *, wait: bool) -> str:
        text = self._decode(self._before + self._pending)
        if wait and text.endswith("\ufffd"):
            return ""
        added = text[len(self._decode(self._before)) :]
        if added:  # a token without text, of an id without a token, is no context for the next
            self._before = self._pending
        self._pending = []
        return added
