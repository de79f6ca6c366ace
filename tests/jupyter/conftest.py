"""Engines without a model, a notebook without a page, and a way to wait for what other threads do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

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


class Notebook:
    """Runs cells, and remembers what they returned and printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = InteractiveShell.instance()
        self.shell.reset(new_session=True)
        self.shell.colors = "nocolor"
        self.shell.run_line_magic("load_ext", "nbengine")
        self.capsys = capsys
        self.result: Any = None

    def run(self, source: str) -> str:
        """What the cell printed, results and errors included."""
        self.capsys.readouterr()
        self.result = self.shell.run_cell(source, store_history=True)
        captured = self.capsys.readouterr()
        return captured.out + captured.err

    def value(self, source: str) -> Any:
        """What the cell returned."""
        printed = self.run(source)
        assert self.result.success, printed
        return self.result.result

    def complete(self, line: str) -> list[str]:
        return self.shell.complete(re.split(r"[ =]", line)[-1], line)[1]


@pytest.fixture
def notebook(capsys: pytest.CaptureFixture[str]) -> Iterator[Notebook]:
    """A notebook with the extension and no engine."""
    yield Notebook(capsys)
    InteractiveShell.clear_instance()
