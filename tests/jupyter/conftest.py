"""Engines without a model, and a way to wait for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.jupyter.scripted import ScriptedEngine


@pytest.fixture
def make_engine() -> Iterator[Callable[..., ScriptedEngine]]:
    """`make_engine(num_gpu_blocks_override=8, ...)`; closed after the test."""
    engines: list[ScriptedEngine] = []

    def make(**fields: Any) -> ScriptedEngine:
        engine = ScriptedEngine(model="scripted", **fields)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.runner.gate.set()
        engine.close()


def eventually(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until `holds()` is true, and return what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        value = holds()
        if value:
            return value
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)
