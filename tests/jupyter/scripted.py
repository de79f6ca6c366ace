"""A real `Engine` (thread, scheduler, outputs) whose model is a script: tokens by hashing, words
for text. Widget tests then need no weights, and a step takes as long as the test says."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

from nbengine.config import EngineConfig
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.scheduler import Scheduler
from nbengine.engine import Engine
from tests.core.conftest import FakeExecutor

WORDS = [
    "the",
    "a",
    "paged",
    "block",
    "of",
    "memory",
    "holds",
    "keys",
    "and",
    "values",
    "for",
    "one",
    "sequence",
    "while",
    "others",
    "wait",
    "in",
    "line",
    "until",
    "there",
    "is",
    "room",
    "again",
    "so",
    "every",
    "step",
    "computes",
    "some",
    "tokens",
    "and",
    "samples",
    "the",
    "next",
    "word",
    "here",
]
VOCAB_SIZE = 1 << 17


class WordTokenizer:
    """A token is a word; any id decodes to one of `WORDS`."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [100 + sum(map(ord, word)) for word in text.split()]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(" " + WORDS[token % len(WORDS)] for token in token_ids)

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        return "".join(f"<{m['role']}> {m['content']} </s> " for m in messages) + "<assistant>"


class ScriptedRunner(FakeExecutor):
    """`FakeExecutor` as the engine's runner: slow, held up, or failing, as the test asks."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds_per_step = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def prepare(self, plan: StepPlan) -> None:
        return None

    def execute_batch(self, plan: StepPlan, batch: None) -> StepOutput:
        self.gate.wait(30)
        if self.seconds_per_step:
            time.sleep(self.seconds_per_step)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.execute(plan)

    def close(self) -> None:
        self.gate.set()


class ScriptedEngine(Engine):
    """An engine without a model. Every other part is the real one."""

    runner: ScriptedRunner

    def _load(self, config: EngineConfig) -> None:
        self.runner = ScriptedRunner()
        self._runner: Any = self.runner
        self.config = config.resolve(
            config.max_model_len or 2048, config.num_gpu_blocks_override or 64
        )
        self.tokenizer: Any = WordTokenizer()
        self.memory: Any = SimpleNamespace()
        self.vocab_size = VOCAB_SIZE
        self._eos_token_ids = frozenset()
        self.scheduler = Scheduler(
            self.config.for_scheduler(num_host_blocks=0),
            self.config.scheduling_policy,
            self.clock,
        )
