"""Scheduling policies: who comes first.

A policy is any object with a `rank(sequence)`; the scheduler keeps waiting and running sequences
sorted by (rank, arrival). The smallest is admitted first; when blocks run out the largest of the
running ones is preempted. A notebook user writes one in a cell:

    class LongestFirst:
        def rank(self, sequence):
            return -sequence.num_prompt_tokens

Set `dynamic = True` on a policy whose ranks change while a sequence waits: they are then asked for
again in every step.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from nbengine.core.request import Sequence
from nbengine.errors import InvalidField


@runtime_checkable
class Policy(Protocol):
    """Orders sequences."""

    def rank(self, sequence: Sequence) -> Any:
        """Anything that compares with `<`; smaller runs sooner, equals go by arrival."""
        ...


class Fcfs:
    """First come, first served."""

    def rank(self, sequence: Sequence) -> int:
        return 0


class Priority:
    """By the request's `priority`, smaller first."""

    def rank(self, sequence: Sequence) -> int:
        return sequence.request.priority


class ShortestJobFirst:
    """By the most tokens that the request can come to (prompt and max_tokens), fewest first. Long
    requests may starve under a steady stream of short ones."""

    def rank(self, sequence: Sequence) -> int:
        return sequence.request.max_total_tokens


POLICIES: dict[str, type] = {"fcfs": Fcfs, "priority": Priority, "sjf": ShortestJobFirst}


def make_policy(policy: str | Policy | type) -> Policy:
    """A policy from its name, its class, or itself.

    Raises:
        InvalidField: it is none of these.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise InvalidField(
                "scheduling_policy", policy, f"known names are {', '.join(POLICIES)}"
            )
        policy = POLICIES[policy]
    if isinstance(policy, type):
        policy = policy()
    if not isinstance(policy, Policy):
        raise InvalidField("scheduling_policy", policy, "a policy has a method rank(sequence)")
    return policy
