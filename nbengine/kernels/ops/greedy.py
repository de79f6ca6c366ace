"""greedy: the most likely token of each row of logits, and whether the row is sound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_logits

ROW_THREADS = 512
"""`nb::kRowThreads`: one block for each row."""


def launch(program: Program, *, out_ids: Tensor, largest: Tensor, logits: Tensor) -> None:
    """out_ids[r] is the place of the largest of logits[r], the first of equals; largest[r] its value.

    logits is `[R, V]`, whose rows may be slices of wider ones; out_ids int64 `[R]`, largest float32
    `[R]`. In a row that holds NaN, `largest` is NaN and the id that of the largest number (0 where
    there is none): always below V.

    Raises:
        ValueError: shapes do not fit, or V is above 524,288.
    """
    num_rows, vocab_size = logits.shape
    check_logits(logits)
    check_dense("out_ids", out_ids, num_rows, alignment=8)
    check_dense("largest", largest, num_rows, alignment=4)
    program.kernel("greedy", logits.dtype)[num_rows, ROW_THREADS](
        out_ids, largest, logits, vocab_size, logits.stride(0)
    )


def reference(*, out_ids: Tensor, largest: Tensor, logits: Tensor) -> None:
    values = logits.float()
    numbers = values.masked_fill(values.isnan(), -torch.inf)
    out_ids.copy_(numbers.argmax(dim=1))
    largest.copy_(values.amax(dim=1))  # NaN where any is


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, vocab_size in ((3, 100), (2, 8193), (1, 10_000)):
            yield _case(dtype, rows, vocab_size)
    yield _case(torch.float32, 1, 151_936)
    yield _unsound()
    for vocab_size in (100, 8193, 10_000, 151_936):
        yield _all_nan(vocab_size)


def bench_cases() -> Iterator[Case]:
    for rows in (512, 64, 1):
        yield _case(torch.float32, rows, 151_936)


def _case(dtype: torch.dtype, rows: int, vocab_size: int) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        # Rounded, so that many are equal; the first and last columns win now and then.
        logits = (normal(generator, torch.float32, rows, vocab_size) * 8).round().to(dtype)
        logits[0, -1] = 100.0
        return {
            "out_ids": torch.full((rows,), -1, device=generator.device),
            "largest": poison(generator, torch.float32, rows),
            "logits": logits,
        }

    return Case(title(dtype, f"{rows}x{vocab_size}"), make)


def _unsound() -> Case:
    """Rows of which nothing can be sampled, each between columns of padding."""

    def make(generator: torch.Generator) -> Arguments:
        logits = normal(generator, torch.float32, 6, 1234)
        logits[1, 7] = torch.nan
        logits[2] = torch.nan
        logits[3] = -torch.inf
        logits[4, 1233] = torch.inf
        logits[5, :1000] = -torch.inf
        return {
            "out_ids": torch.full((6,), -1, device=generator.device),
            "largest": poison(generator, torch.float32, 6),
            "logits": sliced(logits, 3, 2),
        }

    return Case("NaN and infinities between padding", make)


def _all_nan(vocab_size: int) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "out_ids": torch.full((1,), -1, device=generator.device),
            "largest": poison(generator, torch.float32, 1),
            "logits": poison(generator, torch.float32, 1, vocab_size),
        }

    return Case(f"NaN of {vocab_size}", make)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 0.0)


def cost(arguments: Arguments) -> Cost:
    logits = arguments["logits"]
    return Cost(logits.numel() * logits.element_size() + 12 * len(logits), logits.numel())


FEW_ROWS = 16
"""What `compact` leaves of a batch's logits: 10 MB of a large vocabulary."""


def compact(arguments: Arguments) -> Arguments:
    """The first rows."""
    return {name: tensor[:FEW_ROWS] for name, tensor in arguments.items()}


OP = Op(
    name="greedy",
    source="sampling.cu",
    outputs=("out_ids", "largest"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
