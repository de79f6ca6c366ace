"""penalties: bans, biases and penalties of single logits, in place, and what they replaced."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.greedy import FEW_ROWS
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_logits, check_shape

BANNED, SEEN, ONE_IN_OUTPUT = 1, 2, 4
"""What `marks` is the sum of: the token is banned; it stands in prompt or output; and this for each
time it stands in the output."""

_THREADS = 256


def launch(
    program: Program,
    *,
    logits: Tensor,
    saved: Tensor,
    place: Tensor,
    bias: Tensor,
    marks: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """Changes the logits `[R, V]` at E places, and keeps in saved `[E]` what stood there.

    place, int64 `[E]`, is row * V + id; none stands there twice, and those outside the logits are
    left out. bias is float64 `[E]`; marks, int64 `[E]`, adds up `BANNED`, `SEEN` and
    `ONE_IN_OUTPUT`. The penalties are float64 `[R]`. In this order: -inf where banned; the bias; the
    repetition penalty where seen; frequency and presence penalty where the output holds the token.
    Rows of the logits may be slices of wider ones.

    Raises:
        ValueError: shapes do not fit, or V is above 524,288.
    """
    num_rows, vocab_size = logits.shape
    num_entries = len(place)
    check_logits(logits)
    check_dense("saved", saved, num_entries, alignment=saved.element_size())
    check_shape("bias", bias, num_entries)
    check_shape("marks", marks, num_entries)
    for name, penalty in (
        ("repetition", repetition),
        ("frequency", frequency),
        ("presence", presence),
    ):
        check_shape(name, penalty, num_rows)
    program.kernel("penalties", logits.dtype)[-(-num_entries // _THREADS), _THREADS](
        logits,
        saved,
        place,
        bias,
        marks,
        repetition,
        frequency,
        presence,
        num_rows,
        vocab_size,
        logits.stride(0),
        num_entries,
    )


def reference(
    *,
    logits: Tensor,
    saved: Tensor,
    place: Tensor,
    bias: Tensor,
    marks: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    vocab_size = logits.shape[1]
    inside = (place >= 0) & (place < logits.numel())
    row, token = place[inside] // vocab_size, place[inside] % vocab_size
    marks = marks[inside]
    saved[inside] = logits[row, token]
    x = logits[row, token].float()
    x = torch.where((marks & BANNED) > 0, -torch.inf, x) + bias[inside].float()
    penalty = repetition.float()[row]
    x = torch.where((marks & SEEN) > 0, torch.where(x > 0, x / penalty, x * penalty), x)
    times = marks // ONE_IN_OUTPUT
    lowered = x - times * frequency.float()[row] - presence.float()[row]
    logits[row, token] = torch.where(times > 0, lowered, x).to(logits.dtype)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(dtype, 3, 100, 70)
    yield _case(torch.float32, 2, 10_000, 900)
    yield _case(torch.float32, 1, 5, 0)


def bench_cases() -> Iterator[Case]:
    """Two thousand different tokens in each of 512 sequences."""
    yield _case(torch.float32, 512, 151_936, 512 * 2000)


def _case(dtype: torch.dtype, rows: int, vocab_size: int, entries: int) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        device = generator.device

        def uniform(low: float, high: float, size: int) -> Tensor:
            numbers = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
            return low + (high - low) * numbers

        place = torch.randperm(rows * vocab_size, generator=generator, device=device)[:entries]
        if entries:
            place[0], place[-1] = -1, rows * vocab_size
        marks = torch.randint(0, 20, (entries,), generator=generator, device=device)
        bias = uniform(-5, 5, entries)
        return {
            "logits": sliced(normal(generator, dtype, rows, vocab_size), 1, 2),
            "saved": poison(generator, dtype, entries),
            "place": place,
            "bias": torch.where(bias > 0, bias, 0.0),
            "marks": marks,
            "repetition": uniform(0.5, 2.0, rows),
            "frequency": uniform(-2.0, 2.0, rows),
            "presence": uniform(-2.0, 2.0, rows),
        }

    return Case(title(dtype, f"{entries} of {rows}x{vocab_size}"), make)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["logits"].dtype, 1e-6)


def cost(arguments: Arguments) -> Cost:
    """A logit is read and written as a sector of 32 bytes."""
    entries, itemsize = len(arguments["place"]), arguments["saved"].element_size()
    return Cost(entries * (64 + 24 + itemsize), 8 * entries)


def compact(arguments: Arguments) -> Arguments:
    """Copies of the first rows, and the places that lie in them."""
    few = {name: arguments[name][:FEW_ROWS].clone() for name in arguments.keys() & _OF_ROWS}
    inside = arguments["place"] < few["logits"].numel()
    return {name: few[name] if name in few else x[inside] for name, x in arguments.items()}


_OF_ROWS = {"logits", "repetition", "frequency", "presence"}


OP = Op(
    name="penalties",
    source="penalties.cu",
    outputs=("logits", "saved"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
