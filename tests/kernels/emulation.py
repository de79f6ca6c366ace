"""Small kernels for the emulator's tests: compiled from text, launched, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbengine.kernels.emulator import EmulatedKernel, EmulatedProgram, EmulationError
from nbengine.kernels.program import Kernel
from nbengine.kernels.source import Source

NAME = "planted.cu"


def kernel(text: str, expression: str = "kernel", *, checks: bool = True) -> Kernel:
    return EmulatedProgram(Source(text, NAME), checks=checks).kernel(expression)


def traced(text: str, expression: str = "kernel") -> EmulatedKernel:
    return EmulatedKernel(Source(text, NAME), expression, checks=True)


def line_of(text: str, mark: str = "// here") -> int:
    """The number of the line that ends with the mark."""
    (line,) = (i for i, line in enumerate(text.splitlines(), 1) if line.endswith(mark))
    return line


def accused(
    text: str, grid: Any, block: Any, *arguments: Any, kind: str, shared_bytes: int = 0
) -> EmulationError:
    """The error of a kernel that must be caught, at the line that ends with `// here`, and with the
    other thread at the line that ends with `// there`, if one does. Which of two threads in a race
    comes second is the emulator's choice."""
    with pytest.raises(EmulationError) as caught:
        kernel(text)[grid, block, shared_bytes](*arguments)
    error = caught.value
    assert error.kind == kind, str(error)
    places = [(place.file, place.line) for place in (error.place, error.other_place) if place]
    assert (NAME, line_of(text)) in places, str(error)
    if "// there" in text:
        assert sorted(places) == sorted((NAME, line_of(text, m)) for m in ("// here", "// there"))
    return error


def floats(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan)


def ints(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32)
