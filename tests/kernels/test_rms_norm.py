"""RMSNorm against its reference, on every shape of its grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbengine.kernels import lab
from nbengine.kernels.op import Case, Op
from nbengine.kernels.ops.rms_norm import OP
from nbengine.kernels.program import Program


@pytest.mark.parametrize("case", list(OP.cases()), ids=lambda case: case.name)
def test_agrees_with_its_reference(program_for: Callable[[Op], Program], case: Case) -> None:
    lab.verify(OP, program_for(OP), [case])
