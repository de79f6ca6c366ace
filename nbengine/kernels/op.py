"""What an op is: the unit that the engine asks for by name, and that can be verified, measured and
swapped.

Each file in `ops/` defines one `Op`: how its kernel is launched, the same computation in plain
torch, how far the two may differ, the fewest bytes and operations it takes, and the shapes on which
it is checked. An op writes into tensors that its caller gives (`outputs`), so that nothing is
allocated in a captured graph and every check can fill them with NaN first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = dict[str, Any]
"""Of one call, by name: tensors, numbers, None."""


@dataclass(frozen=True, slots=True)
class Case:
    """One entry of an op's shape grid. `make(generator)` gives the arguments of a call on the
    generator's device, fresh random values each time; outputs are filled with NaN (integers with a
    value that is wrong)."""

    name: str
    make: Callable[[torch.Generator], Arguments]


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that a call must do, for the roofline."""

    bytes_moved: int
    """Each input read once, each output written once."""
    flops: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """|out - reference| <= absolute + relative * |reference|, element by element."""

    relative: float
    absolute: float

    @classmethod
    def of_rounding(cls, dtype: torch.dtype, absolute: float = 1e-5) -> Tolerance:
        """For results computed in float32 and rounded once to `dtype`: some two units in its last
        place, because two float32 values that are all but equal may round to neighbours."""
        relative = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
        return cls(relative[dtype], absolute)


@dataclass(frozen=True, slots=True)
class Op:
    """See the module."""

    name: str
    source: str
    """Its file in `cuda/`."""
    outputs: tuple[str, ...]
    """The arguments that a call writes; it changes no other."""
    launch: Callable[..., None]
    """launch(program, **arguments): checks shapes, chooses the specialisation and the grid, and
    launches; it neither allocates outputs nor waits for the device."""
    reference: Callable[..., None]
    """reference(**arguments) writes the same outputs in torch, on any device: computed in float32
    or better and rounded once at the end."""
    cases: Callable[[], Iterable[Case]]
    """The shape grid, small cases first. Each is small enough to be emulated in about a second."""
    tolerance: Callable[[Arguments], Tolerance]
    cost: Callable[[Arguments], Cost]
    """Of a call with every argument named; see `cost_of`."""
    scratch: tuple[str, ...] = ()
    """The arguments that a call may leave with any contents."""
    bench_cases: Callable[[], Iterable[Case]] = tuple
    """Shapes of a model of 7 billion parameters, for `bench`: too large to be emulated."""
    watch_case: Callable[[], Case] | None = None
    """A small call in which a reader can follow single threads, for `watch`; default: the first of
    the grid."""
    compact: Callable[[Arguments], Arguments] | None = None
    """The same call with nothing that is too large to copy: of a KV cache, for example, the blocks
    that the call uses, and a block table that names them. For `Kernels.record`."""
    alternatives: Mapping[str, str] = field(default_factory=dict)
    """Further implementations by name, each as `module:function`, imported when asked for."""

    def cost_of(self, arguments: Arguments) -> Cost:
        """Of a call as an engine makes it, which leaves out what has a default."""
        parameters = inspect.signature(self.launch).parameters.values()
        defaults = {
            p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty
        }
        return self.cost({**defaults, **arguments})
