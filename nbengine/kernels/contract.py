"""`contract`: what a kernel must do to take an op's place, to be read before one is written.

All of it is read off the op itself: its launch's signature and words, its reference, its grid, and
the kernels that its launch asks a source for, with the parameters that they take now.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from nbengine.errors import shown
from nbengine.kernels.implementation import op_named, short_name
from nbengine.kernels.op import Op
from nbengine.kernels.planned import PlannedLaunch, planned
from nbengine.kernels.source import Source, template_arguments


@dataclass(frozen=True, slots=True, repr=False)
class Contract:
    """Of one op. `str()` and a notebook show it as a page."""

    op: Op
    source: Source
    """What runs the op now: a cell to begin from."""
    call: str
    """The call of the grid whose launches are shown."""
    arguments: dict[str, str]
    """Of that call, in words: tensors by shape and dtype."""
    launches: tuple[PlannedLaunch, ...]

    @property
    def signature(self) -> str:
        """The op's arguments, as a Python function that implements it takes them."""
        parameters = list(inspect.signature(self.op.launch).parameters.values())[1:]
        lines = "".join(
            f"    {p.name}: {p.annotation}"
            + ("" if p.default is inspect.Parameter.empty else f" = {p.default!r}")
            + ",\n"
            for p in parameters
        )
        return f"def {self.op.name}(\n    *,\n{lines})"

    @property
    def words(self) -> str:
        """What the op computes, and what its arguments are."""
        return inspect.getdoc(self.op.launch) or ""

    @property
    def reference(self) -> str:
        """The op in torch: what a kernel is compared with."""
        return inspect.getsource(self.op.reference)

    def _facts(self) -> list[str]:
        num_cases = sum(1 for _ in self.op.cases())
        return [
            f"writes {', '.join(self.op.outputs)}, and changes no other argument",
            f"agrees with the reference on {num_cases} calls of the op's grid, within the tolerance",
            f"is launched, for the call {self.call}:",
            *(f"  {self._named(launch)}\n    with {launch.size}" for launch in self.launches),
            "where the op is called with:",
            *(f"  {name}: {value}" for name, value in self.arguments.items()),
        ]

    def _named(self, launch: PlannedLaunch) -> str:
        """The kernel, with the names that the source has for its template parameters."""
        named = template_arguments(self.source, launch.kernel)
        arguments = ", ".join(f"{name}={value}" for name, value in named.items())
        return launch.kernel.partition("<")[0] + (f"<{arguments}>" if arguments else "")

    def _kernels(self) -> str:
        return "\n".join(
            f"__global__ void {launch.kernel.partition('<')[0]}(\n"
            + ",\n".join(f"    {p.c_type} {p.name}" for p in launch.parameters)
            + ")"
            for launch in {launch.kernel: launch for launch in self.launches}.values()
        )

    def _begin(self) -> str:
        return (
            f"%nb_kernel {self.op.name} --source puts the current source, "
            f"{short_name(self.source.name)}, into a cell below; "
            f"%%nb_kernel {self.op.name} above CUDA C tries it"
        )

    def __str__(self) -> str:
        facts = "\n".join(self._facts())
        return (
            f"{self.op.name}: {self.words}\n\n{self.signature}\n\nA kernel in its place\n{facts}\n\n"
            f"{self._kernels()}\n\nThe reference\n{self.reference}\n{self._begin()}"
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def code(text: str) -> str:
            return f"<pre style='margin:.3em 0 .3em 1em'>{escape(text)}</pre>"

        return (
            f"<b>{escape(self.op.name)}</b>"
            f"<pre style='white-space:pre-wrap;margin:.3em 0'>{escape(self.words)}</pre>"
            f"<div>A kernel in its place</div>{code(chr(10).join(self._facts()))}"
            f"{code(self._kernels())}"
            f"<details><summary>the op's arguments</summary>{code(self.signature)}</details>"
            f"<details><summary>the reference, in torch</summary>{code(self.reference)}</details>"
            f"<div>{escape(self._begin())}</div>"
        )


def contract(op: str | Op, source: Source | None = None, case: str | None = None) -> Contract:
    """What a kernel must do to take the op's place. `source` is what runs it now, if that is not
    its own file; of the calls whose names have the part `case`, the first in bfloat16 is shown, or the
    first. Raises `UnknownOp`, `InvalidField`."""
    found = op_named(op)
    source = source or Source.of_op(found.source)
    cases = found.cases_named(case)
    chosen = next((case for case in cases if case.name.startswith("bfloat16")), cases[0])
    arguments = chosen.make(torch.Generator().manual_seed(0))
    launches = planned(found, source, arguments)
    words = {name: _described(value) for name, value in arguments.items()}
    return Contract(found, source, chosen.name, words, launches)


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
