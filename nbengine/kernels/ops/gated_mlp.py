"""gated_mlp: the gated activation between an MLP's two products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from nbengine.kernels.cases import FLOATS, normal, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, pack_size

ACTIVATIONS = {"silu": "Silu", "gelu_tanh": "GeluTanh"}
"""The kernel's name for each."""

_THREADS = 256


def launch(program: Program, *, out: Tensor, gate_up: Tensor, activation: str = "silu") -> None:
    """out `[T, size]` = activation(gate) * up of gate_up `[T, 2 * size]`, a row's gates first.

    The activation is "silu" or "gelu_tanh" (GELU by tanh, Hendrycks and Gimpel 2016). Raises
    `ValueError` for another one, and for shapes that do not fit.
    """
    num_tokens, size = out.shape
    check_dense("out", out, num_tokens, size)
    check_dense("gate_up", gate_up, num_tokens, 2 * size)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: there are {', '.join(ACTIVATIONS)}")
    kernel = program.kernel("gated_mlp", out.dtype, ACTIVATIONS[activation], size, _THREADS)
    packs = num_tokens * (size // pack_size(size, out.element_size()))
    kernel[-(-packs // _THREADS), _THREADS](out, gate_up, num_tokens)


def reference(*, out: Tensor, gate_up: Tensor, activation: str = "silu") -> None:
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")
    out.copy_(gate * up)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for activation in ACTIVATIONS:
            for tokens, size in ((1, 1536), (3, 576), (2, 4864)):
                yield _case(dtype, tokens, size, activation)
    yield _case(torch.float16, 1, 18944, "silu")
    yield _case(torch.bfloat16, 3, 10, "silu")  # no whole packs of 16 bytes


def _case(dtype: torch.dtype, tokens: int, size: int, activation: str) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": poison(generator, dtype, tokens, size),
            "gate_up": 3 * normal(generator, dtype, tokens, 2 * size),
            "activation": activation,
        }

    return Case(title(dtype, f"{tokens}x{size}", activation), make)


def bench_cases() -> Iterator[Case]:
    for tokens in (1, 128, 8192):
        yield _case(torch.bfloat16, tokens, 18944, "silu")


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    out = arguments["out"]
    return Cost(3 * out.numel() * out.element_size(), 6 * out.numel())


OP = Op(
    name="gated_mlp",
    source="gated_mlp.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
)
