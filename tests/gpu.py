"""The marks of tests that need a GPU. tests/conftest.py skips these where there is none."""

from collections.abc import Callable
from typing import TypeVar

import pytest

Test = TypeVar("Test", bound=Callable[..., object])

needs_gpu = pytest.mark.gpu


def needs_gpu_alone(test: Test) -> Test:
    """It measures the GPU's free memory: nothing else may run there, no other worker of this run
    either. `pytest -n0 -m gpu_alone` runs these."""
    return needs_gpu(pytest.mark.gpu_alone(test))
