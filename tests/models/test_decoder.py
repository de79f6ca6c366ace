"""The decoder computes what transformers computes, however the work is cut into steps."""

from pathlib import Path

import gguf
import pytest
import torch
import transformers

from nbengine.models.decoder import Decoder
from nbengine.models.registry import load_model, resolve_model
from tests.tiny_models import (
    CONFIGS,
    PagedRun,
    assert_same_logits,
    random_tokens,
    reference_logits,
    save_reference,
)

PROMPT = random_tokens(61)


@pytest.fixture(scope="session", params=sorted(CONFIGS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Decoder, torch.Tensor]:
    """A decoder of each family, and transformers' logits of PROMPT."""
    directory: Path = tmp_path_factory.mktemp("models")
    model = save_reference(request.param, directory)
    return load_model(directory / request.param), reference_logits(model, PROMPT)


def test_logits_of_a_whole_prompt_are_those_of_transformers(pair):
    decoder, expected = pair
    assert_same_logits(PagedRun(decoder).in_chunks(PROMPT, len(PROMPT)), expected)


def test_chunks_and_decodes_give_the_logits_of_one_shot(pair):
    decoder, expected = pair
    run = PagedRun(decoder)
    assert_same_logits(run.in_chunks(PROMPT, 7, 20, 1, 1, 13, 5), expected)


def test_sequences_in_a_mixed_batch_do_not_touch_each_other(pair):
    decoder, expected = pair
    run = PagedRun(decoder)
    long, other, short = run.sequence(PROMPT), run.sequence(PROMPT[::-1]), run.sequence(PROMPT[:30])
    first, _ = run.step((long, 40), (other, 25))  # prefills beside a chunk
    second, _, third = run.step((long, 1), (other, 36), (short, 29))  # decode, chunk, prefill
    fourth, fifth = run.step((short, 1), (long, 20))
    assert_same_logits(torch.cat((first, second, fifth)), expected)
    assert_same_logits(torch.cat((third, fourth)), expected[:30])


@pytest.mark.parametrize("block_size", [8, 16, 256])
def test_the_block_size_does_not_matter(tmp_path, block_size):
    model = save_reference("mistral", tmp_path)
    run = PagedRun(load_model(tmp_path / "mistral"), num_blocks=8, block_size=block_size)
    assert_same_logits(run.in_chunks(PROMPT, 50, 4), reference_logits(model, PROMPT))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32_closely(tmp_path, dtype):
    model = save_reference("qwen3", tmp_path)
    decoder = load_model(tmp_path / "qwen3", dtype=dtype)
    assert decoder.dtype == getattr(torch, dtype)
    logits = PagedRun(decoder).in_chunks(PROMPT, 40, 7)
    assert logits.dtype == torch.float32
    # bfloat16 has 8 bits: each of some twenty roundings on the way is 0.4%.
    assert_same_logits(logits, reference_logits(model, PROMPT), 0.2)


@pytest.fixture(scope="module")
def smollm2() -> Decoder:
    return load_model("smollm2-135m")


def smollm2_in_transformers(path: Path) -> transformers.PreTrainedModel:
    """transformers' Llama filled with the tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for tensor in reader.tensors:
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = torch.tensor(floats).reshape(*reversed(tensor.shape.tolist()))
        if "attn_q." in tensor.name or "attn_k." in tensor.name:
            # ggml keeps rope pairs side by side: row 2i is the i-th of the first half.
            heads = values.view(-1, 64, 576)
            values = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).reshape(-1, 576)
        state[tensor.name] = values
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"}
    names |= {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}
    filled = {"model.embed_tokens.weight": state["token_embd.weight"]}
    filled["model.norm.weight"] = state["output_norm.weight"]
    for layer in range(30):
        for ours, theirs in names.items():
            filled[f"model.layers.{layer}.{ours}.weight"] = state[f"blk.{layer}.{theirs}.weight"]
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # had no values on "meta"
    return model.eval()


def test_smollm2_agrees_with_transformers_on_the_same_file(smollm2):
    model = smollm2_in_transformers(resolve_model("smollm2-135m"))
    tokens = random_tokens(40, smollm2.config.vocab_size)
    ours = PagedRun(smollm2, block_size=16).in_chunks(tokens, 30, 5)
    assert_same_logits(ours, reference_logits(model, tokens))


def test_a_tied_embedding_is_held_once(smollm2):
    rope = 8192 * 2 * 64
    assert smollm2.nbytes == (134_515_008 + rope) * 4
