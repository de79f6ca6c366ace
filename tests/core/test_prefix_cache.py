"""The prefix cache: a hit is always right, and a miss can say why."""

from __future__ import annotations

import pytest

from nbengine.core import prefix_cache
from nbengine.core.prefix_cache import MissCause, PrefixCache, digest_of
from nbengine.core.sampling_params import SamplingParams


def cache_of(*prompts, block_size=4, salt=None):
    """A cache that holds all full blocks of the prompts, in blocks 0, 1, 2, ..."""
    cache = PrefixCache(block_size)
    for prompt in prompts:
        contents = []
        cache.extend_contents(contents, list(prompt), salt)
        for content in contents:
            cache.insert(content, len(cache))
    return cache


def look_up(cache, prompt, salt=None):
    contents = []
    cache.extend_contents(contents, list(prompt), salt)
    hits = cache.lookup(contents, len(prompt))
    return hits, cache.explain(contents, list(prompt), len(hits), salt)


@pytest.mark.parametrize(
    ("num_tokens", "num_hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (99, 3)]
)
def test_a_hit_is_whole_blocks_and_never_the_last_token(num_tokens, num_hits):
    hits, _ = look_up(cache_of(range(12)), range(num_tokens))
    assert hits == [0, 1, 2][:num_hits]


def test_a_block_counts_only_behind_the_same_blocks():
    cache = cache_of([1, 1, 1, 1, 2, 2, 2, 2])
    assert look_up(cache, [2, 2, 2, 2, 9])[0] == []
    assert look_up(cache, [3, 3, 3, 3, 2, 2, 2, 2, 9])[0] == []


@pytest.mark.parametrize("salts", [(None, ""), ("", "a"), ("a", "b"), (None, "a")])
def test_salts_never_meet(salts):
    theirs, ours = salts
    cache = cache_of(range(8), salt=theirs)
    hits, why = look_up(cache, range(9), salt=ours)
    assert hits == [] and why.cause is MissCause.NEVER_SEEN
    assert look_up(cache, range(9), salt=theirs)[0] == [0, 1]


def test_a_surrogate_in_a_salt_does_no_harm():
    assert look_up(cache_of(range(8), salt="\ud800"), range(9), salt="\ud800")[0] == [0, 1]


def test_digests_have_128_bits_and_depend_on_parent_tokens_and_salt():
    digests = {
        digest_of(b"", [1, 2], None),
        digest_of(b"", [2, 1], None),
        digest_of(b"", [1, 2], ""),
        digest_of(b"", [1, 2], "a"),
        digest_of(digest_of(b"", [1, 2], None), [1, 2], None),
    }
    assert len(digests) == 5
    assert {len(d) for d in digests} == {16}


def test_equal_digests_are_confirmed_by_tokens_salt_and_the_whole_chain(monkeypatch):
    monkeypatch.setattr(prefix_cache, "digest_of", lambda parent, tokens, salt: b"all the same")
    cache = cache_of(range(4))
    assert look_up(cache, [0, 1, 2, 3, 4])[0] == [0]
    assert look_up(cache, [0, 1, 2, 9, 4])[0] == []
    assert look_up(cache, [0, 1, 2, 3, 4], salt="a")[0] == []
    second = []
    cache.extend_contents(second, [9, 9, 9, 9, 0, 1, 2, 3], None)
    assert cache.lookup(second, 9) == [], "the same tokens behind other ones"
    assert not cache.insert(second[1], 7), "a taken digest is not overwritten"


def test_equal_blocks_behind_parents_of_equal_digests_are_told_apart(monkeypatch):
    monkeypatch.setattr(prefix_cache, "digest_of", lambda parent, tokens, salt: parent + b"+")
    cache = cache_of([1, 1, 1, 1])
    other = []
    cache.extend_contents(other, [2, 2, 2, 2, 7, 7, 7, 7], None)
    assert not cache.insert(other[0], 1) and cache.insert(other[1], 2)
    assert look_up(cache, [1, 1, 1, 1, 7, 7, 7, 7, 9])[0] == [0], "7777 was cached behind 2222"


def test_a_second_block_of_the_same_content_stays_private():
    cache = cache_of(range(4))
    contents = []
    cache.extend_contents(contents, [0, 1, 2, 3], None)
    assert not cache.insert(contents[0], 5)
    cache.forget(0)
    assert len(cache) == 0
    assert cache.insert(contents[0], 5)


def test_a_long_prompt_is_confirmed_in_one_walk_along_the_chain():
    comparisons = 0

    class Tokens(tuple):
        def __eq__(self, other):
            nonlocal comparisons
            comparisons += 1
            return tuple.__eq__(self, other)

        def __ne__(self, other):
            return not self == other

        __hash__ = tuple.__hash__

    cache = cache_of(range(4 * 500))
    for block, content in cache.content_of.items():
        object.__setattr__(content, "token_ids", Tokens(content.token_ids))
        assert block < 500
    hits, _ = look_up(cache, range(4 * 500 + 1))
    assert len(hits) == 500
    assert comparisons <= 2 * 500


class TestWhyItMissed:
    def test_shorter_than_one_block(self):
        _, why = look_up(cache_of(range(8)), range(4))
        assert why.cause is MissCause.TOO_SHORT
        assert "shorter than one block" in str(why)

    def test_all_that_could_be_found_was(self):
        _, why = look_up(cache_of(range(8)), range(9))
        assert (why.cause, why.num_hit_tokens) == (MissCause.NONE, 8)
        assert "8 of 9 tokens" in str(why)

    def test_the_first_token_that_differs_from_the_nearest_block(self):
        cache = cache_of([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 9, 9, 9])
        _, why = look_up(cache, [0, 1, 2, 3, 4, 5, 8, 8, 8])
        assert (why.cause, why.num_hit_tokens) == (MissCause.DIFFERS, 4)
        assert (why.block_index, why.position, why.token_id, why.cached_token_id) == (1, 6, 8, 6)
        assert "position 6 (token 8, cached: 6)" in str(why)

    def test_nothing_like_it_was_seen(self):
        _, why = look_up(cache_of(range(4)), range(9))
        assert (why.cause, why.block_index) == (MissCause.NEVER_SEEN, 1)
        assert "no block like block 1" in str(why)

    def test_another_tenants_blocks_are_never_mentioned_however_many(self):
        cache = cache_of(*([k] * 4 for k in range(200)), salt="theirs")
        contents = []
        cache.extend_contents(contents, [7, 7, 7, 7], "ours")
        cache.insert(contents[0], 999)
        more = []
        cache.extend_contents(more, [3] * 4, "theirs")
        _, why = look_up(cache, [7, 7, 8, 8, 8], salt="ours")
        assert (why.cause, why.position, why.cached_token_id) == (MissCause.DIFFERS, 2, 7)

    def test_an_explanation_compares_with_the_latest_blocks_only(self):
        cache = cache_of(*([k, 0, 0, 0] for k in range(1000)))
        _, why = look_up(cache, [999, 0, 5, 5, 5])
        assert (why.position, why.cached_token_id) == (2, 0)
        _, why = look_up(cache, [0, 0, 5, 5, 5])
        assert why.position == 0, "the block of 0s is too old to be looked at"

    def test_caching_is_off(self, bench):
        b = bench(num_blocks=100, enable_prefix_caching=False)
        b.add(40)
        assert b.step().admitted[0].prefix.cause is MissCause.DISABLED
        assert len(b.scheduler.pool.prefix_cache) == 0

    def test_a_swapped_out_sequence_asks_for_no_prefix(self, bench):
        b = bench(num_blocks=10, preemption_mode="swap", num_host_blocks=10)
        b.add(80)
        b.add(80)
        admissions = [a for r in b.run() for a in r.admitted]
        assert [(a.seq_id, a.resumed) for a in admissions][-1] == ("req-1", True)
        assert admissions[-1].prefix.cause is MissCause.SWAPPED
        assert "host memory" in str(admissions[-1].prefix)

    def test_prompt_logprobs_need_every_prompt_token_computed(self, bench):
        b = bench(num_blocks=100)
        b.add(range(40))
        b.run()
        b.add(range(40), params=SamplingParams(max_tokens=2, prompt_logprobs=1))
        record = b.step()
        assert record.scheduled == {"req-1": 40}
        assert record.admitted[0].prefix.cause is MissCause.PROMPT_LOGPROBS
        assert "prompt_logprobs" in str(record.admitted[0].prefix)
