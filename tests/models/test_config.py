"""What a config.json or GGUF metadata means, and what is refused."""

import dataclasses

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nbengine.errors import UnsupportedModel
from nbengine.models.config import ModelConfig
from nbengine.models.rope import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    rope_table,
)
from tests.tiny_models import CONFIGS

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}


def test_absent_fields_have_the_meaning_they_have_in_transformers():
    config = ModelConfig.from_hf(
        {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rope_theta")}
    )
    assert config.num_kv_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10_000.0
    assert not config.tie_word_embeddings
    assert config.layer_windows == (None,) * 4


def test_rope_parameters_of_transformers_5_mean_the_same_as_the_older_fields():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 128}
    old = ModelConfig.from_hf(LLAMA | {"rope_scaling": scaling | {"type": "llama3"}})
    new = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    new["rope_parameters"] = scaling | {"rope_type": "llama3", "rope_theta": 5000.0}
    assert old == ModelConfig.from_hf(new)
    assert old.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 128)
    assert old.rope_theta == 5000.0


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rope_tables_are_those_of_transformers(name):
    theirs = CONFIGS[name]
    config = ModelConfig.from_hf(
        theirs.to_dict() | {"architectures": [type(theirs).__name__[:-6] + "ForCausalLM"]}
    )
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        frequencies, magnitude = config.rope_theta**-exponents, 1.0
    else:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    table = rope_table(
        config.head_dim,
        config.rope_theta,
        config.rope_scaling,
        200,
        dtype=torch.float32,
        device="cpu",
    )
    angles = torch.arange(200.0)[:, None] * frequencies
    half = config.head_dim // 2
    torch.testing.assert_close(table[:, 0, :half], angles.cos() * magnitude)
    torch.testing.assert_close(table[:, 1, half:], angles.sin() * magnitude)


def test_mistral_has_its_window_in_every_layer_and_llama_in_none():
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": 7}).layer_windows == (7,) * 4
    assert ModelConfig.from_hf(MISTRAL | {"sliding_window": None}).layer_windows == (None,) * 4
    assert ModelConfig.from_hf(LLAMA | {"sliding_window": 7}).layer_windows == (None,) * 4


def test_qwen_uses_its_window_only_when_told_and_from_max_window_layers_on():
    window = {"sliding_window": 7, "max_window_layers": 3}
    off = QWEN2 | window | {"use_sliding_window": False}
    assert ModelConfig.from_hf(off).layer_windows == (None,) * 4
    on = QWEN2 | window | {"use_sliding_window": True}
    assert ModelConfig.from_hf(on).layer_windows == (None, None, None, 7)
    kinds = ["sliding_attention", "full_attention"] * 2
    listed = ModelConfig.from_hf(on | {"layer_types": kinds})
    assert listed.layer_windows == (7, None, 7, None)


def test_biases_and_norms_follow_the_family():
    qwen2, qwen3 = ModelConfig.from_hf(QWEN2), ModelConfig.from_hf(QWEN3)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    llama = ModelConfig.from_hf(LLAMA | {"attention_bias": True})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, False)


def test_end_of_sequence_tokens_are_gathered_from_both_files():
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": 5}, {"eos_token_id": [6, 7]})
    assert config.eos_token_ids == {5, 6, 7}
    assert ModelConfig.from_hf(LLAMA).eos_token_ids == frozenset()


def test_parameters_are_counted_from_the_shapes():
    config = ModelConfig.from_hf(LLAMA)
    layer = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert config.num_parameters == 2 * 100 * 64 + 4 * layer + 64
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    assert tied.num_parameters == config.num_parameters - 100 * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*LlamaForCausalLM, Mistr"),
        ({"architectures": None}, "None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'.*linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor.*nan"),
        ({"rope_scaling": [2]}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0.*1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 2**63}, "hidden_size"),
        ({"vocab_size": "100"}, "vocab_size is '100'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "num_heads=4.*num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"rope_theta": 1.0}, "rope_theta=1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_what_the_decoder_would_compute_wrongly_is_refused_by_name(change, words):
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_hf(LLAMA | change)


GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 3,
}
TENSORS = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def test_gguf_metadata_means_the_same_as_the_config_json():
    from_gguf = ModelConfig.from_gguf(GGUF, TENSORS)
    from_hf = ModelConfig.from_hf(
        LLAMA | {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": [2, 3]}
    )
    assert from_gguf == from_hf


def test_a_gguf_files_tensors_tell_what_its_metadata_does_not():
    names = ["blk.0.attn_q.bias", "blk.0.attn_q_norm.weight"]
    shapes = {"token_embd.weight": (77, 64)} | dict.fromkeys(names, (64,))
    config = ModelConfig.from_gguf(GGUF, shapes)
    assert config.tie_word_embeddings
    assert config.vocab_size == 77
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (True, False, True)


def test_gguf_rope_scalings():
    def scaling(divisors=None, **more):
        given = GGUF | {f"llama.rope.scal{k}": v for k, v in more.items()}
        return ModelConfig.from_gguf(given, TENSORS, divisors).rope_scaling

    assert scaling() is None
    assert scaling(divisors=(1.0, 2.0) * 4) == FrequencyDivisors((1.0, 2.0) * 4)
    for wrong in ((1.0, 2.0), (1.0, 0.0) * 4, (1.0, float("nan")) * 4):
        with pytest.raises(UnsupportedModel, match=r"rope divisors.*needs 8 positive"):
            scaling(divisors=wrong)
    assert scaling(e_linear=4.0) == LinearScaling(4.0)
    linear = {"ing.type": "linear", "ing.factor": 2.0}
    assert scaling(**linear) == LinearScaling(2.0)
    yarn = {"ing.type": "yarn", "ing.factor": 4.0, "ing.original_context_length": 128}
    assert scaling(**yarn) == YarnScaling(4.0, 128, pytest.approx(1.1386, abs=1e-4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma2"}, "'gemma2'.*llama, qwen2, qwen3"),
        ({"general.architecture": ["llama"]}, "not supported"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8"),
        ({"llama.attention.head_count_kv": [2, 4]}, "head_count_kv"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    ],
)
def test_gguf_features_that_are_not_run_are_refused_by_name(change, words):
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_gguf(GGUF | change, TENSORS)
