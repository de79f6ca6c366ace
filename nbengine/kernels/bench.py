"""`bench`: how fast is an implementation, against this device's roofline and against what is there?

Every figure is one call's: by CUDA events around replays of a captured graph, on rotating sets of
arguments that together are larger than the L2, in turns with the version it is compared to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import torch

from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.implementation import Implementable, Implementation, implement, op_named
from nbengine.kernels.op import Case, Cost, Op
from nbengine.kernels.roofline import Roofline, roofline
from nbengine.kernels.timing import (
    Replay,
    Timing,
    collect,
    duration,
    gpu,
    rotating,
    time_alternately,
)
from nbengine.progress import say


@dataclass(frozen=True, slots=True)
class Measurement:
    """One shape."""

    case: str
    cost: Cost
    floor_s: float
    """By the roofline."""
    bound: str
    """What the floor comes from: "memory" or "matrix"."""
    num_sets: int
    """Sets of arguments that took turns."""
    timing: Timing
    current: Timing | None
    """Of the version it is compared to, in the same run."""

    @property
    def bytes_per_s(self) -> float:
        return self.cost.bytes_moved / self.timing.median_s

    @property
    def flops_per_s(self) -> float:
        return self.cost.flops / self.timing.median_s

    @property
    def of_roofline(self) -> float:
        """1 is the ceiling."""
        return self.floor_s / self.timing.median_s

    @property
    def speedup(self) -> float | None:
        """Over the current version: 2 is half of its time."""
        return None if self.current is None else self.current.median_s / self.timing.median_s


@dataclass(frozen=True, slots=True, repr=False)
class Benched:
    """What `bench` measured, shape by shape."""

    op: str
    implementation: str
    current: str | None
    roofline: Roofline
    rows: tuple[Measurement, ...]

    def _headers(self) -> list[str]:
        against = [] if self.current is None else ["current", "speed-up"]
        return ["case", "time", "spread", "GB/s", "TFLOP/s", "of roofline", "bound", *against]

    def _table(self) -> list[list[str]]:
        return [row_cells(row) for row in self.rows]

    def _title(self) -> str:
        against = "" if self.current is None else f", against {self.current}"
        return f"{self.op}: {self.implementation}{against}, on {self.roofline.device}"

    def __repr__(self) -> str:
        return f"{self._title()}\n{table_text(self._headers(), self._table())}"

    def _repr_html_(self) -> str:
        return f"<div>{escape(self._title())}</div>{table_html(self._headers(), self._table())}"


def row_cells(row: Measurement) -> list[str]:
    """A measurement as a table shows it."""
    timing = row.timing
    cells = [
        row.case,
        duration(timing.median_s),
        f"{(timing.high_s - timing.low_s) / timing.median_s:.1%}",
        f"{row.bytes_per_s / 1e9:,.0f}",
        f"{row.flops_per_s / 1e12:,.3g}",
        f"{row.of_roofline:.1%}",
        row.bound,
    ]
    if row.current is not None:
        cells += [duration(row.current.median_s), f"{row.speedup:.2f}"]
    return cells


def bench(
    op: str | Op,
    what: Implementable = None,
    cases: Iterable[Case] | None = None,
    seed: int = 0,
    *,
    against: Implementable = None,
    device: torch.device | str | None = None,
) -> Benched:
    """Measure an implementation on the GPU.

    Args:
        what: None (the op's own `.cu`), CUDA C (text, path, `Source`), a `Program`, a Python
            function that a CUDA graph can capture, or the name of an alternative.
        cases: in place of the op's `bench_cases`.
        against: the current version, measured in turns with `what`; None is the op's own `.cu`
            (where `what` is another).

    Raises:
        NeedsGpu: there is none.
    """
    found = op_named(op)
    device = gpu(device)
    ceiling = roofline(device)
    new = implement(found, what, device)
    current = None if what is None and against is None else implement(found, against, device)
    rows = tuple(
        measure(new, current, case, ceiling, device, seed)
        for case in (found.bench_cases() if cases is None else cases)
    )
    return Benched(found.name, str(new), None if current is None else str(current), ceiling, rows)


def measure(
    new: Implementation,
    current: Implementation | None,
    case: Case,
    ceiling: Roofline,
    device: torch.device,
    seed: int = 0,
) -> Measurement:
    """One shape. All of its memory is given back."""
    say(f"measuring {new.op.name}: {case.name}")
    arguments = case.make(torch.Generator(device).manual_seed(seed))
    cost = new.op.cost_of(arguments)
    sets = rotating(arguments, cost.bytes_moved, device)
    versions = [new] if current is None else [new, current]
    timings = time_alternately([Replay(version.call, sets, device) for version in versions])
    num_sets = len(sets)
    del arguments, sets
    collect()
    return Measurement(
        case=case.name,
        cost=cost,
        floor_s=ceiling.floor_s(cost),
        bound=ceiling.bound(cost),
        num_sets=num_sets,
        timing=timings[0],
        current=timings[1] if current is not None else None,
    )
