"""Safetensors directories: what is read, what is refused, and that hostile files end cleanly."""

import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbengine.errors import ModelNotFound, NbengineError, WeightsError
from nbengine.models.registry import load_model
from nbengine.models.weights import SafetensorsCheckpoint
from tests.tiny_models import PagedRun, assert_same_logits, random_tokens, save_reference

PROMPT = random_tokens(20)


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    save_reference("qwen2-windows", directory)
    return directory / "qwen2-windows"


@pytest.fixture
def directory(original, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def logits(directory: Path, **options: object) -> torch.Tensor:
    return PagedRun(load_model(directory, **options)).in_chunks(PROMPT, 20)


def test_shards_are_the_same_model(original, tmp_path):
    model = save_reference("qwen2-windows", tmp_path, max_shard_size="40KB")
    shards = list((tmp_path / "qwen2-windows").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert model is not None
    assert torch.equal(logits(tmp_path / "qwen2-windows"), logits(original))


def test_half_precision_files_are_converted_to_the_dtype_asked_for(directory):
    path = directory / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    decoder = load_model(directory, dtype="float32")
    assert decoder.dtype == torch.float32
    rounded = tensors["model.embed_tokens.weight"].float()
    assert torch.equal(decoder.embedding, rounded)


def test_matrices_are_merged_in_the_order_that_the_decoder_splits_them(directory):
    tensors = load_file(directory / "model.safetensors")
    qkv = load_model(directory).layers[1].qkv
    out = qkv(torch.eye(48)[:1])
    names = [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
    want = torch.cat([tensors[f"{n}.weight"][:, 0] + tensors[f"{n}.bias"] for n in names])
    torch.testing.assert_close(out[0], want)


def test_weights_are_copied_out_of_the_file(directory):
    before = load_model(directory)
    run = PagedRun(before)
    path = directory / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert run.in_chunks(PROMPT, 20).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight is missing \(expected \[48\]\)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(84, 47)}),
            r"up_proj.weight has shape \[84, 47\], expected \[84, 48\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}),
            "q_norm.weight is not part of a Qwen2ForCausalLM",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}),
            "model.norm.weight is stored as torch.int32",
        ),
        (lambda t: t.clear(), "39 of 39"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(directory, change, words):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=words):
        load_model(directory)


def test_leftovers_that_change_nothing_are_passed_over(directory):
    path = directory / "model.safetensors"
    want = logits(directory)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(load_file(path) | extra, path)
    assert torch.equal(logits(directory), want)


def test_a_truncated_file_is_an_error_with_its_size(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(WeightsError, match=rf"model.safetensors \({size:,} bytes\)"):
            load_model(directory)


def test_hostile_headers_end_in_an_error(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    body = data[8 + size :]
    header = json.loads(data[8 : 8 + size])

    def write(header: object) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    def changed(**fields: object) -> dict[str, object]:
        name = "model.layers.0.mlp.up_proj.weight"
        return header | {name: header[name] | fields}

    start, end = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    hostile = [
        changed(data_offsets=[start, 2**63 - 1]),
        changed(data_offsets=[start - 8, end]),  # over its neighbour
        changed(data_offsets=[end, start]),
        changed(data_offsets=[-1, end]),
        changed(shape=[2**32, 2**32]),  # the product is 0 in 64 bits
        changed(shape=[2**63, 2]),
        changed(dtype="F99"),
        changed(shape="84"),
        b"[" * 100_000,
        b"\xff" * 100,
        b"{}",
    ]
    for entry in hostile:
        write(entry)
        with pytest.raises(WeightsError):
            load_model(directory)
    for length in (2**63 - 1, 2**64 - 1, len(data), 0):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(WeightsError):
            load_model(directory)


def test_random_damage_to_the_header_never_escapes_as_another_error(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            damaged[rng.randrange(8 + size)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_model(directory)
        except NbengineError:
            continue


def test_an_index_may_not_point_outside_its_directory(directory):
    index = directory / "model.safetensors.index.json"
    for name in ("../other.safetensors", "/etc/passwd", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(WeightsError, match="not the name of a file beside it"):
            load_model(directory)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(WeightsError, match="2 of 2 weight files are missing: one"):
        load_model(directory)
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(WeightsError, match="no weight_map"):
        load_model(directory)


def test_pickles_are_never_read(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(WeightsError, match=r"pytorch_model.bin is a pickle"):
        load_model(directory)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": ' * 100_000, "\x00"])
def test_an_unreadable_config_is_an_error(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config.json"):
        load_model(directory)


def test_a_directory_without_a_config_is_no_model(directory):
    (directory / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config.json"):
        load_model(directory)


def test_half_the_files_of_a_model_are_missed(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds a config.json but no weights"):
        load_model(directory)


def test_logits_are_those_of_the_model_that_was_saved(original, tmp_path):
    again = save_reference("qwen2-windows", tmp_path)
    with torch.inference_mode():
        want = again(input_ids=torch.tensor([PROMPT])).logits[0]
    assert_same_logits(logits(original), want)


def test_tensors_are_aligned_whatever_the_files_header(tmp_path, tiny_llama):
    """safetensors pads its header to 8 bytes; the engine's kernels read 16 at once."""
    seen = set()
    for i in range(4):
        folder = tmp_path / str(i)
        folder.mkdir()
        name = "weight" + "x" * 8 * i
        save_file({name: torch.arange(64.0)}, folder / "model.safetensors")
        shutil.copy(tiny_llama / "config.json", folder)
        length = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
        seen.add((8 + length) % 16)
        tensor = SafetensorsCheckpoint(folder).tensor(name)
        assert tensor.data_ptr() % 16 == 0 and torch.equal(tensor, torch.arange(64.0))
    assert seen == {0, 8}, "of both kinds"
