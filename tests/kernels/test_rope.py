"""rope: against the decoder's own operation, in place, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.op import Op
from nbengine.kernels.ops import rope
from nbengine.kernels.program import Program
from nbengine.models.ops import rotate
from nbengine.models.rope import rope_table


@pytest.mark.parametrize("head_dim", [64, 80])
def test_it_turns_heads_as_the_decoder_does(
    program_for: Callable[[Op], Program], head_dim: int
) -> None:
    program = program_for(rope.OP)
    table = rope_table(head_dim, 1e4, None, 40, dtype=torch.float32, device=program.device)
    positions = torch.tensor([0, 7, 39], device=program.device)
    x = torch.randn(3, 4, head_dim, device=program.device)
    out = torch.full_like(x, torch.nan)
    rope.launch(program, out=out, x=x, positions=positions, table=table)
    torch.testing.assert_close(out, rotate(x, table[positions]), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[0], x[0])  # position 0 turns nothing


def test_heads_are_turned_in_place_within_wider_rows(
    program_for: Callable[[Op], Program],
) -> None:
    program = program_for(rope.OP)
    generator = torch.Generator(program.device).manual_seed(0)
    table = rope.random_table(generator, torch.float16, 64)
    positions = rope.random_positions(generator, 2)
    wide = torch.randn(2, 5, 64, generator=generator, device=program.device).half()
    before = wide.clone()
    heads = wide[:, 1:3]
    rope.launch(program, out=heads, x=heads, positions=positions, table=table)
    expected = torch.empty_like(heads)
    rope.reference(out=expected, x=before[:, 1:3], positions=positions, table=table)
    torch.testing.assert_close(heads, expected)
    assert torch.equal(wide[:, [0, 3, 4]], before[:, [0, 3, 4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"table": torch.zeros(9, 2, 32)},
            r"table has the shape \[9, 2, 32\], and needs \[9, 2, 64\]",
        ),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"positions has the shape \[3\]"),
        ({"out": torch.zeros(2, 3, 64).mT.contiguous().mT}, "out .* each row must be dense"),
        ({"x": torch.zeros(2, 3, 7), "out": torch.zeros(2, 3, 7)}, "head_dim=7 is odd"),
        ({"x": torch.zeros(2, 193)[:, 1:].view(2, 3, 64)}, "multiples of 16 bytes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_their_numbers(
    change: dict[str, torch.Tensor], message: str
) -> None:
    arguments = {
        "out": torch.zeros(2, 3, 64),
        "x": torch.zeros(2, 3, 64),
        "positions": torch.zeros(2, dtype=torch.int64),
        "table": torch.zeros(9, 2, 64),
    }
    with pytest.raises(ValueError, match=message):
        rope.launch(None, **arguments | change)
