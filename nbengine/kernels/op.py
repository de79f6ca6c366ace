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

from nbengine.errors import InvalidField
from nbengine.kernels.program import Program, UnfitArguments
from nbengine.kernels.source import Source, parameters

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

    def launch_on(self, program: Program, arguments: Arguments) -> None:
        """`launch` on a program that may be a user's own: the error for a kernel that takes other
        arguments (`UnfitArguments`) lists those that it is given, as the op's own kernel takes them."""
        try:
            self.launch(program, **arguments)
        except UnfitArguments as error:
            own = Source.of_op(self.source)
            if program.source.text == own.text:
                raise
            given = parameters(own, error.kernel)
            raise UnfitArguments(
                f"{error}. A kernel in the place of {self.name} is given {len(given)}: "
                f"{', '.join(map(str, given))}",
                error.kernel,
            ) from None

    def cases_named(self, part: str | None) -> list[Case]:
        """The calls of the grid whose names have this among the parts that dashes separate, or these
        several in a row: `float16`, `1x64-residual`. Without, all.

        Raises:
            InvalidField: there is none; the message lists those that there are.
        """
        found = [case for case in self.cases() if part is None or f"-{part}-" in f"-{case.name}-"]
        if not found:
            names = ", ".join(case.name for case in self.cases())
            problem = f"no call of {self.name} has this as a part between the dashes of its name"
            raise InvalidField("case", part, f"{problem}; there are {names}")
        return found

    def cost_of(self, arguments: Arguments) -> Cost:
        """Of a call as an engine makes it, which leaves out what has a default."""
        parameters = inspect.signature(self.launch).parameters.values()
        defaults = {
            p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty
        }
        return self.cost({**defaults, **arguments})
