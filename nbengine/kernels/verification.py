"""`verify`: is an implementation right?

A call is made twice on copies of the same arguments, by the implementation and by the op's
reference. Then every output must agree within the op's tolerance, and nothing else may have
changed: no input, and nothing between the rows of an output that is a slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape

import torch
from torch import Tensor

from nbengine.errors import NbengineError
from nbengine.kernels.arguments import cloned, span
from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.implementation import Implementable, Implementation, implement, op_named
from nbengine.kernels.op import Arguments, Case, Op, Tolerance
from nbengine.kernels.program import Program, kernel_device
from nbengine.progress import say


class Mismatch(NbengineError, AssertionError):
    """An output differs from the reference, first at `index` of `argument`; or, where `index` is
    None, something was changed that is no output."""

    def __init__(
        self,
        message: str,
        argument: str,
        index: tuple[int, ...] | None = None,
        found: float | None = None,
        wanted: float | None = None,
    ) -> None:
        super().__init__(message)
        self.argument, self.index, self.found, self.wanted = argument, index, found, wanted


@dataclass(frozen=True, slots=True, repr=False)
class Verified:
    """That an implementation agrees, and how closely: the largest error of each case, as a
    fraction of what is allowed."""

    op: str
    implementation: str
    errors: dict[str, float]
    num_live: int | None = None
    """How many of these were calls of an engine; None where no engine was asked."""

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)

    def table(self) -> str:
        """Case by case."""
        return table_text(_HEADERS, self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, f"{error:.1%}") for name, error in self.errors.items()]

    def __repr__(self) -> str:
        return (
            f"{self.op}: {self.implementation} agrees with the reference on {self._calls()}; the "
            f"largest error is {self.worst:.0%} of what is allowed"
        )

    def _calls(self) -> str:
        num = len(self.errors) - (self.num_live or 0)
        calls = f"{num} call{'s' * (num != 1)}"
        if self.num_live is None:
            return calls
        if self.num_live == 0:
            return f"{calls} of its grid, and on no live one: the engine makes none now"
        return f"{calls} of its grid and {self.num_live} live"

    def _repr_html_(self) -> str:
        calls = table_html(_HEADERS, self._rows())
        return f"<details><summary>{escape(repr(self))}</summary>{calls}</details>"


_HEADERS = ("call", "largest error, of what is allowed")


def verify(
    op: str | Op,
    what: Implementable = None,
    cases: Iterable[Case] | None = None,
    seed: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Verified:
    """Check an implementation on the op's grid: on the GPU where there is one, else emulated with
    every check on.

    Inside `progress_to(print)` it tells how far it is.

    Args:
        what: None (the op's own `.cu`), CUDA C (text, path, `Source`), a `Program`, a Python
            function of the op's arguments, or the name of an alternative ("cute").
        cases: in place of the op's grid.
        device: in place of the `Program`'s, or of the machine's first GPU.

    Raises:
        Mismatch: with the first wrong element, its index and both values.
        InvalidField: kernels can't run on this device, or it is not there.
        ValueError: no cases, or `what` is nothing that can be verified.
    """
    found = op_named(op)
    if cases is not None:
        cases = list(cases)
        if not cases:
            raise ValueError(f"no cases were given: {found.name} would agree with anything on none")
    if device is None and isinstance(what, Program):
        device = what.device
    device = kernel_device(device)
    return verify_implementation(implement(found, what, device, checks=True), device, cases, seed)


def verify_implementation(
    implementation: Implementation,
    device: torch.device,
    cases: Iterable[Case] | None = None,
    seed: int = 0,
) -> Verified:
    """`verify` on the op's grid, or on these cases."""
    op = implementation.op
    cases = list(op.cases() if cases is None else cases)
    errors = {}
    for number, case in enumerate(cases, 1):
        say(f"verifying {op.name} on its grid: {number} of {len(cases)} calls")
        arguments = case.make(torch.Generator(device).manual_seed(seed))
        errors[case.name] = _verify_call(implementation, arguments, case.name)
    return Verified(op.name, str(implementation), errors)


def verify_live(
    implementation: Implementation, live_arguments: Iterable[Arguments], on_grid: Verified
) -> Verified:
    """Check the arguments of an engine's calls too."""
    errors = {}
    for i, arguments in enumerate(live_arguments):
        say(f"verifying {implementation.op.name} on live tensors: call {i + 1}")
        name = f"live call {i}"
        errors[name] = _verify_call(implementation, _poisoned(implementation.op, arguments), name)
    return replace(on_grid, errors=on_grid.errors | errors, num_live=len(errors))


def verify_call(op: Op, program: Program, arguments: Arguments, name: str = "") -> float:
    """Check one call, which changes nothing of `arguments`. Returns the largest error, as a
    fraction of what is allowed. Raises `Mismatch`."""
    return _verify_call(implement(op, program, program.device), arguments, name)


def _verify_call(implementation: Implementation, arguments: Arguments, name: str) -> float:
    op = implementation.op
    found = cloned(arguments)
    wanted = cloned(arguments, lambda name, tensor: name in op.outputs)
    implementation.call(**found)
    device = next((x.device for x in found.values() if isinstance(x, Tensor) and x.is_cuda), None)
    if device is not None:  # pinned outputs are read next; and an error is this call's own
        torch.cuda.current_stream(device).synchronize()
    op.reference(**wanted)
    tolerance = op.tolerance(arguments)
    written = {id(arguments.get(key)) for key in op.outputs}
    worst = 0.0
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor) or key in op.scratch:
            continue
        given, title = arguments[key], f"{op.name} {name}: {key}".replace(" :", ":")
        if key in op.outputs:
            worst = max(worst, _compare(tolerance, key, title, tensor, wanted[key]))
            tensor.copy_(given)
            if not _same_bytes(span(tensor), span(given)):
                raise Mismatch(f"{title} is a slice, and memory between its rows was changed", key)
        elif id(given) not in written and not _same_bytes(span(tensor), span(given)):
            raise Mismatch(f"{title} is an input, and was changed", key)
    return worst


def _poisoned(op: Op, arguments: Arguments) -> Arguments:
    """With NaN in each output that the call only writes: a live one may hold the right values from
    the time before. (One that is read too, as a residual, makes another output NaN, or all of
    itself.)"""
    result = arguments
    for key in op.outputs:
        value = arguments.get(key)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        poisoned = cloned(result, lambda name, tensor: name in op.outputs)
        poisoned[key].fill_(torch.nan)
        probe = cloned(poisoned, lambda name, tensor: name in op.outputs)
        op.reference(**probe)
        if not any(
            bool(probe[name].isnan().all())
            for name in op.outputs
            if isinstance(probe.get(name), Tensor)
        ):
            result = poisoned
    return result


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


_CHUNK = 1 << 26
"""Elements compared at a time: in float64 a large output would need ten times its own memory."""


def _compare(
    tolerance: Tolerance, argument: str, title: str, found: Tensor, wanted: Tensor
) -> float:
    worst, num_wrong, first = 0.0, 0, None
    rows = max(1, _CHUNK // max(1, found[:1].numel())) if found.dim() else 1
    found, wanted = torch.atleast_1d(found), torch.atleast_1d(wanted)
    for start in range(0, len(found), rows):
        a, b = (x[start : start + rows].double() for x in (found, wanted))
        allowed = tolerance.absolute + tolerance.relative * b.abs()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities, and what neither may write
        fraction = torch.where(same, 0.0, (a - b).abs() / allowed).nan_to_num(torch.inf, torch.inf)
        wrong = fraction > 1
        if first is None and bool(wrong.any()):
            at = tuple(int(i) for i in wrong.nonzero()[0])
            first = (start + at[0], *at[1:]), a[at].item(), b[at].item(), allowed[at].item()
        num_wrong += int(wrong.sum())
        worst = max(worst, float(fraction.max())) if fraction.numel() else worst
    if first is not None:
        index, a_first, b_first, allowed_first = first
        raise Mismatch(
            f"{title}{list(index)} is {a_first:.6g}, the reference says {b_first:.6g} (allowed: "
            f"{allowed_first:.2g}); {num_wrong:,} of {found.numel():,} elements are wrong",
            argument,
            index,
            a_first,
            b_first,
        )
    return worst
