"""What a rewind dropped, and whether the engine computes the same again.

`Engine.rewind` returns a `Rewind`. It knows the tokens that each request had got by then, and
compares them with those that come now, for as long as the engine goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbengine.core.plan import StepPlan
from nbengine.core.records import StepRecord
from nbengine.core.request import Sequence


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token of a sequence that is not what it was before the rewind."""

    seq_id: str
    step: int
    """In which it was computed now."""
    position: int
    """Among the output tokens, from 0."""
    token_id: int
    expected_token_id: int
    """What it was."""
    logit: float | None
    expected_logit: float | None
    """Of both tokens now, as the model gives them: near a tie, any difference in the last bits of a
    sum decides. None where the executor keeps no logits."""
    text: str = ""
    expected_text: str = ""

    def __str__(self) -> str:
        def told(token: int, text: str, logit: float | None) -> str:
            of = "" if logit is None else f", logit {logit:.6g}"
            return f"{token} ({text!r}{of})" if text else f"{token}{of and f' ({of[2:]})'}"

        now = told(self.token_id, self.text, self.logit)
        was = told(self.expected_token_id, self.expected_text, self.expected_logit)
        return (
            f"{self.seq_id}: output token {self.position}, in step {self.step}, is {now}; was {was}"
        )


class Rewind:
    """Where the engine went back to. `print` it at any time to see how the continuation compares.
    Beams are not compared: their names change with their ancestry."""

    def __init__(
        self,
        step: int,
        dropped: tuple[StepRecord, ...],
        expected: dict[tuple[int, int], tuple[list[int], int]],
        decode: Callable[[int], str],
    ) -> None:
        self.step = step
        """The engine stands after this step again."""
        self.dropped = dropped
        """The records of the future that was, oldest first."""
        self.divergences: list[Divergence] = []
        """One a sequence at most, in the order in which they were found."""
        self.num_equal = 0
        """Tokens that came again."""
        # By arrival and sample: all tokens, of which it still has the first so many.
        dropped_of = {key: len(tokens) - known for key, (tokens, known) in expected.items()}
        self._expected = {key: tokens for key, (tokens, _) in expected.items() if dropped_of[key]}
        self.num_expected = sum(dropped_of.values())
        """Tokens that were dropped."""
        self._decode = decode

    @property
    def is_watching(self) -> bool:
        """Whether there are tokens left to compare."""
        return bool(self._expected)

    def watches(self, plan: StepPlan) -> bool:
        """Whether a step computes any sequence that has tokens left to compare."""
        expected = self._expected
        return bool(expected) and any(
            (seq.request.arrival, seq.index) in expected for seq, _ in plan.scheduled
        )

    def compare(self, seq: Sequence, step: int, logits: Any | None) -> None:
        """Look at the token that was just appended to `seq`. `logits` `[vocab]` is the row that it
        was sampled from."""
        key = seq.request.arrival, seq.index
        expected = self._expected.get(key)
        if expected is None:
            return
        at = len(seq.tokens) - 1
        token, was = seq.tokens[at], expected[at]
        if token == was:
            self.num_equal += 1
            if at + 1 < len(expected):
                return
        else:
            self.divergences.append(
                Divergence(
                    seq.seq_id,
                    step,
                    at - seq.num_prompt_tokens,
                    token,
                    was,
                    None if logits is None else float(logits[token]),
                    None if logits is None else float(logits[was]),
                    self._decode(token),
                    self._decode(was),
                )
            )
        del self._expected[key]

    def __str__(self) -> str:
        steps = len(self.dropped)
        lines = [
            f"rewound to step {self.step}: {steps} {'step' if steps == 1 else 'steps'} and "
            f"{self.num_expected} tokens dropped, {self.num_equal} of them came again"
        ]
        return "\n".join([*lines, *(f"  {each}" for each in self.divergences)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))
