"""GGUF files: the same model as its safetensors, and clean errors for damaged ones."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize

from nbengine.errors import NbengineError, UnsupportedModel, WeightsError
from nbengine.models.gguf import GgufCheckpoint, GgufHeader
from nbengine.models.registry import load_model
from tests.tiny_models import (
    PagedRun,
    assert_same_logits,
    make_reference,
    random_tokens,
    reference_logits,
)

PROMPT = random_tokens(40)
Kind = gguf.GGMLQuantizationType
NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    found = next(ours for theirs, ours in NAMES.items() if stem.endswith(theirs))
    layer = stem.split(".")[2] if "layers" in stem else None
    return f"blk.{layer}.{found}.{suffix}" if layer else f"{found}.{suffix}"


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    arch: str,
    kind: Kind = Kind.F32,
    rope_divisors: torch.Tensor | None = None,
) -> None:
    """What a converter writes: for "llama", q and k with each head's rope pairs side by side."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    writer.add_eos_token_id(2)
    writer.add_token_list(["a", "b", "é"])
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            is_q = "q_proj" in name
            heads = config.num_attention_heads if is_q else config.num_key_value_heads
            halves = values.view(heads, 2, -1, *values.shape[1:])
            values = halves.transpose(1, 2).reshape(values.shape)
        array = values.numpy()
        if array.ndim == 2:
            writer.add_tensor(gguf_name(name), quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def wide() -> transformers.PreTrainedModel:
    """A Llama whose rows are whole blocks of 32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("llama2", "llama"),
        ("llama-biases", "llama"),
        ("llama-tied-odd-sizes", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, name, arch):
    model = make_reference(name)
    write_gguf(tmp_path / "model.gguf", model, arch)
    ours = PagedRun(load_model(tmp_path / "model.gguf")).in_chunks(PROMPT, 25, 5)
    assert_same_logits(ours, reference_logits(model, PROMPT))


def test_llama_3_scaling_comes_as_divisors_of_the_frequencies(tmp_path):
    model = make_reference("llama3")
    default = torch.arange(0, 8, 2).float() / 8
    divisors = 500.0**-default / model.model.rotary_emb.inv_freq
    assert divisors.max() > 1.5
    write_gguf(tmp_path / "model.gguf", model, "llama", rope_divisors=divisors)
    ours = PagedRun(load_model(tmp_path / "model.gguf")).in_chunks(PROMPT, 25, 5)
    assert_same_logits(ours, reference_logits(model, PROMPT))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_1"])
def test_quantised_files_give_the_logits_of_their_dequantised_weights(tmp_path, wide, kind):
    kind = Kind[kind]
    write_gguf(tmp_path / "model.gguf", wide, "llama", kind)
    state = {
        name: torch.tensor(dequantize(quantize(t.numpy(), kind), kind)) if t.ndim == 2 else t
        for name, t in wide.state_dict().items()
    }
    rounded = transformers.LlamaForCausalLM(wide.config).eval()
    rounded.load_state_dict(state)
    ours = PagedRun(load_model(tmp_path / "model.gguf")).in_chunks(PROMPT, 25, 5)
    assert_same_logits(ours, reference_logits(rounded, PROMPT))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_raw_4_bit_blocks_have_their_rows_in_the_same_order_as_the_floats(tmp_path, wide, kind):
    write_gguf(tmp_path / "model.gguf", wide, "llama", Kind[kind])
    checkpoint = GgufCheckpoint(tmp_path / "model.gguf")
    names = [n for n in checkpoint.shapes if n.endswith("proj.weight")]
    assert len(names) == 2 * 7
    for name in names:
        found, blocks = checkpoint.blocks(name)
        assert found == kind
        floats = torch.tensor(dequantize(blocks.numpy(), Kind[kind]))
        assert torch.equal(floats, checkpoint.tensor(name))
    assert checkpoint.blocks("model.norm.weight") is None


def test_int4_keeps_the_files_own_codes(tmp_path, wide):
    write_gguf(tmp_path / "model.gguf", wide, "llama", Kind.Q4_1)
    dense = PagedRun(load_model(tmp_path / "model.gguf")).in_chunks(PROMPT, 40)
    int4 = PagedRun(load_model(tmp_path / "model.gguf", quantization="int4"))
    # Only the output head and bfloat16 round once more; quantising anew would be 0.1 and worse.
    assert_same_logits(int4.in_chunks(PROMPT, 40), dense, 0.06)


@pytest.fixture(scope="session")
def file(tmp_path_factory, wide) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, wide, "llama", Kind.Q4_0)
    return path


def test_the_header_says_what_the_gguf_package_reads(file):
    header, reader = GgufHeader.read(file), gguf.GGUFReader(file)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert header.metadata[name] == field.contents(), name
    assert len(header.tensors) == len(reader.tensors) == 21
    for tensor in reader.tensors:
        ours = header.tensors[tensor.name]
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert (ours.kind, ours.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert ours.num_bytes == tensor.n_bytes


def test_a_truncated_file_is_an_error_that_says_where_it_ends(file, tmp_path):
    data = file.read_bytes()
    header_end = min(t.offset for t in GgufHeader.read(file).tensors.values())
    path = tmp_path / "short.gguf"
    for size in [*range(0, header_end, 13), header_end, len(data) // 2, len(data) - 64]:
        path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=r"short.gguf"):
            GgufCheckpoint(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=rf"ends at byte .*, the file at {len(data) // 2:,}"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("value", [2**63 - 1, 2**64 - 1, 2**63, 2**32, 2**40 + 7, 0, 1])
def test_a_hostile_length_anywhere_in_the_header_ends_cleanly(file, tmp_path, value):
    data = file.read_bytes()
    header_end = min(t.offset for t in GgufHeader.read(file).tensors.values())
    path = tmp_path / "hostile.gguf"
    for at in range(8, header_end - 8, 5):
        path.write_bytes(data[:at] + struct.pack("<Q", value) + data[at + 8 :])
        try:
            load_model(path)
        except NbengineError:
            continue


def test_counts_that_can_not_be_are_refused_before_a_loop_over_them(file, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "hostile.gguf"
    for at, what in ((8, "tensors"), (16, "metadata entries")):
        path.write_bytes(data[:at] + struct.pack("<Q", 2**63 - 1) + data[at + 8 :])
        with pytest.raises(WeightsError, match=f"claims 9,223,372,036,854,775,807 {what}"):
            GgufCheckpoint(path)


def test_random_damage_never_escapes_as_another_error(file, tmp_path):
    data = file.read_bytes()
    header_end = min(t.offset for t in GgufHeader.read(file).tensors.values())
    path = tmp_path / "damaged.gguf"
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 4))):
            damaged[rng.randrange(header_end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(path)
        except NbengineError:
            continue


def spoiled(file: Path, tmp_path: Path, old: bytes, new: bytes) -> Path:
    data = file.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path = tmp_path / "spoiled.gguf"
    path.write_bytes(data.replace(old, new))
    return path


def tensor_info(file: Path, name: str) -> tuple[bytes, bytes]:
    """A tensor's info as it stands in the header: up to its offset, and its offset."""
    data = file.read_bytes()
    at = data.index(struct.pack("<Q", len(name)) + name.encode())
    end = at + 8 + len(name) + 4 + 2 * 8 + 4
    return data[at:end], data[end : end + 8]


def test_overlapping_tensors_and_products_beyond_64_bits_are_refused(file, tmp_path):
    info, offset = tensor_info(file, "blk.1.attn_q.weight")
    _, other = tensor_info(file, "blk.1.attn_k.weight")
    path = spoiled(file, tmp_path, info + offset, info + other)
    with pytest.raises(WeightsError, match=r"overlaps another"):
        GgufCheckpoint(path)
    huge = info[:-20] + struct.pack("<QQ", 2**33, 2**33) + info[-4:]  # 2**66 values
    path = spoiled(file, tmp_path, info + offset, huge + offset)
    with pytest.raises(WeightsError, match=r"is truncated: tensor 'blk.1.attn_q.weight' ends at"):
        GgufCheckpoint(path)
    odd = info[:-20] + struct.pack("<QQ", 63, 64) + info[-4:]
    path = spoiled(file, tmp_path, info + offset, odd + offset)
    with pytest.raises(WeightsError, match=r"\[64, 63\]: Q4_0 needs rows of a multiple of 32"):
        GgufCheckpoint(path)
    unknown = info[:-4] + struct.pack("<I", 77)
    path = spoiled(file, tmp_path, info + offset, unknown + offset)
    with pytest.raises(WeightsError, match="unknown format 77"):
        GgufCheckpoint(path)


def test_tensors_that_do_not_fit_the_metadata_are_named(file, tmp_path):
    path = spoiled(file, tmp_path, b"blk.1.attn_q.weight", b"blk.1.attn_z.weight")
    with pytest.raises(WeightsError, match=r"layers.1.self_attn.q_proj.weight is missing"):
        load_model(path)
    key = b"llama.block_count"
    data = file.read_bytes()
    at = data.index(key) + len(key)
    path = spoiled(file, tmp_path, data[at - 17 : at + 8], key + struct.pack("<II", 4, 3))
    with pytest.raises(WeightsError, match=r"model.layers.2.input_layernorm.weight is missing"):
        load_model(path)


def test_other_formats_and_architectures_are_refused_by_name(file, tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"\x93NUMPY" + bytes(100))
    with pytest.raises(WeightsError, match="no GGUF file"):
        load_model(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(100))
    with pytest.raises(WeightsError, match="version 1"):
        load_model(path)
    path = spoiled(file, tmp_path, b"\x05\0\0\0\0\0\0\0llama\x11", b"\x05\0\0\0\0\0\0\0gemma\x11")
    with pytest.raises(UnsupportedModel, match=r"'gemma'.*llama, qwen2, qwen3"):
        load_model(path)


def test_arrays_and_scalars_of_every_type_are_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    values = {
        "uint8": 200,
        "int8": -3,
        "uint16": 60_000,
        "int16": -300,
        "uint32": 4_000_000_000,
        "int32": -70_000,
        "uint64": 2**63,
        "int64": -(2**40),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "ünïcode",
        "array": [1, 2, 3],
    }
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_array("test.floats", [0.5, 1.5])
    writer.add_array("test.words", ["a", "", "é"])
    writer.add_tensor("x", np.ones((2, 3), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = GgufHeader.read(tmp_path / "all.gguf")
    for kind, value in values.items():
        assert header.metadata[f"test.{kind}"] == value
    assert header.metadata["test.floats"] == [0.5, 1.5]
    assert header.metadata["test.words"] == ["a", "", "é"]
    assert header.tensors["x"].shape == (2, 3)
