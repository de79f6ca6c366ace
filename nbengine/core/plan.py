"""What one step does: the plan that the scheduler hands to an executor, and what comes back.

An executor is anything with `execute(plan) -> StepOutput`: the torch runner, or a fake one in the
simulation. It reads the plan's sequences and changes none of their fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from nbengine.core.request import Sequence


@dataclass(slots=True)
class StepPlan:
    """The order of work is: `swap_out`, `swap_in`, `copies`, then compute."""

    scheduled: list[tuple[Sequence, int]] = field(default_factory=list)
    """(sequence, n): compute tokens[num_computed_tokens : num_computed_tokens + n]. When that
    reaches the last known token, sample the next one."""
    swap_out: list[tuple[int, int]] = field(default_factory=list)
    """(device block, host block) to copy before anything else touches the device block."""
    swap_in: list[tuple[int, int]] = field(default_factory=list)
    """(host block, device block)."""
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) device blocks: copy-on-write."""
    keeps_logits: bool = False
    """Whether `StepOutput.logits` is asked for."""

    @property
    def num_tokens(self) -> int:
        return sum(n for _, n in self.scheduled)


@dataclass(slots=True)
class StepOutput:
    """What the executor computed. Keys are `seq_id`s of sequences whose last known token was
    computed in this step."""

    samples: dict[str, list[int]] = field(default_factory=dict)
    """The next token id; for a sequence about to fork into n samples, n of them (from one row of
    logits, each with its own randomness). Beams have an entry in `candidates` instead."""
    candidates: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """For a beam: (token id, logprob), best first, 2 * beam_width of them."""
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    """For each entry of `samples` that asked for logprobs: one `dict[int, Logprob]` a sample."""
    prompt_logprobs: dict[str, list[Any]] = field(default_factory=dict)
    """For requests that ask for prompt_logprobs: one `dict[int, Logprob]` for each prompt token
    whose predecessor was computed in this step (the first prompt token has none)."""
    logits: dict[str, Any] = field(default_factory=dict)
    """For each entry of `samples`, if the plan asks for them: the row `[vocab]` as the model gave
    it, before penalties and masks."""
    errors: dict[str, Exception] = field(default_factory=dict)
    """Failures of one sequence alone: it ends with finish_reason "error", the others go on."""


class Executor(Protocol):
    """Computes a step's tokens. An exception that escapes means that nothing of the plan may be
    trusted: the scheduler then takes the step back."""

    def execute(self, plan: StepPlan) -> StepOutput: ...
