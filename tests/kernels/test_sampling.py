"""greedy, sample, logprobs, penalties: their grids, every width, rows apart, and exact selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbengine.execution.philox import uniforms
from nbengine.kernels import lab
from nbengine.kernels.op import Case, Op
from nbengine.kernels.ops import greedy, logprobs, penalties, restore_logits, sample
from nbengine.kernels.program import Program

OPS = (greedy, sample, logprobs, penalties, restore_logits)


@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(module.OP, case, id=f"{module.OP.name}-{case.name}")
        for module in OPS
        for case in module.cases()
    ],
)
def test_agrees_with_its_reference(
    program_for: Callable[[Op], Program], op: Op, case: Case
) -> None:
    lab.verify(op, program_for(op), [case])


def draw(
    program: Program,
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    samples: int = 1,
    allowed: tuple[int, ...] = (),
    seed: int = 7,
) -> tuple[list[list[int]], list[float]]:
    """The ids that each row draws, all rows by the same rules, and the rows' largest logits."""
    rows = len(logits)

    def every(value: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=program.device)

    def repeated(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=program.device).repeat(rows)

    out_ids = torch.full((rows * samples,), -1, device=program.device)
    largest = every(torch.nan, torch.float32)
    counts = torch.arange(rows + 1, device=program.device)
    sample.launch(
        program,
        out_ids=out_ids,
        largest=largest,
        logits=logits.to(program.device),
        temperature=every(temperature, torch.float64),
        min_p=every(min_p, torch.float64),
        top_p=every(top_p, torch.float64),
        top_k=every(top_k, torch.int64),
        seed=every(seed, torch.int64),
        position=every(1, torch.int64),
        allowed_offsets=counts * len(allowed),
        allowed_ids=repeated(list(allowed)),
        sample_offsets=counts * samples,
        sample_indices=repeated(list(range(samples))),
    )
    return out_ids.view(rows, samples).tolist(), largest.tolist()


RULES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2, "top_p": 0.9},
    {"top_k": 700, "top_p": 0.99},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_ids_are_below_the_vocabulary_size_at_every_width(
    program_for: Callable[[Op], Program], rules: dict[str, Any]
) -> None:
    program = program_for(sample.OP)
    for width in (1, 2, 31, 100, 511, 513, 4099):
        for dtype in (torch.float32, torch.bfloat16):
            wide = torch.full((4, width + 3), 50.0, dtype=dtype)  # more likely than any token
            logits = wide[:, 1 : 1 + width]
            logits[:] = torch.randn(4, width)
            logits[1] = torch.nan
            logits[2] = 0.0
            logits[3, : width - 1] = -torch.inf
            ids, largest = draw(program, logits, samples=3, **rules)
            assert all(0 <= i < width for row in ids for i in row)
            assert ids[3] == [width - 1] * 3
            assert largest[0] < 50 and largest[1] != largest[1]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_row_draws_the_same_wherever_it_lies_and_whatever_lies_beside_it(
    program_for: Callable[[Op], Program], rules: dict[str, Any]
) -> None:
    program = program_for(sample.OP)
    width = 3001  # odd: each row begins at another offset from a multiple of 16 bytes
    logits = torch.randn(5, width) * 2
    together, _ = draw(program, logits, samples=4, **rules)
    logits[1] = torch.nan
    beside, _ = draw(program, logits, samples=4, **rules)
    for r in (0, 2, 3, 4):
        alone, _ = draw(program, logits[r : r + 1].clone(), samples=4, **rules)
        assert together[r] == beside[r] == alone[0]


def test_numbers_are_those_of_the_sampler_in_torch() -> None:
    seeds, indices, positions = [0, -1, 2**63 - 1, -(2**40)], [0, 1, 2**33, 5], [1, 9, 2**35, 0]
    expected = uniforms(seeds, indices, positions).tolist()
    assert [
        sample.uniform(*each) for each in zip(seeds, indices, positions, strict=True)
    ] == expected


@pytest.mark.parametrize("top_k", [1, 3, 256, 257, 512, 2999])
def test_top_k_keeps_exactly_k_and_what_equals_the_last(
    program_for: Callable[[Op], Program], top_k: int
) -> None:
    """All but equal logits, whose order among 3,000 only an exact selection sees: what is kept is
    drawn evenly, so that the number of each draw says which token it must be."""
    program = program_for(sample.OP)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(top_k))
    logits = 1.0 + order * 2**-20
    logits[order == 2999 - top_k] = 1.0 + (3000 - top_k) * 2**-20  # a tie with the k-th
    kept = (order >= 2999 - top_k).nonzero().flatten().tolist()
    drawn, _ = draw(program, logits[None], top_k=top_k, temperature=1000.0, samples=40)
    for index, token_id in enumerate(drawn[0]):
        at = sample.uniform(7, index, 1) * len(kept)
        if 0.01 < at % 1 < 0.99:
            assert token_id == kept[int(at)]


def test_a_nucleus_of_equal_tokens_keeps_them_all(program_for: Callable[[Op], Program]) -> None:
    program = program_for(sample.OP)
    drawn = draw(program, torch.zeros(1, 5000), top_p=0.1, samples=60)[0][0]
    assert len(set(drawn)) > 50 and max(drawn) > 4500 and min(drawn) < 500


def test_allowed_ids_outside_the_vocabulary_leave_nothing(
    program_for: Callable[[Op], Program],
) -> None:
    program = program_for(sample.OP)
    logits = torch.randn(1, 100)
    ids, largest = draw(program, logits, allowed=(-5, 100, 2**40))
    assert largest == [-torch.inf] and 0 <= ids[0][0] < 100
    assert draw(program, logits, allowed=(-5, 42, 2**40), samples=3)[0] == [[42, 42, 42]]


@pytest.mark.parametrize("module", OPS, ids=lambda module: module.OP.name)
def test_a_live_call_made_small_is_the_same_call_on_its_first_rows(
    program_for: Callable[[Op], Program], module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in OPS:
        monkeypatch.setattr(each, "FEW_ROWS", 2, raising=False)
    program = program_for(module.OP)
    case = next(iter(module.cases()))
    whole = case.make(torch.Generator(program.device).manual_seed(0))
    small = module.OP.compact(whole)
    lab.verify(module.OP, program, [Case("small", lambda generator: small)])
    assert len(small["logits"]) == 2


def test_a_row_begins_beyond_2_to_the_31_elements(program_for: Callable[[Op], Program]) -> None:
    program = program_for(greedy.OP)
    if program.device.type != "cuda":
        pytest.skip("needs 4.3 GB of a GPU's memory")
    rows, width = 14_200, 151_936
    logits = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    logits[-1, 77] = 1.0
    out_ids = torch.full((rows,), -1, device="cuda")
    largest = torch.full((rows,), torch.nan, device="cuda")
    greedy.launch(program, out_ids=out_ids, largest=largest, logits=logits)
    assert largest[-1] == 1.0 and (largest[:-1] == 0.0).all()
    assert out_ids[-1] == 77 and (out_ids[:-1] == 0).all()


def test_shapes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    ids, largest = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    for logits, message in (
        (torch.zeros(5, 2).T, r"logits \[2, 5\] have the strides \[1, 2\]"),
        (torch.zeros(2, 2**19 + 1), "logits of 524,289 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            greedy.launch(None, out_ids=ids, largest=largest, logits=logits)
    with pytest.raises(ValueError, match=r"largest has the shape \[2\], and needs \[3\]"):
        greedy.launch(None, out_ids=torch.zeros(3), largest=largest, logits=torch.zeros(3, 5))
    with pytest.raises(ValueError, match="the 6 best of 5 tokens"):
        logprobs.launch(
            None,
            chosen=largest,
            rank=ids,
            top_ids=torch.zeros(2, 6),
            top_logprobs=torch.zeros(2, 6),
            logits=torch.zeros(2, 5),
            rows=ids,
            token_ids=ids,
        )
