"""From a checkpoint's tensors to a `Decoder`, one tensor at a time.

A `Checkpoint` gives a config and tensors by their Hugging Face names; here is the one that reads
safetensors, and `gguf.py` has the other. `build_decoder` checks every name and shape against the
config before it reads a weight, then copies each tensor from the mapped file into its place in the
merged matrices, so that beside the model itself at most one matrix is held. No format that could
run code (pickle) is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import torch
from torch import Tensor

from nbengine.errors import WeightsError
from nbengine.models.config import ModelConfig
from nbengine.models.decoder import Decoder, Layer
from nbengine.models.linear import DenseLinear, Linear, make_linear, make_linear_from_gguf
from nbengine.models.ops import RmsNorm
from nbengine.models.rope import rope_table

Quantization = Literal["int8", "int4"]

HEAD_QUANTIZATION: dict[str | None, str | None] = {None: None, "int8": "int8", "int4": "int8"}
"""The output head keeps 8 bits when the layers go to 4: its rounding reaches the logits as it
is, with no later layer to average it out."""


class Checkpoint(Protocol):
    """Weights on disk."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor in the file by its Hugging Face name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU in a float dtype: a view of the file where that is possible."""
        ...

    def blocks(self, name: str) -> tuple[str, Tensor] | None:
        """If the tensor is stored as 4-bit GGUF blocks: their type, "Q4_0" or "Q4_1", and the
        blocks as uint8 `[out, bytes per row]`."""
        ...


class SafetensorsCheckpoint:
    """A Hugging Face directory: config.json and one or more .safetensors files, mapped."""

    def __init__(self, directory: Path) -> None:
        """Opens the files and reads their headers. Raises `WeightsError`, `UnsupportedModel`."""
        self.directory = directory
        generation = directory / "generation_config.json"
        self.config = ModelConfig.from_hf(
            _read_json(directory / "config.json"),
            _read_json(generation) if generation.is_file() else None,
        )
        self._files = [_open(path) for path in _weight_files(directory)]
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()
        }

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        if (
            tensor.data_ptr() % 16
        ):  # safetensors aligns to 8 bytes only, and kernels read 16 at once
            tensor = tensor.clone()
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise WeightsError(
                f"{self.directory}: tensor {name} is stored as {tensor.dtype}; float32, float16 "
                "and bfloat16 are read: is the checkpoint quantised?"
            )
        return tensor

    def blocks(self, name: str) -> tuple[str, Tensor] | None:
        return None


def build_decoder(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    device: torch.device | str = "cpu",
    max_positions: int | None = None,
    for_kernels: bool = False,
) -> Decoder:
    """Load the weights. `dtype` is that of activations, of the embedding and, without
    `quantization`, of the matrices. The rope table reaches to `max_positions` (by default the
    config's maximum). `for_kernels`: the engine's kernels will run the layers, on a GPU or emulated.
    Raises `WeightsError` if tensors are missing, superfluous or misshapen."""
    config = checkpoint.config
    _check_shapes(config, checkpoint.shapes)

    def vector(name: str) -> Tensor:
        return checkpoint.tensor(name).float().to(device)

    def linear(*names: str, quantization: str | None = quantization) -> Linear:
        return _merged_linear(checkpoint, names, dtype, quantization, device, for_kernels)

    def norm(name: str) -> RmsNorm:
        return RmsNorm(vector(name), config.rms_norm_eps)

    layers = []
    for index, window in enumerate(config.layer_windows):
        at = f"model.layers.{index}."
        qk_norm = None
        if config.qk_norm:
            q = vector(at + "self_attn.q_norm.weight").expand(config.num_heads, -1)
            k = vector(at + "self_attn.k_norm.weight").expand(config.num_kv_heads, -1)
            qk_norm = RmsNorm(torch.cat((q, k)), config.rms_norm_eps)
        layers.append(
            Layer(
                input_norm=norm(at + "input_layernorm.weight"),
                qkv=linear(*(f"{at}self_attn.{p}_proj" for p in "qkv")),
                o=linear(at + "self_attn.o_proj"),
                post_attention_norm=norm(at + "post_attention_layernorm.weight"),
                gate_up=linear(at + "mlp.gate_proj", at + "mlp.up_proj"),
                down=linear(at + "mlp.down_proj"),
                qk_norm=qk_norm,
                window=window,
            )
        )

    embedding_shape = (config.vocab_size, config.hidden_size)
    embedding = torch.empty(embedding_shape, dtype=dtype, device=device)
    embedding.copy_(checkpoint.tensor("model.embed_tokens.weight"))
    head_quantization = HEAD_QUANTIZATION[quantization]
    if config.tie_word_embeddings and head_quantization is None:
        head: Linear = DenseLinear(embedding, None)
    else:
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        head = linear(name, quantization=head_quantization)
    rope = rope_table(
        config.head_dim,
        config.rope_theta,
        config.rope_scaling,
        max_positions or config.max_position_embeddings,
        dtype=dtype,
        device=device,
    )
    return Decoder(config, embedding, layers, norm("model.norm.weight"), head, rope)


def _merged_linear(
    checkpoint: Checkpoint,
    names: tuple[str, ...],
    dtype: torch.dtype,
    quantization: str | None,
    device: torch.device | str,
    for_kernels: bool,
) -> Linear:
    """One linear of several that share their input: their rows one after another."""
    bias = None
    if f"{names[0]}.bias" in checkpoint.shapes:
        bias = torch.cat([checkpoint.tensor(f"{name}.bias").float() for name in names]).to(device)

    weights = [f"{name}.weight" for name in names]
    if quantization == "int4":
        raw = [checkpoint.blocks(name) for name in weights]
        kinds = {block[0] if block is not None else None for block in raw}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            rows = torch.cat([block[1] for block in raw if block is not None])
            rows = rows.to(device)
            return make_linear_from_gguf(rows, kind, bias, dtype, for_kernels=for_kernels)

    shapes = [checkpoint.shapes[name] for name in weights]
    # Quantisation rounds once, from float32; a dense matrix is filled in its own dtype.
    merged = torch.empty(
        (sum(shape[0] for shape in shapes), shapes[0][1]),
        dtype=torch.float32 if quantization else dtype,
        device=device,
    )
    parts = merged.split([shape[0] for shape in shapes])
    for part, name in zip(parts, weights, strict=True):
        part.copy_(checkpoint.tensor(name))
    return make_linear(merged, bias, quantization, dtype, for_kernels=for_kernels)


def _check_shapes(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor that the config implies, in its shape, and none that would change the model."""
    expected = config.tensor_shapes()
    problems = [
        f"{name} is missing (expected {list(shape)})"
        if name not in found
        else f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    # Old Llama checkpoints store the rope frequencies; tied ones may repeat the embedding.
    harmless = ("rotary_emb.inv_freq", "lm_head.weight")
    problems += [
        f"{name} is not part of a {config.architecture} with this config"
        for name in found
        if name not in expected and not name.endswith(harmless)
    ]
    if problems:
        shown = "; ".join(problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"the weights do not fit the config ({len(problems)} of {len(expected)} tensors): "
            f"{shown}{more}"
        )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise WeightsError(f"{index}: has no weight_map that names the files of the tensors")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # The index is somebody's file: it may not point outside the directory.
            if not name or Path(name).name != name:
                raise WeightsError(f"{index}: {name!r} is not the name of a file beside it")
        paths = [directory / name for name in names]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise WeightsError(
                f"{directory}: {len(missing)} of {len(paths)} weight files are missing: "
                + ", ".join(missing[:5])
            )
        return paths
    single = directory / "model.safetensors"
    paths = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not paths:
        pickles = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        why = (
            f"{pickles[0].name} is a pickle, which can run code when loaded: convert it"
            if pickles
            else "the directory holds a config.json but no weights"
        )
        raise WeightsError(f"{directory}: no .safetensors file; {why}")
    return paths


def _open(path: Path) -> Any:
    """A mapped safetensors file; its header (offsets, sizes, overlaps) is checked on opening."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except Exception as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise WeightsError(f"{path} holds no JSON object but a {type(data).__name__}")
    return data
