"""What would have happened: the real scheduler, without a model, over a workload that is known.

`simulate` plays a whole trace, from nothing; `fork` plays the rest of a run from one of its steps
on. Policy and numbers may be others than they were. Both only ever touch schedulers of their own:
what they give the sequences is written in a `Script`, so nothing is computed, and thousands of
steps take a second.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from nbengine.core.history import History
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.policies import Policy
from nbengine.core.records import Phases, StepRecord
from nbengine.core.refit import drop, refit
from nbengine.core.request import Sequence
from nbengine.core.scheduler import Scheduler, SchedulerConfig, orders_of
from nbengine.core.script import Event, Part, Script
from nbengine.core.state import Keyframe
from nbengine.errors import InvalidField, RequestTooLarge

if TYPE_CHECKING:
    from nbengine.core.trace import Trace


class Refusal(NamedTuple):
    """A request that can never run with these numbers. `needed` and `available` count what `reason`
    names."""

    request_id: str
    reason: str
    needed: int
    available: int


class StepTime(NamedTuple):
    """How long a step takes: `base` seconds, and `per_token` for each token that it computes."""

    base: float
    per_token: float

    def of(self, num_tokens: int) -> float:
        """Seconds of a step of so many tokens."""
        return self.base + self.per_token * num_tokens

    @classmethod
    def fit(cls, records: Iterable[StepRecord]) -> StepTime:
        """The line nearest to what the steps of `records` took, neither number below 0. Steps that
        failed, or computed nothing, do not count; and a slow one among many (the first, which
        compiles) moves it little, because distances are added up and not their squares.

        Raises:
            InvalidField: no step of them has a time.
        """
        points = [(r.num_tokens, r.phases.total) for r in records if r.scheduled and not r.error]
        if not any(seconds for _, seconds in points):
            raise InvalidField("records", f"{len(points)} steps", "none took any time")
        middle = median(seconds for _, seconds in points)
        if len({tokens for tokens, _ in points}) == 1:
            return cls(middle, 0.0)
        weights = [1.0] * len(points)
        for _ in range(50):  # least squares, each time with the weights that make them distances
            base, slope = _weighted_line(points, weights)
            weights = [1 / max(1e-9, abs(s - base - slope * t)) for t, s in points]
        if slope < 0:
            return cls(middle, 0.0)
        if base < 0:
            return cls(0.0, median(seconds / tokens for tokens, seconds in points))
        return cls(base, slope)


def _weighted_line(points: list[tuple[int, float]], weights: list[float]) -> tuple[float, float]:
    """(height at 0, slope) of the line with the least weighted sum of squares."""
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    shared = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = shared / spread
    return mean_y - slope * mean_x, slope


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Simulated:
    """A run that never was. Iterates over its records."""

    history: History
    """Its records, and any state between them: what `Engine.history` is to an engine."""
    config: SchedulerConfig
    policy: str
    """As it was named, or the name of its class."""
    end: str
    """Why there are no more steps: `finished` (all requests are), `max_steps`, or `unknown token`,
    for a fork that came to where the records it was made from no longer tell how an unfinished
    request goes on."""
    refused: tuple[Refusal, ...]
    """Requests that took no part, because they could never have fitted."""
    cut_short: tuple[str, ...]
    """Sequences that were aborted in truth, came further than that here, and ended, as aborted,
    where their tokens are no longer known."""

    @property
    def records(self) -> tuple[StepRecord, ...]:
        return tuple(self.history)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self.history)

    def __len__(self) -> int:
        return len(self.history)

    def __repr__(self) -> str:
        ends = {
            "finished": "until all requests had finished",
            "max_steps": "and there would have been more",
            "unknown token": "as far as the tokens are known",
        }
        lines = [
            f"{len(self)} steps of {self.policy} over {self.config.num_blocks} blocks of "
            f"{self.config.block_size}, {ends[self.end]}"
        ]
        lines += [f"refused: {refusal.reason}" for refusal in self.refused[:5]]
        if len(self.refused) > 5:
            lines.append(f"and {len(self.refused) - 5} more refused")
        if self.cut_short:
            lines.append(f"cut short: {', '.join(self.cut_short)}")
        return "\n".join(lines)


def simulate(
    trace: Trace,
    config: Any = None,
    policy: str | Policy | type = "fcfs",
    max_steps: int | None = None,
    *,
    step_time: StepTime | tuple[float, float] | None = None,
    **changes: Any,
) -> Simulated:
    """What the scheduler makes of a trace.

    `config` is a `SchedulerConfig` or an `EngineConfig` (`engine.config`); its fields, under the
    names of `SchedulerConfig`, can be given by keyword instead, or changed:
    `simulate(trace, num_blocks=64)`, `simulate(trace, engine.config, "sjf", num_blocks=32)`.

    Requests arrive, and are aborted, before the same step as in the trace. With a `step_time` (two
    numbers of seconds: a step, and each of its tokens) they do so at the same time instead.

    Raises:
        InvalidField: a number that no scheduler can work with; blocks which the trace's do not add
            up to; a policy that is none.
        Exception: whatever a user's policy raises.
    """
    config = _config_of(config, changes)
    if config.block_size % trace.block_size:
        raise InvalidField(
            "block_size",
            config.block_size,
            f"the trace knows which prompts begin alike in steps of {trace.block_size} tokens, so "
            "the blocks must hold a multiple of that",
        )
    seconds = None if step_time is None else _checked_step_time(step_time)
    _check("max_steps", max_steps, max_steps is None or _is_int(max_steps, 1), "must be positive")
    scheduler = Scheduler(config, policy)
    return _Run(scheduler, trace.script(), [], _name_of(policy)).play(max_steps, seconds)


def fork(
    history: History,
    step: int,
    config: Any,
    policy: str | Policy | type,
    *,
    max_steps: int | None = None,
    **changes: Any,
) -> Simulated:
    """What would have happened after step `step` of `history` with another policy, or with other
    numbers than those of `config` (see `simulate`): `fork(history, 120, config, "sjf",
    num_blocks=32)`. With nothing changed, exactly what did happen.

    Requests arrive, and are aborted, before the same steps as they did; each gets the tokens, or
    beam candidates, that it got in truth. A request that is unfinished in the newest record has
    none beyond: the fork ends before the step that would need one. Failed steps, rewinds and
    changes of the policy in `history` do not happen again.

    With fewer blocks or seats, what does not fit any more at `step` is given up: cached blocks the
    longest unused first, then the last running sequences of the policy's order, which wait to be
    computed again. Whoever could never fit is refused.

    A name that in truth was free again, and here is still in use, gets a `~` and a number.

    Raises:
        UnknownStep: the history can't rebuild the state after `step`.
        InvalidField: as `simulate`; or another block size.
        Exception: whatever a user's policy raises.
    """
    state = history.state_at(step)
    config = _config_of(config, changes)
    _check(
        "block_size",
        config.block_size,
        config.block_size == state.block_size,
        f"what is in the blocks at step {step} lies in blocks of {state.block_size}",
    )
    _check("max_steps", max_steps, max_steps is None or _is_int(max_steps, 1), "must be positive")
    scheduler = Scheduler(config, policy)
    script = Script.of((record for record in history if record.step > step), state)
    refused = []
    for live in tuple(state.live.values()):
        try:
            scheduler.check_fits(live.request)
        except RequestTooLarge as error:
            refused.append(_refusal(live.request.request_id, error))
            drop(state, live.request.request_id)
    # Ranks that change with time are asked for in the step, as they would have been in truth.
    name = type(scheduler.policy).__name__
    if name != state.policy or not getattr(scheduler.policy, "dynamic", False):
        unfinished = [seq for seq in state.sequences.values() if not seq.is_finished]
        for seq, order in orders_of(scheduler.policy, unfinished).items():
            seq.order = order
    scheduler.restore(state, preempted=refit(state, config))
    return _Run(scheduler, script, refused, _name_of(policy)).play(max_steps, None)


# ------------------------------------------------------------------ playing a script


class _UnknownToken(Exception):
    """An unfinished request needs a token that nobody knows."""


class _Run:
    """A scheduler and the script that it is played."""

    def __init__(
        self, scheduler: Scheduler, script: Script, refused: list[Refusal], policy: str
    ) -> None:
        self.scheduler, self.script, self.refused, self.policy = scheduler, script, refused, policy
        self.history = History(max_records=sys.maxsize, max_bytes=sys.maxsize)
        self.history.keep(Keyframe(scheduler))
        self.parts = {name: part for name, part in script.present.items() if name in scheduler.live}
        """Of live requests, by the name that they have here."""
        self.cut_short: list[str] = []
        self._to_abort: list[Sequence] = []
        """Whose script has ended in this step, with an abort."""
        self._num_renamed = 0

    def play(self, max_steps: int | None, step_time: StepTime | None) -> Simulated:
        scheduler, history = self.scheduler, self.history
        events = self.script.events
        if step_time is not None:
            events = sorted(events, key=lambda event: event.time)  # stable
        coming = deque(events)
        num_arrivals = sum(event.kind == "arrival" for event in events)
        now, most = 0.0, max_steps or sys.maxsize
        scheduler.clock = lambda: now
        end = "finished"
        while scheduler.has_work or num_arrivals:
            if len(history) == most:
                end = "max_steps"
                break
            if step_time is not None and not scheduler.has_work:
                now = max(now, coming[0].time)  # an idle engine takes no steps
            while coming and (
                coming[0].step <= scheduler.step_count + 1
                if step_time is None
                else coming[0].time <= now
            ):
                num_arrivals -= coming[0].kind == "arrival"
                self._happens(coming.popleft())
            if step_time is not None and not scheduler.has_work:
                continue
            plan = scheduler.schedule()
            try:
                output = self._execute(plan)
            except _UnknownToken:
                end = "unknown token"
                break
            self._correct_endings(scheduler.commit(output))
            seconds = 0.0 if step_time is None else step_time.of(plan.num_tokens)
            history.append(scheduler.seal(Phases(execute=seconds)))
            now += seconds
            if history.wants_keyframe:
                history.keep(Keyframe(scheduler))
        return Simulated(
            history=history,
            config=scheduler.config,
            policy=self.policy,
            end=end,
            refused=tuple(self.refused),
            cut_short=tuple(self.cut_short),
        )

    def _happens(self, event: Event) -> None:
        scheduler, part = self.scheduler, event.part
        if part is None:
            if not scheduler.pool.num_held:
                scheduler.reset_prefix_cache()
        elif event.kind == "abort":
            name = next((name for name, other in self.parts.items() if other is part), None)
            if name in scheduler.live:
                scheduler.abort(name)
        else:
            request = part.request
            if request.request_id in scheduler.live:
                self._num_renamed += 1
                name = f"{request.request_id}~{self._num_renamed}"
                request = dataclasses.replace(request, request_id=name)
            try:
                scheduler.add(request)
            except RequestTooLarge as error:
                self.refused.append(_refusal(request.request_id, error))
            else:
                self.parts[request.request_id] = part

    def _execute(self, plan: StepPlan) -> StepOutput:
        output = StepOutput()
        samples = output.samples
        for seq, n in plan.scheduled:
            known = seq.tokens
            if seq.num_computed_tokens + n < len(known):
                continue
            part = self.parts[seq.request.request_id]
            if part.is_beam_search:
                candidates = part.candidates_of(seq)
                if candidates is None:
                    self._end(part, seq, output)
                else:
                    output.candidates[seq.seq_id] = candidates
                continue
            position = len(known) - len(seq.request.prompt_token_ids)
            tokens = [
                part.token(index, position)
                for index in range(seq.index, seq.index + 1 + seq.pending_forks)
            ]
            if None in tokens:
                self._end(part, seq, output)
            else:
                samples[seq.seq_id] = tokens  # type: ignore[assignment]
        return output

    def _end(self, part: Part, seq: Sequence, output: StepOutput) -> None:
        """The script says no more of this sequence."""
        ending = part.ending_of(seq.index)
        if ending is None:
            raise _UnknownToken
        output.errors[seq.seq_id] = RuntimeError(ending.finish.stop_reason)
        if ending.finish.reason == "abort":
            live = self.scheduler.live[seq.request.request_id]
            self.cut_short.append(seq.seq_id)
            self._to_abort += live.sequences if part.is_beam_search else [seq]

    def _correct_endings(self, advanced: list[Sequence]) -> None:
        """As an engine does, end a sequence for what is seen in its text."""
        for seq in advanced:
            index = seq.index
            part = self.parts[seq.request.request_id]
            ending = part.endings.get(index)
            if ending is None or not ending.has_token:
                continue
            num_output = len(seq.tokens) - len(seq.request.prompt_token_ids)
            _, reason, stop_reason = ending.finish
            if num_output == len(part.tokens[index]) and (
                (seq.finish_reason, seq.stop_reason) != (reason, stop_reason)
            ):
                self.scheduler.finish(seq, reason, stop_reason)
        for seq in self._to_abort:
            self.scheduler.finish(seq, "abort")
        self._to_abort.clear()


def _refusal(request_id: str, error: RequestTooLarge) -> Refusal:
    return Refusal(request_id, str(error), error.needed, error.available)


# ------------------------------------------------------------------ numbers from a user


def _name_of(policy: str | Policy | type) -> str:
    if isinstance(policy, str):
        return policy
    return (policy if isinstance(policy, type) else type(policy)).__name__


_LEAST = {
    "num_blocks": 1,
    "block_size": 1,
    "max_num_batched_tokens": 1,
    "max_num_seqs": 1,
    "long_prefill_token_threshold": 0,
    "num_host_blocks": 0,
}


def _config_of(config: Any, changes: dict[str, Any]) -> SchedulerConfig:
    """The scheduler's numbers in `config` (of an `EngineConfig` too), with changes."""
    fields = SchedulerConfig.__dataclass_fields__
    for name, value in changes.items():
        _check(name, value, name in fields, f"the numbers are {', '.join(fields)}")
    numbers = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    if hasattr(config, "num_gpu_blocks_override"):
        numbers["num_blocks"] = config.num_gpu_blocks_override
    elif config is not None and not isinstance(config, SchedulerConfig):
        raise InvalidField("config", config, "must be a SchedulerConfig or an EngineConfig")
    numbers |= changes
    has_blocks = numbers.get("num_blocks") is not None
    _check("num_blocks", None, has_blocks, "give the number of KV blocks, as num_blocks=...")
    for name, least in _LEAST.items():
        if name in numbers:
            value = numbers[name]
            _check(name, value, _is_int(value, least), f"must be an integer, at least {least}")
    for name in ("enable_chunked_prefill", "enable_prefix_caching"):
        if name in numbers:
            value = numbers[name]
            _check(name, value, isinstance(value, bool), "must be True or False")
    mode = numbers.get("preemption_mode", "recompute")
    modes = ("recompute", "swap")
    _check("preemption_mode", mode, mode in modes, f"must be one of {modes}")
    _check(
        "num_host_blocks",
        None,
        mode != "swap" or "num_host_blocks" in numbers,
        "give the number of host blocks to swap to: it follows from the model's size, and is in "
        "engine.scheduler.config",
    )
    return SchedulerConfig(**numbers)


def _checked_step_time(step_time: Any) -> StepTime:
    try:
        base, per_token = step_time
        valid = base >= 0 and per_token >= 0 and base + per_token > 0 and base + per_token < 1e9
    except (TypeError, ValueError):
        valid = False
    _check("step_time", step_time, valid, "must be two numbers of seconds: a step, and a token")
    return StepTime(float(base), float(per_token))


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(name: str, value: Any, holds: object, problem: str) -> None:
    if not holds:
        raise InvalidField(name, value, problem)
