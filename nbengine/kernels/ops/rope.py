"""rope: rotary position embedding by a table of cosines and sines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_rows, pack_size

_THREADS = 128


def launch(program: Program, *, out: Tensor, x: Tensor, positions: Tensor, table: Tensor) -> None:
    """out[t] = x[t] turned to positions[t].

    x and out are `[T, heads, head_dim]`; their rows may be slices of wider ones, and out may be x.
    positions is int64 `[T]`, each below max_positions. table is `[max_positions, 2, head_dim]`, of
    x's dtype or float32: (cos, cos) and (-sin, sin) over the halves of a head. Raises `ValueError`
    for shapes that do not fit.
    """
    num_tokens, num_heads, head_dim = x.shape
    check_rows("x", x, num_tokens, num_heads, head_dim)
    check_rows("out", out, num_tokens, num_heads, head_dim)
    check_dense("positions", positions, num_tokens, alignment=8)
    check_table(table, head_dim)
    packs = num_heads * (head_dim // 2 // pack_size(head_dim // 2, x.element_size()))
    kernel = program.kernel("rope", x.dtype, table.dtype, head_dim, _THREADS)
    kernel[(num_tokens, -(-packs // _THREADS)), _THREADS](
        out, x, positions, table, num_heads, x.stride(0), out.stride(0)
    )


def check_table(table: Tensor, head_dim: int) -> None:
    """Raises `ValueError` unless `table` turns heads of `head_dim`, an even number."""
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd: rope turns pairs of dimensions")
    check_dense("table", table, table.shape[0], 2, head_dim)


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x `[T, heads, head_dim]` turned by rows `[T, 2, head_dim]` of the table, in float32."""
    cos, sin = cos_sin[:, :1].float(), cos_sin[:, 1:].float()
    return x.float() * cos + x.float().roll(x.shape[-1] // 2, dims=-1) * sin


def reference(*, out: Tensor, x: Tensor, positions: Tensor, table: Tensor) -> None:
    out.copy_(rotated(x, table[positions]))


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for head_dim, heads in ((64, 3), (80, 5), (128, 36), (256, 2)):
            yield _case(dtype, dtype, 3, heads, head_dim)
        yield _case(dtype, torch.float32, 2, 3, 96)
    yield _case(torch.bfloat16, torch.bfloat16, 2, 3, 20)  # no whole packs of 16 bytes


def _case(
    dtype: torch.dtype, table_dtype: torch.dtype, tokens: int, heads: int, head_dim: int
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": poison(generator, dtype, tokens, heads, head_dim),
            "x": sliced(normal(generator, dtype, tokens, heads, head_dim), 0, 2),
            "positions": random_positions(generator, tokens),
            "table": random_table(generator, table_dtype, head_dim),
        }

    name = title(dtype, f"{tokens}x{heads}x{head_dim}", f"{str(table_dtype)[6:]} table")
    return Case(name, make)


_POSITIONS = 50


def random_positions(generator: torch.Generator, tokens: int) -> Tensor:
    return torch.randint(_POSITIONS, (tokens,), generator=generator, device=generator.device)


def random_table(generator: torch.Generator, dtype: torch.dtype, head_dim: int) -> Tensor:
    angles = normal(generator, torch.float32, _POSITIONS, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    rows = (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    return torch.stack(rows, 1).to(dtype)


def bench_cases() -> Iterator[Case]:
    for tokens in (1, 128, 8192):
        yield _case(torch.bfloat16, torch.bfloat16, tokens, 32, 128)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    x, table = arguments["x"], arguments["table"]
    angles = x.shape[0] * table.shape[2] * table.element_size()  # half of a row each
    return Cost(2 * x.numel() * x.element_size() + angles, 3 * x.numel())


OP = Op(
    name="rope",
    source="rope.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
)
