"""The kernel bench: is a source right (`verify`)?

A call is made twice on clones of the same arguments, by the program and by the op's reference; then
every output must agree within the op's tolerance, and nothing else may have changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nbengine.kernels.op import Arguments, Case, Op
from nbengine.kernels.program import Program


class Mismatch(AssertionError):
    """An output differs from the reference: the message has the first wrong element, its index and
    both values."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found: the largest error of each case, as a fraction of what is allowed."""

    op: str
    errors: dict[str, float]


def verify(
    op: Op, program: Program, cases: Iterable[Case] | None = None, seed: int = 0
) -> Verified:
    """Check a program on the op's grid. Raises `Mismatch`."""
    errors = {}
    for case in op.cases() if cases is None else cases:
        generator = torch.Generator(program.device).manual_seed(seed)
        errors[case.name] = verify_call(op, program, case.make(generator), case.name)
    return Verified(op.name, errors)


def verify_call(op: Op, program: Program, arguments: Arguments, name: str = "") -> float:
    """Check one call, which changes nothing of `arguments`. Returns the largest error, as a
    fraction of what is allowed. Raises `Mismatch`."""
    found, wanted = _cloned(arguments), _cloned(arguments)
    op.launch(program, **found)
    op.reference(**wanted)
    worst = 0.0
    for key, tensor in found.items():
        if not isinstance(tensor, Tensor):
            continue
        title = f"{op.name} {name}: {key}".replace(" :", ":")
        if key in op.outputs:
            worst = max(worst, _compare(op, arguments, title, tensor, wanted[key]))
        elif not _same_bytes(tensor, arguments[key]):
            raise Mismatch(f"{title} is an input, and was changed")
    return worst


def _cloned(arguments: Arguments) -> Arguments:
    """Copies with the same strides. Slices of wider rows stay so, with NaN-free neighbours."""
    return {
        key: _clone(value) if isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }


def _clone(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor.clone()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    span = tensor.as_strided((extent,), (1,), tensor.storage_offset()).clone()
    return span.as_strided(tensor.shape, tensor.stride())


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


def _compare(op: Op, arguments: Arguments, title: str, found: Tensor, wanted: Tensor) -> float:
    tolerance = op.tolerance(arguments)
    a, b = found.double(), wanted.double()
    allowed = tolerance.absolute + tolerance.relative * b.abs()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, and what neither may write
    fraction = torch.where(same, 0.0, (a - b).abs() / allowed).nan_to_num(torch.inf, torch.inf)
    wrong = fraction > 1
    if bool(wrong.any()):
        index = tuple(int(i) for i in wrong.nonzero()[0])
        raise Mismatch(
            f"{title}{list(index)} is {found[index].item():.6g}, the reference says "
            f"{wanted[index].item():.6g} (allowed: {allowed[index].item():.2g}); "
            f"{int(wrong.sum()):,} of {wrong.numel():,} elements are wrong"
        )
    return float(fraction.max()) if fraction.numel() else 0.0
