"""The programs that kernel tests run: on the emulator everywhere, with all its checks on, and by
NVRTC where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.emulator import EmulatedProgram
from nbengine.kernels.op import Op
from nbengine.kernels.program import Program
from nbengine.kernels.source import Source
from tests.gpu import needs_gpu


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=needs_gpu)])
def program_for(request: pytest.FixtureRequest) -> Callable[[Op], Program]:
    """program_for(op) is the op's own source on one backend; a test that takes this fixture runs
    once on each."""
    if request.param == "cuda":
        from nbengine.kernels.launcher import CudaProgram

        return lambda op: CudaProgram(Source.of_op(op.source), torch.device("cuda"))
    return lambda op: EmulatedProgram(Source.of_op(op.source), checks=True)
