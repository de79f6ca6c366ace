"""`ModelConfig`: the facts of shape that turn the one decoder into a model of the Llama family.

Read from the config.json of a Hugging Face directory or from the metadata of a GGUF file. Whatever
the decoder would compute wrongly is refused here, before a weight is read: unknown architectures,
rope scalings and activations, quantised checkpoints of other formats, numbers out of range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbengine.errors import UnsupportedModel
from nbengine.models.rope import (
    FrequencyDivisors,
    LinearScaling,
    RopeScaling,
    parse_rope_scaling,
)


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's name implies and its config.json does not say."""

    gguf_name: str
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama"),
    "MistralForCausalLM": _Family("llama"),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", qk_norm=True),
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
"""Names as they stand in `architectures` of a config.json."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and variants of one decoder. Biases and norms say which tensors exist."""

    architecture: str
    vocab_size: int
    """Rows of the embedding and of the output head; the tokenizer may know fewer."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    """The output head is the embedding matrix."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm over each head of q and k before the rotation (Qwen3)."""
    layer_windows: tuple[int | None, ...] = ()
    """For each layer, how many of the latest tokens (itself included) a token attends to; None
    for all. Left empty, no layer has a window."""
    eos_token_ids: frozenset[int] = frozenset()
    dtype: str | None = None
    """`bfloat16`, `float16` or `float32`: what the checkpoint was saved in, where it says so."""

    def __post_init__(self) -> None:
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModel(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModel(f"head_dim={self.head_dim} is odd: rope turns pairs")
        if self.rope_theta <= 1:
            raise UnsupportedModel(f"rope_theta={self.rope_theta:g} must be above 1")
        if isinstance(self.rope_scaling, FrequencyDivisors):
            divisors = self.rope_scaling.divisors
            if len(divisors) != self.head_dim // 2 or not all(0 < d < 1e9 for d in divisors):
                raise UnsupportedModel(
                    f"{len(divisors)} rope divisors from {min(divisors)} to {max(divisors)}: "
                    f"head_dim={self.head_dim} needs {self.head_dim // 2} positive ones"
                )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by its Hugging Face name, with its shape ([out, in])."""
        hidden, mlp = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = {
            "self_attn.q_proj": (self.q_size, hidden, self.qkv_bias),
            "self_attn.k_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.v_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, self.q_size, self.o_bias),
            "mlp.gate_proj": (mlp, hidden, self.mlp_bias),
            "mlp.up_proj": (mlp, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, mlp, self.mlp_bias),
        }
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (hidden,)
            shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
            if self.qk_norm:
                shapes[prefix + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[prefix + "self_attn.k_norm.weight"] = (self.head_dim,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
        return shapes

    @classmethod
    def from_hf(
        cls, data: Mapping[str, object], generation: Mapping[str, object] | None = None
    ) -> ModelConfig:
        """From a config.json (and generation_config.json, which may name more end-of-sequence
        tokens). Reads `rope_parameters` (transformers 5) as well as `rope_theta` and
        `rope_scaling`. Raises `UnsupportedModel`."""
        architecture = _architecture(data)
        family = _FAMILIES[architecture]
        _refuse_other_features(data)

        num_layers = _integer(data, "num_hidden_layers", high=10_000)
        hidden_size = _integer(data, "hidden_size")
        num_heads = _integer(data, "num_attention_heads")
        max_positions = _integer(data, "max_position_embeddings", 2048)
        rope = _mapping(data, "rope_parameters") or _mapping(data, "rope_scaling") or {}
        if _number(rope, "partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(
                f"partial_rotary_factor={rope['partial_rotary_factor']}: "
                "only full rotation (1.0) is supported"
            )
        bias = bool(data.get("attention_bias", False))
        eos = _token_ids(data.get("eos_token_id"))
        eos |= _token_ids((generation or {}).get("eos_token_id"))
        dtype = data.get("dtype", data.get("torch_dtype"))
        return cls(
            architecture=architecture,
            vocab_size=_integer(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(data, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(data, "num_key_value_heads", num_heads),
            head_dim=_integer(data, "head_dim", max(1, hidden_size // num_heads), high=1024),
            rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", _number(data, "rope_theta", 10_000.0)),
            rope_scaling=parse_rope_scaling(rope, max_positions),
            max_position_embeddings=max_positions,
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias and not family.qkv_bias,
            mlp_bias=bool(data.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            layer_windows=_layer_windows(data, architecture, num_layers),
            eos_token_ids=frozenset(eos),
            dtype=dtype if isinstance(dtype, str) else None,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        tensor_shapes: Mapping[str, tuple[int, ...]],
        rope_divisors: tuple[float, ...] | None = None,
    ) -> ModelConfig:
        """From a GGUF file's metadata, its tensors' shapes (by their names in the file; they tell
        the vocabulary's size, biases and tied embeddings) and its `rope_freqs.weight`.
        Raises `UnsupportedModel`."""
        arch = metadata.get("general.architecture")
        names = {f.gguf_name: a for a, f in reversed(_FAMILIES.items())}
        if not isinstance(arch, str) or arch not in names:
            raise UnsupportedModel(
                f"the GGUF file's architecture {arch!r} is not supported; supported are: "
                + ", ".join(sorted(names))
            )
        data = {
            key.removeprefix(f"{arch}."): value
            for key, value in metadata.items()
            if key.startswith(f"{arch}.")
        }
        if data.get("expert_count"):
            raise UnsupportedModel(
                f"expert_count={data['expert_count']}: mixtures of experts are not supported"
            )
        hidden_size = _integer(data, "embedding_length")
        num_heads = _integer(data, "attention.head_count")
        num_layers = _integer(data, "block_count", high=10_000)
        head_dim = _integer(
            data, "attention.key_length", max(1, hidden_size // num_heads), high=1024
        )
        if _integer(data, "rope.dimension_count", head_dim) != head_dim:
            raise UnsupportedModel(
                f"rope.dimension_count={data['rope.dimension_count']}: only the whole head "
                f"(head_dim={head_dim}) can be rotated"
            )
        max_positions = _integer(data, "context_length")
        window = _integer(data, "attention.sliding_window", 0, low=0) or None
        embedding = tensor_shapes.get("token_embd.weight", (0,))
        eos = _token_ids(metadata.get("tokenizer.ggml.eos_token_id"))
        eos |= _token_ids(metadata.get("tokenizer.ggml.eot_token_id"))
        return cls(
            architecture=names[arch],
            vocab_size=embedding[0] or _integer(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(data, "feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(data, "attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=_number(data, "attention.layer_norm_rms_epsilon", 1e-6),
            rope_theta=_number(data, "rope.freq_base", 10_000.0),
            rope_scaling=_gguf_rope_scaling(data, max_positions, rope_divisors),
            max_position_embeddings=max_positions,
            tie_word_embeddings="output.weight" not in tensor_shapes,
            qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
            o_bias="blk.0.attn_output.bias" in tensor_shapes,
            mlp_bias="blk.0.ffn_down.bias" in tensor_shapes,
            qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
            layer_windows=(window,) * num_layers,
            eos_token_ids=frozenset(eos),
        )


def _architecture(data: Mapping[str, object]) -> str:
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in _FAMILIES:
        raise UnsupportedModel(
            f"architecture {name!r} (model_type {data.get('model_type')!r}) is not supported; "
            "supported are: " + ", ".join(SUPPORTED_ARCHITECTURES)
        )
    return name


def _refuse_other_features(data: Mapping[str, object]) -> None:
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModel(f"hidden_act={activation!r} is not supported; supported is: silu")
    quantization = data.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UnsupportedModel(
            f"the checkpoint is quantised with {method!r}, which is not supported: load the "
            "original weights with quantization='int8' or 'int4', or a GGUF file"
        )


def _layer_windows(
    data: Mapping[str, object], architecture: str, num_layers: int
) -> tuple[int | None, ...]:
    """Sliding windows, where the family has them: Mistral in every layer; Qwen2 and Qwen3 only
    with `use_sliding_window`, in the layers of `layer_types`, or else from `max_window_layers`
    on."""
    window = _integer(data, "sliding_window", 0, low=0) or None
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if architecture == "LlamaForCausalLM" or not data.get("use_sliding_window"):
        return (None,) * num_layers
    kinds = data.get("layer_types")
    if kinds is None:
        first = _integer(data, "max_window_layers", 28, low=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or not set(kinds) <= {"full_attention", "sliding_attention"}
    ):
        raise UnsupportedModel(
            f"layer_types must name full_attention or sliding_attention for each of {num_layers} "
            f"layers, not {str(kinds)[:80]}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _gguf_rope_scaling(
    data: Mapping[str, object], max_positions: int, divisors: tuple[float, ...] | None
) -> RopeScaling | None:
    if divisors is not None:
        return FrequencyDivisors(divisors)
    if "rope.scaling.type" not in data and "rope.scale_linear" in data:
        return LinearScaling(_number(data, "rope.scale_linear"))
    names = {
        "type": "rope.scaling.type",
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    given = {name: data[key] for name, key in names.items() if key in data}
    return parse_rope_scaling(given, max_positions)


def _integer(
    data: Mapping[str, object],
    key: str,
    default: int | None = None,
    *,
    low: int = 1,
    high: int = 2**24,
) -> int:
    value = data.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        shown = "missing" if value is None else f"{value!r:.40}"
        raise UnsupportedModel(
            f"the model's {key} is {shown}, but must be an integer from {low} to {high}"
        )
    return value


def _number(data: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = data.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        shown = "missing" if value is None else f"{value!r:.40}"
        raise UnsupportedModel(f"the model's {key} is {shown}, but must be a positive number")
    return float(value)


def _mapping(data: Mapping[str, object], key: str) -> Mapping[str, object] | None:
    value = data.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UnsupportedModel(f"the model's {key} is {value!r:.40}, but must be an object")
    return value


def _token_ids(value: object) -> set[int]:
    """An id, a list of ids, or nothing."""
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0}


__all__ = ["SUPPORTED_ARCHITECTURES", "ModelConfig"]
