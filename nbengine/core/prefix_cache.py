"""The prefix cache: which block holds which tokens, after which other tokens.

A full block is named by a chain: the digest of its parent's digest and its own token ids, from a
root that holds the caller's `cache_salt`. So one look-up a block finds the longest cached prefix
of a prompt, and two tenants with different salts never meet (Zheng et al., SGLang, 2024, section
3, with a tree; vLLM's automatic prefix caching, with hashes).

A digest is only a hint: a hit counts when the token ids, the salt and the whole chain of parents
agree, so a collision costs a miss and never another request's keys and values.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

_MOST_COMPARED = 64  # so that an explanation takes microseconds however large the cache is


@dataclass(slots=True, eq=False, repr=False)
class BlockContent:
    """What one full block holds: its own tokens, behind those of its parents. Never changed (and
    not frozen, because that triples the time to make one)."""

    digest: bytes
    parent: BlockContent | None
    token_ids: tuple[int, ...]
    salt: str | None

    def continues(self, parent: BlockContent | None, other: BlockContent) -> bool:
        """Whether this stands for the same as `other`, of whose parent `parent` is known to be an
        equal: the same tokens and salt behind the same prefix."""
        a, b = self.parent, parent
        if self.token_ids != other.token_ids or self.salt != other.salt:
            return False
        while a is not b:  # chains of several sequences: walk to where they become one
            if a is None or b is None or a.token_ids != b.token_ids:
                return False  # one chain has one salt
            a, b = a.parent, b.parent
        return True

    def __eq__(self, other: object) -> bool:
        """By what it stands for, trusting the digest for the parents."""
        if not isinstance(other, BlockContent):
            return NotImplemented
        return (self.digest, self.token_ids, self.salt) == (
            other.digest, other.token_ids, other.salt,
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: object) -> BlockContent:
        return self

    def __repr__(self) -> str:
        return f"BlockContent({self.digest.hex()[:8]}, {len(self.token_ids)} tokens)"


def digest_of(parent_digest: bytes, token_ids: Seq[int], salt: str | None) -> bytes:
    """128-bit BLAKE2b of the parent's digest, the salt (first block only) and the token ids."""
    root = parent_digest or (
        b"\0" if salt is None else b"\1" + salt.encode("utf-8", "surrogatepass") + b"\0"
    )
    return blake2b(root + array("q", token_ids).tobytes(), digest_size=16).digest()


class MissCause(enum.StrEnum):
    """Why a prefix look-up ended where it did."""

    NONE = "whole prefix found"
    TOO_SHORT = "shorter than one block"
    DIFFERS = "differs"
    NEVER_SEEN = "never seen"
    DISABLED = "prefix caching is off"
    PROMPT_LOGPROBS = "prompt_logprobs needs every prompt token computed"
    SWAPPED = "its blocks came back from host memory"


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """How much of a prompt was found in the cache, and why not more."""

    num_tokens: int
    """Length of the prompt (and of what was generated before a preemption)."""
    num_hit_tokens: int
    """Tokens taken from the cache: a whole number of blocks, never the last token."""
    cause: MissCause
    block_index: int = 0
    """Index in the block table of the first block that missed."""
    position: int = 0
    """Position in the prompt of the first token that differs from the nearest cached block."""
    token_id: int | None = None
    cached_token_id: int | None = None
    """The prompt's token at `position`, and the cached one."""

    def __str__(self) -> str:
        hit = f"{self.num_hit_tokens} of {self.num_tokens} tokens came from the prefix cache"
        match self.cause:
            case MissCause.TOO_SHORT:
                return (
                    f"{hit}: its {self.num_tokens} tokens are shorter than one block and the last "
                    "token, which is always computed"
                )
            case MissCause.DIFFERS:
                return (
                    f"{hit}: block {self.block_index} is the first that differs, at position "
                    f"{self.position} (token {self.token_id}, cached: {self.cached_token_id})"
                )
            case MissCause.NEVER_SEEN:
                return f"{hit}: no block like block {self.block_index} is in the cache"
            case MissCause.NONE:
                return f"{hit}: all full blocks before the last token"
            case _:
                return f"{hit}: {self.cause}"


@dataclass(slots=True)
class PrefixCache:
    """Digest to block and back. It holds no references: the block pool says when a block's
    content is gone (`forget`)."""

    block_size: int
    content_of: dict[int, BlockContent] = field(default_factory=dict)
    """Block id to what it holds."""
    _block_of: dict[bytes, int] = field(default_factory=dict)
    _children: dict[tuple[bytes, str | None], dict[int, None]] = field(default_factory=dict)
    """(parent digest, salt) to the cached blocks behind it, latest last: for explanations."""

    def __len__(self) -> int:
        return len(self.content_of)

    def extend_contents(
        self, contents: list[BlockContent], token_ids: list[int], salt: str | None
    ) -> None:
        """Name the full blocks of `token_ids` that `contents` does not name yet, in place."""
        size = self.block_size
        parent = contents[-1] if contents else None
        for start in range(len(contents) * size, len(token_ids) - size + 1, size):
            tokens = tuple(token_ids[start : start + size])
            digest = digest_of(parent.digest if parent else b"", tokens, salt)
            parent = BlockContent(digest, parent, tokens, salt)
            contents.append(parent)

    def lookup(self, contents: list[BlockContent], num_tokens: int) -> list[int]:
        """Blocks that hold the longest cached prefix of a sequence of `num_tokens` tokens, leaving
        at least its last token to compute."""
        hits: list[int] = []
        parent: BlockContent | None = None
        for content in contents[: (num_tokens - 1) // self.block_size]:
            block = self._block_of.get(content.digest)
            if block is None or not self.content_of[block].continues(parent, content):
                break
            hits.append(block)
            parent = self.content_of[block]
        return hits

    def insert(self, content: BlockContent, block: int) -> bool:
        """Remember that `block` holds `content`. False when another block already does: the
        duplicate stays private, so that block tables only ever grow."""
        if content.digest in self._block_of or block in self.content_of:
            return False
        self._block_of[content.digest] = block
        self.content_of[block] = content
        self._children.setdefault(_family(content), {})[block] = None
        return True

    def forget(self, block: int) -> None:
        """The block's content is about to be overwritten."""
        content = self.content_of.pop(block)
        del self._block_of[content.digest]
        siblings = self._children[_family(content)]
        del siblings[block]
        if not siblings:
            del self._children[_family(content)]

    def explain(
        self, contents: list[BlockContent], token_ids: list[int], num_hits: int, salt: str | None
    ) -> PrefixLookup:
        """Why the look-up of these tokens ended after `num_hits` blocks, compared with the latest
        blocks that the cache holds there. Those of another salt are never looked at: whether they
        exist is another tenant's business."""
        size = self.block_size
        n, hit = len(token_ids), num_hits * size
        if n <= size:
            return PrefixLookup(n, 0, MissCause.TOO_SHORT)
        if num_hits == (n - 1) // size:
            return PrefixLookup(n, hit, MissCause.NONE, num_hits, hit)
        wanted = contents[num_hits].token_ids
        parent = contents[num_hits - 1].digest if num_hits else b""
        best, nearest = 0, None
        siblings = self._children.get((parent, salt), {})
        for block in islice(reversed(siblings), _MOST_COMPARED):
            cached = self.content_of[block]
            agree = next(
                (
                    i
                    for i, (a, b) in enumerate(zip(wanted, cached.token_ids, strict=True))
                    if a != b
                ),
                size,
            )
            if nearest is None or agree > best:
                best, nearest = agree, cached
        if nearest is None or best == size:
            return PrefixLookup(n, hit, MissCause.NEVER_SEEN, num_hits, hit)
        return PrefixLookup(
            n,
            hit,
            MissCause.DIFFERS,
            num_hits,
            hit + best,
            wanted[best],
            nearest.token_ids[best],
        )


def _family(content: BlockContent) -> tuple[bytes, str | None]:
    return content.parent.digest if content.parent else b"", content.salt
