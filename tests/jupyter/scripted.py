"""A real `Engine` (thread, scheduler, outputs) whose model is a script: tokens by hashing, words
for text. Widget tests then need no weights, and a step takes as long as the test says."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import tokenizers

from nbengine.config import EngineConfig
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.engine import Engine
from nbengine.tokenizer import Tokenizer
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
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class WordTokenizer(Tokenizer):
    """A token is a word: those of `WORDS` have text, any other word of a prompt has an id only."""

    def __init__(self) -> None:
        vocabulary = {word: token for token, word in enumerate(dict.fromkeys(WORDS))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="the"))
        super().__init__(backend, chat_template=CHAT_TEMPLATE)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1000 + zlib.crc32(word.encode()) % 100_000 for word in text.split()]


class ScriptedRunner(FakeExecutor):
    """`FakeExecutor` as the engine's runner: slow, held up, or failing, as the test asks."""

    has_lost_device = False
    kernels = None

    def __init__(self) -> None:
        super().__init__()
        self.seconds_per_step = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.on_compute: Callable[[], object] = lambda: None

    def prepare(self, plan: StepPlan) -> StepPlan:
        return plan

    def compute(self, plan: StepPlan) -> StepOutput:
        self.gate.wait(30)
        self.on_compute()
        if self.seconds_per_step:
            time.sleep(self.seconds_per_step)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        output = self.execute(plan)
        num_words = len(set(WORDS))
        for seq_id, tokens in output.samples.items():
            output.samples[seq_id] = [token % num_words for token in tokens]
        return output

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
        self.memory: Any = "memory: none, for there is no model"
        self.vocab_size = VOCAB_SIZE
        self._begin(eos_token_ids=frozenset(), num_host_blocks=0)
