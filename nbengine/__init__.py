"""nbengine: an LLM inference engine that lives inside a notebook.

The names below are all that most users need. They are imported when first used, so that
`import nbengine` is quick and needs neither torch nor a notebook.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LLM": "nbengine.llm",
    "Engine": "nbengine.engine",
    "EngineConfig": "nbengine.config",
    "SamplingParams": "nbengine.core.sampling_params",
    "BeamSearchParams": "nbengine.core.sampling_params",
    "RequestOutputKind": "nbengine.core.sampling_params",
    "RequestOutput": "nbengine.outputs",
    "CompletionOutput": "nbengine.outputs",
    "Logprob": "nbengine.core.logprobs",
    "StepRecord": "nbengine.core.records",
    "Trace": "nbengine.core.trace",
    "Simulated": "nbengine.core.simulate",
    "simulate": "nbengine.core.simulate",
    "compare": "nbengine.core.compare",
    "NbengineError": "nbengine.errors",
}

__all__ = [
    "LLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "NbengineError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Simulated",
    "StepRecord",
    "Trace",
    "__version__",
    "compare",
    "load_ipython_extension",
    "simulate",
]

if TYPE_CHECKING:
    from nbengine.config import EngineConfig
    from nbengine.core.compare import compare
    from nbengine.core.logprobs import Logprob
    from nbengine.core.records import StepRecord
    from nbengine.core.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
    from nbengine.core.simulate import Simulated, simulate
    from nbengine.core.trace import Trace
    from nbengine.engine import Engine
    from nbengine.errors import NbengineError
    from nbengine.llm import LLM
    from nbengine.outputs import CompletionOutput, RequestOutput


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nbengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(ipython: Any) -> None:
    """`%load_ext nbengine`."""
    from nbengine.jupyter.extension import load_ipython_extension

    load_ipython_extension(ipython)
