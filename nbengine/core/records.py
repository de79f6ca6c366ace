"""What one step did, as data: the `StepRecord` that dashboards, `why`, metrics and tests read.

The scheduler's moves write into a `StepJournal` while they happen, those between two steps too
(adding, aborting); `StepJournal.seal` freezes it at the end of a step. Records hold ids and
numbers only, so that they are small, comparable, and enough to rebuild every queue and block table
from the ones before (`State.apply`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nbengine.core.prefix_cache import BlockContent, PrefixLookup
from nbengine.core.request import Hypothesis, Request, Sequence


class Cause(enum.StrEnum):
    """Why a sequence computed nothing in a step, or fewer tokens than it had left."""

    TOKEN_BUDGET = "token budget"
    LONG_PREFILL = "long prefill threshold"
    BLOCKS = "blocks"
    SEATS = "seats"
    PREEMPTION = "preemption in this step"
    SIBLINGS = "sibling beams"


@dataclass(frozen=True, slots=True)
class Wait:
    """One sequence that got less than it wanted, and why. `needed` and `available` count what
    `cause` names: tokens of the budget, blocks or seats."""

    seq_id: str
    cause: Cause
    wanted: int
    """Tokens that it had left to compute."""
    got: int
    """Tokens that it computed."""
    needed: int = 0
    available: int = 0
    behind: str | None = None
    """The sequence that it waits behind, or that blocks were wanted for."""

    def __str__(self) -> str:
        share = f"{self.got} of {self.wanted} tokens" if self.got else "nothing"
        match self.cause:
            case Cause.TOKEN_BUDGET:
                return (
                    f"computed {share}: {self.available} tokens of the step's budget "
                    f"(max_num_batched_tokens) were left, {self.needed} needed"
                )
            case Cause.LONG_PREFILL:
                return (
                    f"computed {share}: long_prefill_token_threshold allows {self.available} a step"
                )
            case Cause.BLOCKS:
                blocks = "block" if self.needed == 1 else "blocks"
                return f"computed {share}: needs {self.needed} {blocks}, {self.available} available"
            case Cause.SEATS:
                return (
                    f"computed {share}: needs {self.needed} "
                    f"{'seat' if self.needed == 1 else 'seats'} (max_num_seqs), "
                    f"{self.available} left"
                )
            case Cause.PREEMPTION:
                return (
                    f"computed {share}: blocks ran out in this step ({self.behind} needed some), so "
                    "nobody was admitted"
                )
            case Cause.SIBLINGS:
                return f"computed {share}: waits for the other beams of its request"
            case _:
                return f"computed {share}: {self.cause}"


class Admission(NamedTuple):
    """A waiting sequence that began (or resumed) to run."""

    seq_id: str
    prefix: PrefixLookup
    resumed: bool
    """It ran before, and was preempted."""


class Preemption(NamedTuple):
    """A running sequence that lost its blocks."""

    seq_id: str
    in_favour_of: str
    mode: str
    """`recompute` or `swap`; `error` when a failed step was taken back; `rewind` when the engine
    went back to the step before; `fork` when there was no room in the fork that begins here."""
    num_lost_tokens: int
    """Tokens whose keys and values must be computed again: 0 with swap."""
    num_blocks: int
    """Blocks that it held, and lost in this step."""

    @property
    def occasion(self) -> str:
        """What it was preempted for, to be read after its name."""
        if self.in_favour_of != self.seq_id:
            return f"for {self.in_favour_of}"
        match self.mode:
            case "error":
                return "as the step was taken back"
            case "rewind":
                return "by the rewind"
            case "fork":
                return "as there was no room for it"
            case _:
                return "when no block was left for it"


PREFIX_CACHE = ""
"""In the place of a sequence's id: cached blocks that the prefix cache, when it was reset, gave
back."""


class BlockMove(NamedTuple):
    """Blocks that a sequence took (or gave back), in the order of its table."""

    seq_id: str
    blocks: tuple[int, ...]


class BlockCopy(NamedTuple):
    """Copy-on-write: the sequence's table now names `destination` instead of `source`."""

    seq_id: str
    source: int
    destination: int


class BlockSwap(NamedTuple):
    """Blocks copied between the device and host memory, pairwise."""

    seq_id: str
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


class CachedPrefix(NamedTuple):
    """A full block that entered the prefix cache."""

    seq_id: str
    block: int
    content: BlockContent

    @property
    def digest(self) -> bytes:
        """What the block is named in the cache."""
        return self.content.digest


class Fork(NamedTuple):
    """A sequence that split: `child` shares all of `parent`'s blocks."""

    parent: str
    child: str


class Finish(NamedTuple):
    """A sequence that ended, and gave back its blocks."""

    seq_id: str
    reason: str
    stop_reason: int | str | None


class Phases(NamedTuple):
    """Seconds that the phases of a step took."""

    schedule: float = 0.0
    prepare: float = 0.0
    execute: float = 0.0
    commit: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step. Collections are in the order in which things happened."""

    step: int
    """1 for the engine's first step."""
    time: float
    """Seconds on the engine's clock when the step began."""
    phases: Phases
    error: str | None
    """What went wrong, for a step that was taken back."""

    policy: str
    """The name of the policy's class."""
    token_budget: int
    scheduled: dict[str, int]
    """Sequence id to tokens computed."""
    sampled: dict[str, int]
    """Sequence id to the token it got. A beam's tokens change with its ancestry: see `forked`."""
    candidates: dict[str, tuple[tuple[int, float], ...]]
    """Beams only: sequence id to (token id, logprob) of its continuations, best first."""
    hypotheses: tuple[tuple[str, Hypothesis], ...]
    """Beams only: request id and a beam that ended."""
    waits: tuple[Wait, ...]
    """Running sequences that got less than they wanted, then the head of the waiting queue. All
    behind the head wait behind it."""

    added: tuple[Request, ...]
    """Requests added since the step before."""
    ranked: dict[str, Any]
    """Sequence id to the rank that the policy gave it, where that is new."""
    admitted: tuple[Admission, ...]
    preempted: tuple[Preemption, ...]
    forked: tuple[Fork, ...]
    finished: tuple[Finish, ...]

    allocated: tuple[BlockMove, ...]
    shared: tuple[BlockMove, ...]
    """Prefix hits and forks: blocks that got one more holder."""
    copied: tuple[BlockCopy, ...]
    swapped_out: tuple[BlockSwap, ...]
    swapped_in: tuple[BlockSwap, ...]
    cached: tuple[CachedPrefix, ...]
    evicted: tuple[int, ...]
    released: tuple[BlockMove, ...]

    num_running: int
    num_waiting: int
    """At the end of the step."""
    num_free_blocks: int
    num_cached_blocks: int
    num_held_blocks: int

    @property
    def num_tokens(self) -> int:
        """Tokens computed: what was used of the budget."""
        return sum(self.scheduled.values())

    @property
    def num_hit_tokens(self) -> int:
        """Tokens that admitted sequences took from the prefix cache instead of computing them."""
        return sum(a.prefix.num_hit_tokens for a in self.admitted)

    @property
    def nbytes(self) -> int:
        """Roughly what the record takes in memory: for the bound on the history."""
        entries = len(self.scheduled) + len(self.sampled)
        events = (
            len(self.waits) + len(self.ranked) + len(self.admitted) + len(self.preempted)
            + len(self.candidates) + len(self.hypotheses) + len(self.forked) + len(self.finished) + len(self.allocated) + len(self.shared)
            + len(self.copied) + len(self.swapped_out) + len(self.swapped_in) + len(self.cached)
            + len(self.evicted) + len(self.released)
        )  # fmt: skip
        blocks = sum(len(m.blocks) for m in (*self.allocated, *self.shared, *self.released))
        prompts = sum(40 * request.num_prompt_tokens for request in self.added)
        beams = sum(100 * len(candidates) for candidates in self.candidates.values())
        prefixes = sum(40 * len(c.content.token_ids) for c in self.cached)
        return 800 + 100 * entries + 160 * events + 8 * blocks + prompts + beams + prefixes

    def __str__(self) -> str:
        parts = [f"step {self.step}: {self.num_tokens}/{self.token_budget} tokens"]
        parts.append(", ".join(f"{seq} {n}" for seq, n in self.scheduled.items()) or "nobody ran")
        if self.admitted:
            parts.append("admitted " + ", ".join(a.seq_id for a in self.admitted))
        parts += [
            f"preempted {p.seq_id} {p.occasion} ({p.mode}, {p.num_lost_tokens} tokens lost)"
            for p in self.preempted
        ]
        parts += [f"finished {f.seq_id} ({f.reason})" for f in self.finished]
        parts += [f"{w.seq_id} {w}" for w in self.waits]
        if self.error:
            parts.append(f"taken back: {self.error}")
        return "; ".join(parts)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import record_html

        return record_html(self)


@dataclass(slots=True)
class StepJournal:
    """A step's record while it is being written."""

    scheduled: dict[str, int] = field(default_factory=dict)
    sampled: dict[str, int] = field(default_factory=dict)
    candidates: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    hypotheses: list[tuple[str, Hypothesis]] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    added: list[Request] = field(default_factory=list)
    ranked: dict[str, Any] = field(default_factory=dict)
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[Preemption] = field(default_factory=list)
    forked: list[Fork] = field(default_factory=list)
    finished: dict[Sequence, Finish] = field(default_factory=dict)
    """By sequence, because a name may be taken again as soon as its owner has ended."""
    allocated: list[BlockMove] = field(default_factory=list)
    shared: list[BlockMove] = field(default_factory=list)
    copied: list[BlockCopy] = field(default_factory=list)
    swapped_out: list[BlockSwap] = field(default_factory=list)
    swapped_in: list[BlockSwap] = field(default_factory=list)
    cached: list[CachedPrefix] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    released: list[BlockMove] = field(default_factory=list)
