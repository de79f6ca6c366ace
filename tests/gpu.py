"""The marks of tests that need a GPU."""

import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., object])

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def needs_gpu_alone(test: Test) -> Test:
    """It measures the GPU's free memory: nothing else may run there, no other worker of this run
    either. `pytest -n0 -m gpu_alone` runs these."""
    is_alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"
    skip = pytest.mark.skipif(
        not torch.cuda.is_available() or not is_alone,
        reason="needs an NVIDIA GPU that no other worker uses: -n0 -m gpu_alone",
    )
    return skip(pytest.mark.gpu_alone(test))
