"""`survey`: what every op of an engine costs at the batch that it holds now, or in a step that it took,
and under which roof it lies; and `RooflinePlot`, for that as a picture.

The least bytes and operations of each op are its own model's, of a live call. On the GPU that the
engine runs on, each op is timed too, and the roofs are that GPU's, measured. Elsewhere nothing is
timed: the roofs are a named GPU's, as its maker publishes them, and every view says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch

from nbengine.errors import InvalidField, NotEnoughMemory
from nbengine.kernels.arguments import cloned
from nbengine.kernels.bench import measure
from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.implementation import Implementation, implement
from nbengine.kernels.op import Arguments, Case, Cost
from nbengine.kernels.ops import OPS
from nbengine.kernels.roofline import PUBLISHED, Roofline, roofline
from nbengine.kernels.timing import Timing, collect, duration

if TYPE_CHECKING:
    from nbengine.engine_kernels import EngineKernels

DEFAULT_GPU = "H100"


@dataclass(frozen=True, slots=True)
class OpSurvey:
    """One op: what runs it, and one call of it."""

    implementation: Implementation
    cost: Cost | None
    """None where the batch does not call the op."""
    timing: Timing | None
    """None where it was not timed."""

    @property
    def name(self) -> str:
        return self.implementation.op.name

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        assert self.cost is not None
        return self.cost.flops / max(1, self.cost.bytes_moved)

    @property
    def flops_per_s(self) -> float | None:
        """As measured."""
        if self.cost is None or self.timing is None:
            return None
        return self.cost.flops / self.timing.median_s


@dataclass(frozen=True, slots=True, repr=False)
class Survey:
    """Every op of an engine at one batch."""

    rows: tuple[OpSurvey, ...]
    roofs: Roofline | None
    """None where no engine was asked."""
    note: str
    """What the figures are of, and what they are not."""
    untimed: str = "not timed"
    """What stands in place of a time."""

    def of_roofline(self, row: OpSurvey) -> float | None:
        """Which fraction of the ceiling the op reaches; None where it was not timed."""
        if self.roofs is None or row.cost is None or row.timing is None:
            return None
        return self.roofs.floor_s(row.cost) / row.timing.median_s

    def _headers(self) -> list[str]:
        return ["op", "runs", "", "bytes", "FLOP/byte", "bound", "at least", "time", "of roofline"]

    def _table(self) -> Iterator[list[str]]:
        for row in self.rows:
            swapped = "" if row.implementation.is_own else "swapped"
            cells = [row.name, str(row.implementation), swapped]
            if row.cost is None or self.roofs is None:
                why = "no engine" if self.roofs is None else "not called"
                yield [*cells, "", "", why, "", "", ""]
                continue
            fraction = self.of_roofline(row)
            yield [
                *cells,
                f"{row.cost.bytes_moved:,}",
                f"{row.intensity:.3g}",
                self.roofs.bound(row.cost),
                duration(self.roofs.floor_s(row.cost)),
                self.untimed if row.timing is None else duration(row.timing.median_s),
                self.untimed if fraction is None else f"{fraction:.1%}",
            ]

    def __str__(self) -> str:
        return f"{self.note}\n{table_text(self._headers(), self._table())}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<div>{escape(self.note)}</div>{table_html(self._headers(), self._table())}"


def survey(
    ops: EngineKernels | None = None, gpu: str | None = None, step: int | None = None
) -> Survey:
    """Every op of an engine at its batch, or in a step; timed where the engine runs on a GPU, between
    two steps.

    Args:
        ops: `engine.kernels`; without, only what would run each op is said.
        gpu: a name in `PUBLISHED`, whose roofs are used where nothing can be measured.
        step: one that the engine took; what runs each op now is what is costed and timed.

    Raises:
        InvalidField: no such GPU.
        UnknownStep: the history does not reach that step.
        EngineClosed
    """
    published = _published(gpu)
    if ops is None:
        cpu = torch.device("cpu")
        rows = tuple(OpSurvey(implement(op, None, cpu), None, None) for op in OPS.values())
        return Survey(rows, None, "no engine is loaded: there is no batch to cost or to time")
    calls = {
        op: max(found, key=lambda call: _bytes(op, call), default=None)
        for op, found in ops.live_calls(*OPS, step=step).items()
    }
    of_what = "at the engine's batch" if step is None else f"in step {step}"
    if step is None and calls["paged_attention_prefill"]:
        of_what += " (prefill attention: as if it computed the last 64 tokens of some again)"
    if ops.device.type == "cuda":
        return ops.between_steps(lambda: _measured(ops, calls, published, of_what))
    rows = tuple(_costed(implementation, calls) for implementation in ops.implementations)
    note = (
        f"{of_what}, not measured: there is no GPU here, and times are at least those of "
        f"{published.device}, by published figures"
    )
    return Survey(rows, published, note, untimed="no GPU")


def _published(gpu: str | None) -> Roofline:
    if gpu is not None and gpu not in PUBLISHED:
        raise InvalidField("gpu", gpu, f"figures are known of {', '.join(PUBLISHED)}")
    return PUBLISHED[gpu or DEFAULT_GPU]


def _bytes(op: str, call: Arguments) -> int:
    return OPS[op].cost_of(call).bytes_moved


def _case(call: Arguments) -> Case:
    return Case("a call of the engine's", lambda _: cloned(call))


def _costed(
    implementation: Implementation, calls: dict[str, Arguments | None], timing: Timing | None = None
) -> OpSurvey:
    call = calls[implementation.op.name]
    cost = None if call is None else implementation.op.cost_of(call)
    return OpSurvey(implementation, cost, timing)


def _measured(
    ops: EngineKernels, calls: dict[str, Arguments | None], published: Roofline, of_what: str
) -> Survey:
    try:
        roofs = roofline(ops.device)
    except NotEnoughMemory as error:
        rows = tuple(_costed(implementation, calls) for implementation in ops.implementations)
        return Survey(
            rows, published, f"{of_what}, not measured: {error}. {published.device} as published"
        )
    left_out = []
    rows_found = []
    for implementation in ops.implementations:
        call, timing = calls[implementation.op.name], None
        if call is not None and implementation.is_capturable:
            try:
                timing = measure(implementation, None, _case(call), roofs, ops.device).timing
            except torch.OutOfMemoryError:
                left_out.append(f"{implementation.op.name} (memory)")
                collect()
        elif call is not None:
            left_out.append(f"{implementation.op.name} (a Python function)")
        rows_found.append(_costed(implementation, calls, timing))
    note = f"{of_what}, measured on {roofs.device}"
    if left_out:
        note += f"; not timed: {', '.join(left_out)}"
    return Survey(tuple(rows_found), roofs, note)


@dataclass(frozen=True, slots=True, repr=False)
class RooflinePlot:
    """A survey as a picture above its table; `str()` is the table alone."""

    survey: Survey

    def __str__(self) -> str:
        return str(self.survey)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from nbengine.jupyter.roofline_view import roofline_html

        return roofline_html(self.survey)
