"""GGUF files: header, metadata and tensors, mapped and read one at a time.

The header is read here and not by the `gguf` package, because a header is somebody's input: every
length, offset and product in it is checked against the file's size before it is used, so that a
truncated or hostile file ends in a `WeightsError` and neither in a long loop nor in a read beyond
the end. Dequantisation and the table of block formats are the package's.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from nbengine.errors import WeightsError
from nbengine.models.config import ModelConfig

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_DIVISORS = "rope_freqs.weight"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in the file."""

    name: str
    kind: str
    """Name of its format: F32, Q4_1, Q6_K, ..."""
    shape: tuple[int, ...]
    """Row-major, as in torch: [out, in] (the file has the reverse order)."""
    offset: int
    """From the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything before the tensors' data."""

    metadata: dict[str, object]
    """Numbers, strings, booleans and lists of them, by key."""
    tensors: dict[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Raises `WeightsError` for a file that is truncated, malformed or of another format."""
        return _HeaderReader(path, _map(path)).read()


class GgufCheckpoint:
    """A model in one .gguf file."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises `WeightsError`, `UnsupportedModel`."""
        self.path = path
        self.header = GgufHeader.read(path)
        self._data = _map(path)
        tensors = self.header.tensors
        divisors = None
        if _ROPE_DIVISORS in tensors:
            divisors = tuple(self._read(tensors[_ROPE_DIVISORS]).float().tolist())
        self.config = ModelConfig.from_gguf(
            self.header.metadata, {name: t.shape for name, t in tensors.items()}, divisors
        )
        self._tensors = {
            _hf_name(name): tensor for name, tensor in tensors.items() if name != _ROPE_DIVISORS
        }
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        # Converters interleave the two halves of each head's rows in q and k of this
        # architecture, for ggml's other order of rope pairs, and leave those of Qwen alone.
        self._is_interleaved = self.header.metadata["general.architecture"] == "llama"

    def tensor(self, name: str) -> Tensor:
        return self._in_half_split_order(name, self._read(self._tensors[name]))

    def blocks(self, name: str) -> tuple[str, Tensor] | None:
        tensor = self._tensors[name]
        if tensor.kind not in ("Q4_0", "Q4_1"):
            return None
        rows = torch.from_numpy(self._bytes(tensor).reshape(tensor.shape[0], -1))
        return tensor.kind, self._in_half_split_order(name, rows)

    def _bytes(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        return self._data[tensor.offset : tensor.offset + tensor.num_bytes]

    def _read(self, tensor: GgufTensor) -> Tensor:
        data = self._bytes(tensor)
        if tensor.kind in _FLOATS:
            return torch.from_numpy(data).view(_FLOATS[tensor.kind]).view(tensor.shape)
        try:
            num_rows = math.prod(tensor.shape[:-1])
            rows = dequantize(data.reshape(num_rows, -1), GGMLQuantizationType[tensor.kind])
        except NotImplementedError as error:
            raise WeightsError(
                f"{self.path}: tensor {tensor.name} has the format {tensor.kind}, which the gguf "
                "package can't dequantise"
            ) from error
        return torch.from_numpy(rows).view(tensor.shape)

    def _in_half_split_order(self, name: str, rows: Tensor) -> Tensor:
        """Undo the converters' order of q's and k's rows. It moves whole rows, so it serves
        quantised blocks as well as floats, and biases."""
        kind = name.rsplit(".", 2)[-2]
        if not self._is_interleaved or kind not in ("q_proj", "k_proj"):
            return rows
        num_heads = self.config.num_heads if kind == "q_proj" else self.config.num_kv_heads
        pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape)


class _HeaderReader:
    """A cursor over the file that never passes its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path = path
        self.data = memoryview(data.data)
        self.at = 0

    def read(self) -> GgufHeader:
        magic = bytes(self.take(4, "the magic number"))
        if magic != b"GGUF":
            raise self.error(f"starts with {magic!r} and not with b'GGUF': no GGUF file")
        version = self.number("<I", "the version")
        if version not in (2, 3):
            raise self.error(f"has GGUF version {version}; versions 2 and 3 are read")
        num_tensors = self.count("tensors", min_bytes=24)
        num_pairs = self.count("metadata entries", min_bytes=13)
        metadata: dict[str, object] = {}
        for _ in range(num_pairs):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.error(f"has the metadata key {key!r} twice")
            metadata[key] = self.value(self.number("<I", f"the type of {key!r}"), key)
        infos = [self.tensor_info() for _ in range(num_tensors)]

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"has general.alignment={alignment!r}, which is no power of two")
        start = -(-self.at // alignment) * alignment
        return GgufHeader(metadata, self.place(infos, start, alignment))

    def place(self, infos: list[GgufTensor], start: int, alignment: int) -> dict[str, GgufTensor]:
        """Tensors by name with offsets from the file's start; all inside the file, none over
        another."""
        tensors: dict[str, GgufTensor] = {}
        end = start
        for info in sorted(infos, key=lambda info: info.offset):
            offset = start + info.offset
            if info.name in tensors:
                raise self.error(f"has the tensor {info.name!r} twice")
            if info.offset % alignment or offset < end:
                raise self.error(
                    f"puts tensor {info.name!r} at offset {info.offset}, which overlaps another "
                    f"or is no multiple of {alignment}"
                )
            end = offset + info.num_bytes
            if end > len(self.data):
                raise self.error(
                    f"is truncated: tensor {info.name!r} ends at byte {end:,}, the file at "
                    f"{len(self.data):,}"
                )
            tensors[info.name] = GgufTensor(
                info.name, info.kind, info.shape, offset, info.num_bytes
            )
        return tensors

    def tensor_info(self) -> GgufTensor:
        name = self.string("a tensor's name")
        num_dims = self.number("<I", f"the dimensions of {name!r}")
        if not 1 <= num_dims <= 4:
            raise self.error(f"gives tensor {name!r} {num_dims} dimensions; 1 to 4 are possible")
        dims = [self.number("<Q", f"the shape of {name!r}") for _ in range(num_dims)]
        code = self.number("<I", f"the format of {name!r}")
        offset = self.number("<Q", f"the offset of {name!r}")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise self.error(f"gives tensor {name!r} the unknown format {code}") from None
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
        if min(dims) < 1 or dims[0] % values_per_block:
            raise self.error(
                f"gives tensor {name!r} the shape {dims[::-1]}: {kind.name} needs rows of a "
                f"multiple of {values_per_block} values"
            )
        num_bytes = math.prod(dims) // values_per_block * bytes_per_block  # no overflow in Python
        return GgufTensor(name, kind.name, tuple(reversed(dims)), offset, num_bytes)

    def value(self, code: int, key: str) -> object:
        if code == _STRING:
            return self.string(key)
        if code in _SCALARS:
            return self.number(_SCALARS[code], key)
        if code != _ARRAY:
            raise self.error(f"gives {key!r} the unknown type {code}")
        item = self.number("<I", f"the item type of {key!r}")
        if item == _STRING:
            return [self.string(key) for _ in range(self.count(f"items of {key!r}", 8))]
        if item not in _SCALARS:
            raise self.error(f"gives {key!r} items of type {item}; strings and numbers are read")
        dtype = np.dtype(_SCALARS[item])
        count = self.count(f"items of {key!r}", dtype.itemsize)
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype).tolist()

    def string(self, what: str) -> str:
        raw = self.take(self.number("<Q", f"the length of {what}"), what)
        return str(raw, "utf-8", "replace")  # a token may be half a character

    def count(self, what: str, min_bytes: int) -> int:
        """A number of things that take at least `min_bytes` each: more than fit are refused
        before a loop over them begins."""
        count: int = self.number("<Q", f"the number of {what}")
        if count * min_bytes > len(self.data) - self.at:
            raise self.error(
                f"claims {count:,} {what}, which can't fit into the "
                f"{len(self.data) - self.at:,} bytes left"
            )
        return count

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def take(self, size: int, what: str) -> memoryview:
        if size > len(self.data) - self.at:
            raise self.error(
                f"is truncated: {what} takes {size:,} bytes at offset {self.at:,}, the file has "
                f"{len(self.data):,}"
            )
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken

    def error(self, problem: str) -> WeightsError:
        return WeightsError(f"{self.path} {problem}")


def _hf_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; unknown ones stay."""
    stem, _, suffix = gguf_name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", stem)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{_HF_NAMES[stem]}.{suffix}" if stem in _HF_NAMES else gguf_name


def _map(path: Path) -> NDArray[np.uint8]:
    try:
        # Copy-on-write: torch wants writable memory, and the file must stay as it is.
        return np.memmap(path, dtype=np.uint8, mode="c").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
