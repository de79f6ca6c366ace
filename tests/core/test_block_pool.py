"""The block pool: states, order of reuse, refusals; and a random walk beside a plain model."""

from __future__ import annotations

from collections import Counter
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from nbengine.core import prefix_cache
from nbengine.core.block_pool import BlockPool, HostPool, Refused
from nbengine.errors import CacheBusy


def content_of(pool, tokens, salt=None):
    contents = []
    pool.prefix_cache.extend_contents(contents, list(tokens), salt)
    return contents


class TestStates:
    def test_blocks_are_handed_out_from_0_on(self):
        pool = BlockPool(4, 16)
        assert pool.allocate(3) == [0, 1, 2]
        assert (pool.num_free, pool.num_cached, pool.num_held) == (1, 0, 3)

    def test_a_refusal_says_the_numbers_and_changes_nothing(self):
        pool = BlockPool(4, 16)
        pool.allocate(3)
        assert pool.allocate(2) == Refused(needed=2, available=1)
        assert (pool.num_free, pool.ref_counts) == (1, [1, 1, 1, 0])

    def test_a_block_is_free_when_its_last_holder_lets_go(self):
        pool = BlockPool(4, 16)
        table = pool.allocate(2)
        pool.share(table)
        pool.release(table)
        assert pool.num_held == 2
        pool.release(table)
        assert (pool.num_held, pool.num_free) == (0, 4)

    def test_releasing_too_often_is_a_bug_that_is_noticed(self):
        pool = BlockPool(4, 16)
        table = pool.allocate(1)
        pool.release(table)
        with pytest.raises(AssertionError, match="block 0 released more often"):
            pool.release(table)

    def test_a_remembered_block_stays_cached_and_can_be_shared_again(self):
        pool = BlockPool(4, 2)
        table = pool.allocate(1)
        (content,) = content_of(pool, [1, 2])
        assert pool.remember(content, table[0])
        pool.release(table)
        assert (pool.num_free, pool.cached_blocks()) == (3, (0,))
        assert pool.num_idle([0]) == 1
        pool.share([0])
        assert (pool.num_cached, pool.num_held) == (0, 1)
        pool.check_integrity()


class TestEviction:
    def filled(self):
        """Four cached blocks of two prefixes: 0 and 1 released first, then 2 and 3."""
        pool = BlockPool(4, 2)
        for prompt in ([1, 1, 2, 2], [3, 3, 4, 4]):
            table = pool.allocate(2)
            for content, block in zip(content_of(pool, prompt), table, strict=True):
                pool.remember(content, block)
            pool.release(table)
        return pool

    def test_the_longest_released_goes_first_and_a_tail_before_its_head(self):
        pool = self.filled()
        assert pool.cached_blocks() == (1, 0, 3, 2)
        assert pool.allocate(3) == [1, 0, 3]
        assert pool.evicted == [1, 0, 3]

    def test_use_makes_a_prefix_young_again(self):
        pool = self.filled()
        pool.share([0, 1])
        pool.release([0, 1])
        assert pool.allocate(2) == [3, 2]

    def test_free_blocks_go_before_cached_ones(self):
        pool = BlockPool(2, 2)
        (block,) = pool.allocate(1)
        pool.remember(content_of(pool, [1, 2])[0], block)
        pool.release([block])
        assert pool.allocate(1) == [1]
        assert pool.evicted == []

    def test_an_evicted_prefix_is_not_found(self):
        pool = self.filled()
        pool.allocate(1)
        assert pool.prefix_cache.lookup(content_of(pool, [1, 1, 2, 2, 9]), 5) == [0]

    def test_reset_frees_every_cached_block_and_refuses_while_one_is_held(self):
        pool = self.filled()
        pool.share([0])
        with pytest.raises(CacheBusy, match="1 of 4 blocks are held"):
            pool.reset_prefix_cache()
        assert pool.num_cached == 3 and len(pool.prefix_cache) == 4
        pool.release([0])
        assert pool.reset_prefix_cache() == 4
        assert (pool.num_free, len(pool.prefix_cache)) == (4, 0)
        pool.check_integrity()


SIZE = 2
TOKENS = st.integers(0, 1)  # so few that prompts meet all the time
SALTS = st.sampled_from([None, "", "a"])


class PoolAndCache(RuleBasedStateMachine):
    """Tables of random prompts in a pool, beside a model of plain dicts.

    The model keeps for each block what was written to it: the tokens of every position up to its
    end, with the salt. A hit is right if the model says that the block holds just that.
    """

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 10), digest_bits=st.sampled_from([0, 1, 128]))
    def start(self, num_blocks, digest_bits):
        self.pool = BlockPool(num_blocks, SIZE)
        real = prefix_cache.digest_of

        def tiny_digest(parent, tokens, salt):
            if digest_bits == 0:  # only the depth counts
                return bytes([len(parent) + 1]) * (len(parent) + 1)
            digest = int.from_bytes(real(parent, tokens, salt), "big") % 2**digest_bits
            return digest.to_bytes(16, "big")

        self.patch = patch.object(prefix_cache, "digest_of", tiny_digest)
        self.patch.start()
        self.written = {}  # block: (salt, all tokens up to its end)
        self.remembered = set()  # blocks whose content may be found again
        self.idle = []  # remembered blocks nobody holds, released longest ago first
        self.held = []  # every table: [salt, tokens, blocks]

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.stop()

    def take(self, n):
        """Allocate in the model and in the pool; the new blocks, or None."""
        available = self.pool.num_blocks - len(self.holders())
        free = available - len(self.idle)
        before = self.pool.ref_counts.copy()
        blocks = self.pool.allocate(n)
        if n > available:
            assert blocks == Refused(n, available) and self.pool.ref_counts == before
            return None
        assert len(set(blocks)) == n and not set(blocks) & self.holders().keys()
        evicted, self.idle = self.idle[: max(0, n - free)], self.idle[max(0, n - free) :]
        assert self.pool.evicted == evicted and set(evicted) <= set(blocks)
        self.pool.evicted.clear()
        self.remembered -= set(evicted)
        for block in blocks:
            self.written.pop(block, None)
        return blocks

    def holders(self):
        return Counter(block for _, _, blocks in self.held for block in blocks)

    def write(self, table):
        """Compute what the table's blocks lack."""
        salt, tokens, blocks = table
        for i, block in enumerate(blocks):
            past = (salt, tuple(tokens[: (i + 1) * SIZE]))
            if self.holders()[block] > 1:
                assert self.written[block] == past, "a shared block would be overwritten"
            self.written[block] = past

    @rule(target=tables, tokens=st.lists(TOKENS, min_size=1, max_size=9), salt=SALTS)
    def admit(self, tokens, salt):
        contents = content_of(self.pool, tokens, salt)
        hits = self.pool.prefix_cache.lookup(contents, len(tokens))
        assert len(hits) * SIZE < len(tokens), "the last token is always computed"
        for i, block in enumerate(hits):
            assert self.written[block] == (salt, tuple(tokens[: (i + 1) * SIZE])), "a wrong hit"
        why = self.pool.prefix_cache.explain(contents, tokens, len(hits), salt)
        assert why.num_hit_tokens == len(hits) * SIZE and str(why)
        num_idle = sum(block in self.idle for block in hits)
        assert self.pool.num_idle(hits) == num_idle
        needed = -(-len(tokens) // SIZE) - len(hits)
        if needed > self.pool.num_available - num_idle:
            return multiple()
        self.pool.share(hits)
        self.idle = [block for block in self.idle if block not in hits]
        table = [salt, tokens, hits]
        self.held.append(table)
        table[2] = hits + self.take(needed)
        self.write(table)
        return table

    @rule(table=tables)
    def remember(self, table):
        salt, tokens, blocks = table
        for i, content in enumerate(content_of(self.pool, tokens, salt)):
            if self.pool.remember(content, blocks[i]):
                assert blocks[i] not in self.remembered
                self.remembered.add(blocks[i])

    @rule(target=tables, table=tables)
    def fork(self, table):
        salt, tokens, blocks = table
        self.pool.share(blocks)
        child = [salt, list(tokens), list(blocks)]
        self.held.append(child)
        return child

    @rule(table=tables, token=TOKENS)
    def grow(self, table, token):
        """One more token: into a new block, or into the last one, copied if it is shared."""
        _, tokens, blocks = table
        if len(tokens) % SIZE == 0:
            new = self.take(1)
            if new is None:
                return
            blocks += new
        elif self.holders()[blocks[-1]] > 1:
            new = self.take(1)
            if new is None:
                return
            self.pool.release([blocks[-1]])
            blocks[-1:] = new
        tokens.append(token)
        self.write(table)

    @rule(table=consumes(tables))
    def release(self, table):
        blocks = table[2]
        self.held = [other for other in self.held if other is not table]
        self.pool.release(blocks)
        holders = self.holders()
        self.idle += [b for b in reversed(blocks) if b in self.remembered and not holders[b]]

    @rule()
    def reset(self):
        if self.held:
            with pytest.raises(CacheBusy):
                self.pool.reset_prefix_cache()
        else:
            assert self.pool.reset_prefix_cache() == len(self.idle)
            self.idle.clear()
            self.remembered.clear()

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def the_pool_agrees_with_the_model(self):
        pool, holders = self.pool, self.holders()
        pool.check_integrity()
        assert pool.ref_counts == [holders[b] for b in range(pool.num_blocks)]
        assert list(pool.cached_blocks()) == self.idle
        assert pool.num_held == len(holders)
        assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks
        assert set(pool.prefix_cache.content_of) == self.remembered
        for block, content in pool.prefix_cache.content_of.items():
            tokens, node = [], content
            while node is not None:
                tokens[:0] = node.token_ids
                node = node.parent
            assert self.written[block] == (content.salt, tuple(tokens))


TestPoolAndCache = PoolAndCache.TestCase
TestPoolAndCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_host_blocks_are_handed_out_lowest_first_whatever_came_before():
    pool = HostPool(6, 16)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(first)
    pool.release(second)
    assert (first, second) == ([0, 1], [2, 3])
    assert pool.allocate(5) == [0, 1, 2, 3, 4]
    pool.check_integrity()
