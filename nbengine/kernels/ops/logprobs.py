"""logprobs: log-probabilities of chosen tokens, their ranks, and the most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.greedy import FEW_ROWS, ROW_THREADS
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_logits

MAX_TOP = 256
"""The largest k of one call."""


def launch(
    program: Program,
    *,
    chosen: Tensor,
    rank: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
) -> None:
    """For each question q, of row rows[q] of the logits `[R, V]` and its token token_ids[q]:
    chosen[q], the token's log-probability; rank[q], 1 + how many tokens are more likely; and the k
    most likely ones, best first and of equals the smaller id, as top_ids[q] and top_logprobs[q].

    chosen is float32 `[Q]`, top_logprobs float32 `[Q, k]`; rank, rows, token_ids int64 `[Q]`, top_ids
    int64 `[Q, k]`. Where a row holds NaN or +inf, or nothing but -inf, log-probabilities are NaN and
    top_ids 0, 1, ... Rows of the logits may be slices of wider ones.

    Raises:
        ValueError: shapes do not fit, V is above 524,288, or k above V or 256.
    """
    vocab_size = logits.shape[1]
    num_questions, k = top_ids.shape
    check_logits(logits)
    check_dense("chosen", chosen, num_questions, alignment=4)
    check_dense("rank", rank, num_questions, alignment=8)
    check_dense("rows", rows, num_questions, alignment=8)
    check_dense("token_ids", token_ids, num_questions, alignment=8)
    check_dense("top_ids", top_ids, num_questions, k, alignment=8)
    check_dense("top_logprobs", top_logprobs, num_questions, k, alignment=4)
    if k > min(vocab_size, MAX_TOP):
        raise ValueError(f"the {k} best of {vocab_size} tokens: at most {MAX_TOP} of them, and all")
    program.kernel("logprobs", logits.dtype)[num_questions, ROW_THREADS](
        chosen,
        rank,
        top_ids,
        top_logprobs,
        logits,
        rows,
        token_ids,
        vocab_size,
        logits.stride(0),
        k,
    )


def reference(
    *,
    chosen: Tensor,
    rank: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
) -> None:
    k = top_ids.shape[1]
    for q, (row, token_id) in enumerate(zip(rows.tolist(), token_ids.tolist(), strict=True)):
        x = logits[row].double()
        values = x.log_softmax(0)
        chosen[q] = values[token_id]
        rank[q] = 1 + (x > x[token_id]).sum()
        if values.isnan().any():
            top_logprobs[q], top_ids[q] = torch.nan, torch.arange(k, device=x.device)
        else:
            best = values.sort(descending=True, stable=True)
            top_logprobs[q], top_ids[q] = best.values[:k], best.indices[:k]


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(dtype, 100, 5)
    yield _case(torch.float32, 100, 100)
    yield _case(torch.float32, 8193, 0, padding=3)
    yield _case(torch.float32, 8193, 64, padding=3)
    yield _case(torch.float32, 10_000, 20, coarse=True)
    yield _unsound()
    yield _masked()


def bench_cases() -> Iterator[Case]:
    for rows in (512, 1):
        for k in (0, 20):
            yield _case(torch.float32, 151_936, k, num_rows=rows)


def _case(
    dtype: torch.dtype,
    vocab_size: int,
    k: int,
    *,
    num_rows: int = 2,
    padding: int = 0,
    coarse: bool = False,
) -> Case:
    """One question of each row, or two where there are few. Coarse logits are all but equal."""

    def make(generator: torch.Generator) -> Arguments:
        logits = normal(generator, torch.float32, num_rows, vocab_size) * 3
        if coarse:
            logits = (logits / 12).round()
        rows = torch.arange(num_rows).repeat(2 if num_rows == 2 else 1)
        rows[-1] = 0
        logits = logits.to(dtype)
        return _arguments(generator, sliced(logits, padding, 1) if padding else logits, rows, k)

    return Case(title(dtype, f"{num_rows}x{vocab_size}", f"k {k}", "ties" if coarse else ""), make)


def _unsound() -> Case:
    """Fewer finite logits than are asked for, and rows without probabilities."""

    def make(generator: torch.Generator) -> Arguments:
        logits = normal(generator, torch.float32, 5, 3000)
        logits[0, 4:] = -torch.inf
        logits[1, 2999] = torch.nan
        logits[2] = -torch.inf
        logits[3, 7] = torch.inf
        return _arguments(generator, logits, torch.arange(5), 8)

    return Case("NaN and infinities", make)


def _masked() -> Case:
    """More are asked for than are finite, of a row that several warps read."""

    def make(generator: torch.Generator) -> Arguments:
        logits = normal(generator, torch.float32, 1, 200)
        logits[0, 100:] = -torch.inf
        logits[0, 150] = 3.0
        return _arguments(generator, logits, torch.arange(1), 180)

    return Case("most are masked", make)


def _arguments(generator: torch.Generator, logits: Tensor, rows: Tensor, k: int) -> Arguments:
    device = generator.device
    num = len(rows)
    return {
        "chosen": poison(generator, torch.float32, num),
        "rank": torch.full((num,), -1, device=device),
        "top_ids": torch.full((num, k), -1, device=device),
        "top_logprobs": poison(generator, torch.float32, num, k),
        "logits": logits,
        "rows": rows.to(device),
        "token_ids": torch.randint(0, logits.shape[1], (num,), generator=generator, device=device),
    }


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 2e-5)


def cost(arguments: Arguments) -> Cost:
    logits, questions = arguments["logits"], len(arguments["rows"])
    size = questions * logits.shape[1]
    return Cost(size * logits.element_size(), 5 * size)


def compact(arguments: Arguments) -> Arguments:
    """The first questions, and their rows alone."""
    few = {name: x[:FEW_ROWS] for name, x in arguments.items() if name != "logits"}
    rows = few["rows"]
    return few | {
        "logits": arguments["logits"][rows],
        "rows": torch.arange(len(rows), device=rows.device),
    }


OP = Op(
    name="logprobs",
    source="logprobs.cu",
    outputs=("chosen", "rank", "top_ids", "top_logprobs"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
