"""The pool of KV blocks: reference counts, and who gets a block next.

A block is in exactly one of three states, and `num_free + num_cached + num_held == num_blocks`:
held (reference count above zero: that many block tables name it), cached (nobody holds it, but it
keeps a prefix that may be asked for again) or free (holds nothing of use). Free blocks are handed
out first; when there are none, the cached block that was released longest ago is evicted.

Every verb here either does all of what it says or, refused, nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbengine.core.prefix_cache import BlockContent, PrefixCache
from nbengine.errors import CacheBusy


@dataclass(frozen=True, slots=True)
class Refused:
    """A request for blocks that could not be granted."""

    needed: int
    available: int


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each, named 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self.prefix_cache = PrefixCache(block_size)
        self.evicted: list[int] = []
        """Blocks evicted since the list was last emptied by its reader."""
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: 0 comes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # released longest ago first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def free_blocks(self) -> tuple[int, ...]:
        """Blocks that hold nothing of use; the last is handed out next."""
        return tuple(self._free)

    def cached_blocks(self) -> tuple[int, ...]:
        """Blocks nobody holds that keep a prefix, next to be evicted first."""
        return tuple(self._cached)

    def allocate(self, n: int) -> list[int] | Refused:
        """Take `n` blocks, each with a reference count of one."""
        if n > self.num_available:
            return Refused(n, self.num_available)
        blocks = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self.prefix_cache.forget(block)
                self.evicted.append(block)
            self.ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take one more reference to each block: a prefix hit, or a fork."""
        for block in blocks:
            if self.ref_counts[block] == 0:
                del self._cached[block]
            self.ref_counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Give back one reference to each block of a table. Last block first, so that of a cached
        prefix the tail is evicted before the head that other prompts may share."""
        for block in reversed(blocks):
            count = self.ref_counts[block] - 1
            assert count >= 0, f"block {block} released more often than it was taken"
            self.ref_counts[block] = count
            if count == 0:
                if block in self.prefix_cache.content_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody holds: sharing them makes them unavailable."""
        return sum(self.ref_counts[block] == 0 for block in blocks)

    def remember(self, content: BlockContent, block: int) -> bool:
        """Enter a held, fully computed block into the prefix cache. False for a duplicate."""
        return self.prefix_cache.insert(content, block)

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix; returns how many blocks that freed.

        Raises:
            CacheBusy: while any sequence holds blocks, since what it computes next would be
                entered behind prefixes that are gone.
        """
        if self.num_held:
            raise CacheBusy(
                f"{self.num_held} of {self.num_blocks} blocks are held by running sequences; let "
                "them finish or abort them, then reset the prefix cache"
            )
        blocks = list(self._cached)
        for block in blocks:
            self.prefix_cache.forget(block)
        self._cached.clear()
        self._free.extend(reversed(blocks))
        return len(blocks)

    def restore(
        self,
        ref_counts: list[int],
        free: Iterable[int],
        cached: Iterable[int],
        contents: Mapping[int, BlockContent],
    ) -> None:
        """Take over what another pool of this size held, each collection in that one's order."""
        assert len(ref_counts) == self.num_blocks and not self.num_held and not self.num_cached
        self.ref_counts = ref_counts
        self._free, self._cached = list(free), OrderedDict.fromkeys(cached)
        for block, content in contents.items():
            self.prefix_cache.insert(content, block)

    def check_integrity(self) -> None:
        """Assert the invariants of the module's first paragraph."""
        free, cached = set(self._free), set(self._cached)
        held = {b for b, count in enumerate(self.ref_counts) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached and not free & held and not cached & held
        assert len(free) + len(cached) + len(held) == self.num_blocks
        assert all(count >= 0 for count in self.ref_counts)
        content_of = self.prefix_cache.content_of
        assert cached <= content_of.keys(), "a cached block without content"
        assert not free & content_of.keys(), "a free block with content"


class HostPool(BlockPool):
    """Blocks of host memory. The lowest ones are handed out first, whatever came before: so what
    sequences hold tells all there is to know, and no record need keep a second free list."""

    def release(self, blocks: list[int]) -> None:
        super().release(blocks)
        self._free.sort(reverse=True)
