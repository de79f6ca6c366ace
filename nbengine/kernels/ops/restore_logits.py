"""restore_logits: the logits as they were before `penalties`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.penalties import compact
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_logits

_THREADS = 256


def launch(program: Program, *, logits: Tensor, saved: Tensor, place: Tensor) -> None:
    """logits `[R, V]` at place[e] = row * V + id become saved[e]; no place stands there twice, and
    those outside the logits are left out.

    Raises:
        ValueError: shapes do not fit, or V is above 524,288.
    """
    num_rows, vocab_size = logits.shape
    check_logits(logits)
    check_dense("saved", saved, *place.shape, alignment=saved.element_size())
    program.kernel("restore_logits", logits.dtype)[-(-len(place) // _THREADS), _THREADS](
        logits, saved, place, num_rows, vocab_size, logits.stride(0), len(place)
    )


def reference(*, logits: Tensor, saved: Tensor, place: Tensor) -> None:
    vocab_size = logits.shape[1]
    inside = (place >= 0) & (place < logits.numel())
    logits[place[inside] // vocab_size, place[inside] % vocab_size] = saved[inside]


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(dtype, 3, 100, 70)


def bench_cases() -> Iterator[Case]:
    yield _case(torch.float32, 512, 151_936, 512 * 2000)


def _case(dtype: torch.dtype, rows: int, vocab_size: int, entries: int) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        device = generator.device
        place = torch.randperm(rows * vocab_size, generator=generator, device=device)[:entries]
        place[0], place[-1] = -1, rows * vocab_size
        return {
            "logits": sliced(normal(generator, dtype, rows, vocab_size), 1, 2),
            "saved": normal(generator, dtype, entries),
            "place": place,
        }

    return Case(title(dtype, f"{entries} of {rows}x{vocab_size}"), make)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 0.0)


def cost(arguments: Arguments) -> Cost:
    """A logit is written as a sector of 32 bytes, which is read before."""
    entries, itemsize = len(arguments["place"]), arguments["saved"].element_size()
    return Cost(entries * (64 + 8 + itemsize), 0)


OP = Op(
    name="restore_logits",
    source="penalties.cu",
    outputs=("logits",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
