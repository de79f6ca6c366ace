"""The layout of the cache, and what moves in it."""

import pytest
import torch

from nbengine.errors import NotEnoughMemory
from nbengine.execution.kv_cache import KVCache, bytes_per_block
from nbengine.models.config import ModelConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=12,
    intermediate_size=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
)


def make_cache(num_blocks: int = 5, num_host_blocks: int = 3) -> KVCache:
    cache = KVCache.allocate(
        CONFIG, num_blocks, 8, torch.float32, "cpu", num_host_blocks=num_host_blocks
    )
    for part in (cache.data, cache.host):
        part.copy_(torch.arange(part.numel()).view_as(part))
    return cache


def test_each_layer_has_k_and_v_in_whole_blocks():
    cache = make_cache()
    assert len(cache.k) == len(cache.v) == 3
    for layer in (*cache.k, *cache.v):
        assert layer.shape == (5, 2, 8, 6)  # blocks, KV heads, slots, head_dim
        assert layer.is_contiguous()
    assert (cache.num_blocks, cache.num_host_blocks, cache.block_size) == (5, 3, 8)


def test_bytes_per_block_are_those_that_are_allocated():
    # K and V, 3 layers, 8 slots, 2 heads of 6 floats.
    assert bytes_per_block(CONFIG, 8, torch.float32) == 2 * 3 * 8 * 2 * 6 * 4
    assert make_cache().nbytes == 5 * bytes_per_block(CONFIG, 8, torch.float32)
    assert bytes_per_block(CONFIG, 8, torch.bfloat16) == 2 * 3 * 8 * 2 * 6 * 2


def test_a_copied_block_is_copied_in_every_layer_and_nothing_else_changes():
    cache = make_cache()
    before = cache.data.clone()
    cache.copy_blocks([(1, 4), (0, 2)])
    assert torch.equal(cache.data[:, :, [4, 2]], before[:, :, [1, 0]])
    assert torch.equal(cache.data[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])
    assert torch.equal(cache.k[2][4], before[2, 0, 1])


def test_all_sources_are_read_before_a_block_is_written():
    cache = make_cache()
    before = cache.data.clone()
    cache.copy_blocks([(0, 1), (1, 0)])
    assert torch.equal(cache.data[:, :, [0, 1]], before[:, :, [1, 0]])


def test_blocks_survive_a_round_trip_through_host_memory():
    cache = make_cache()
    before = cache.data.clone()
    cache.swap_out([(3, 0), (1, 2)])
    cache.data.zero_()
    cache.swap_in([(0, 4), (2, 0)])
    assert torch.equal(cache.data[:, :, [4, 0]], before[:, :, [3, 1]])
    assert not cache.data[:, :, [1, 2, 3]].any()


def test_too_large_a_cache_is_an_error_with_its_size():
    with pytest.raises(NotEnoughMemory, match=r"1000000000000 KV blocks.*GiB.*max_model_len"):
        KVCache.allocate(CONFIG, 10**12, 8, torch.float32, "cpu")
