"""Errors reach whoever waits for them, from another process too."""

from __future__ import annotations

import pickle

import pytest

from nbengine import errors
from nbengine.kernels import CompileError, Diagnostic
from nbengine.kernels.emulator import EmulationError, Place
from nbengine.kernels.lab import Mismatch

REMARK = Diagnostic("t.cu", 1, 3, "error", "no such thing")
PLACE = Place("t.cu", 1, "text")
WHERE = {"kernel": "f", "block": (0, 0, 0), "thread": (1, 0, 0), "place": PLACE}


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidField("top_k", -5, "too small"),
        errors.RequestTooLarge("too large", needed=3, available=2),
        errors.UnknownRequest("no req-1"),
        errors.ModelNotFound("no such model"),
        CompileError("f of t.cu", [REMARK], {"t.cu": "text"}, "a log"),
        Mismatch("out[1] is 3", "out", (1,), 3.0, 2.0),
        EmulationError("race", "reads", **WHERE),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_after_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))
