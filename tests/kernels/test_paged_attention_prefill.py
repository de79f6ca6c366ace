"""paged_attention_prefill: its reference and cost by hand, and what its kernel promises."""

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.emulator import EmulatedProgram
from nbengine.kernels.op import Arguments, Case, Op
from nbengine.kernels.ops import paged_attention_prefill as prefill
from nbengine.kernels.program import Program
from nbengine.kernels.report import LIMITS
from nbengine.kernels.source import Source
from nbengine.kernels.verification import verify

CASES = list(prefill.cases())


@pytest.fixture
def program(program_for: Callable[[Op], Program]) -> Program:
    return program_for(prefill.OP)


def test_the_kernel_agrees_with_the_reference_on_its_grid(program: Program) -> None:
    verify(prefill.OP, program)


@pytest.mark.parametrize(
    ("architecture", "head_dim"), [("sm_80", 128), ("sm_80", 256), ("sm_86", 256)]
)
def test_the_smaller_tiles_of_other_architectures_agree_too(
    architecture: str, head_dim: int
) -> None:
    program = EmulatedProgram(Source.of_op(prefill.OP.source), checks=True)
    program.limits = LIMITS[architecture]
    assert prefill.tiling(torch.float16, head_dim, program.limits).keys == 32
    sequences = ((20, 50), (3, 0))
    verify(
        prefill.OP, program, [prefill.make_case("", torch.float16, head_dim, 1, 4, 64, sequences)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_is_the_same_alone_in_a_chunk_and_in_a_mixed_batch(
    program: Program, dtype: torch.dtype, window: int | None, head_dim: int
) -> None:
    """Alone in narrow tiles, otherwise in wide ones."""
    made = prefill.make_case("", dtype, head_dim, 1, 3, 16, ((70, 0), (9, 5)), window=window)
    whole = made.make(torch.Generator(program.device).manual_seed(0))
    prefill.launch(program, **whole)
    for first, end in ((0, 1), (0, 33), (33, 70), (69, 70)):
        part = {
            **whole,
            "q": whole["q"][first:end],
            "out": torch.full_like(whole["out"][first:end], torch.nan),
            "block_tables": whole["block_tables"][:1],
            "query_start_loc": torch.tensor([0, end - first], device=program.device),
            "seq_lens": torch.tensor([end], device=program.device),
            "max_query_len": end - first,
        }
        prefill.launch(program, **part)
        assert torch.equal(part["out"], whole["out"][first:end])


def test_a_weight_far_above_all_before_it_is_taken_over(program: Program) -> None:
    """Scores that grow by more than the running maximum may fall behind, step after step."""
    made = prefill.make_case("", torch.float16, 64, 1, 1, 64, ((8, 250),))
    a = made.make(torch.Generator(program.device).manual_seed(0))
    a["q"].fill_(1.0)
    for step, block in enumerate(a["block_tables"][0].tolist()):
        a["k_cache"][block, :, : 8 if step < 4 else 2].fill_(float(step) - 2.0)
    wanted = torch.full_like(a["out"], torch.nan)
    prefill.launch(program, **a)
    prefill.reference(**{**a, "out": wanted})
    torch.testing.assert_close(a["out"], wanted, rtol=2e-3, atol=2e-3)


def test_what_the_kernel_does_not_take_is_refused_with_the_numbers(program: Program) -> None:
    case = prefill.make_case("", torch.float16, 64, 1, 2, 8, ((4, 3),))
    a = case.make(torch.Generator(program.device))

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            prefill.launch(program, **{**a, **changes})

    refused("2 query heads over 1 KV heads of 48", q=a["q"][..., :48], out=a["out"][..., :48])
    refused("block_size is 6", k_cache=a["k_cache"][:, :, :6])
    refused("scale is 0", scale=0.0)
    refused("window is 0", window=0)
    refused(
        r"q \[4, 2, 64\] has the strides", q=a["q"].transpose(0, 1).contiguous().transpose(0, 1)
    )
    refused("v_cache has the shape", v_cache=a["v_cache"][1:])
    refused("query_start_loc has the shape", query_start_loc=a["query_start_loc"][:1])


def _members(arguments: Arguments) -> list[int]:
    given = arguments["members"]
    return list(range(len(arguments["seq_lens"]))) if given is None else given.tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_is_attention_of_each_row_over_what_it_sees(case: Case) -> None:
    a = case.make(torch.Generator().manual_seed(1))
    prefill.reference(**a)
    block_size = a["k_cache"].shape[2]
    group = a["q"].shape[1] // a["k_cache"].shape[1]
    expected = torch.full(a["out"].shape, torch.nan, dtype=torch.float64)
    for s in _members(a):
        first, end = a["query_start_loc"][s : s + 2].tolist()
        for row in range(first, end):
            position = a["seq_lens"][s].item() - (end - row)
            begin = 0 if a["window"] is None else max(0, position + 1 - a["window"])
            seen = torch.arange(begin, position + 1)
            blocks = a["block_tables"][s, seen // block_size]
            k = a["k_cache"][blocks, :, seen % block_size].double().repeat_interleave(group, 1)
            v = a["v_cache"][blocks, :, seen % block_size].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,phd->hp", a["q"][row].double(), k) * a["scale"]
            if a["softcap"] is not None:
                scores = a["softcap"] * torch.tanh(scores / a["softcap"])
            expected[row] = torch.einsum("hp,phd->hd", scores.softmax(-1), v)
    tolerance = prefill.tolerance(a)
    torch.testing.assert_close(
        a["out"].double(),
        expected,
        rtol=tolerance.relative,
        atol=tolerance.absolute,
        equal_nan=True,
    )


def test_the_cost_counts_each_visible_pair_and_each_live_position_once() -> None:
    # Rows at positions 3, 4, 5, 6: they see 4, 5, 6, 7 positions; 2 heads of 64, 1 KV head.
    case = prefill.make_case("", torch.float16, 64, 1, 2, 8, ((4, 3), (1, 0)), members=(0,))
    cost = prefill.cost(case.make(torch.Generator()))
    assert cost.flops == 4 * 64 * 2 * (4 + 5 + 6 + 7)
    assert cost.bytes_moved == 2 * (2 * 4 * 2 * 64 + 2 * 7 * 64)
    # The last 5 only: 4, 5, 5, 5, over positions 0 to 6.
    case = prefill.make_case("", torch.float16, 64, 1, 2, 8, ((4, 3),), window=5)
    cost = prefill.cost(case.make(torch.Generator()))
    assert cost.flops == 4 * 64 * 2 * (4 + 5 + 5 + 5)
    assert cost.bytes_moved == 2 * (2 * 4 * 2 * 64 + 2 * 7 * 64)


@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90"])
def test_a_tile_fits_the_shared_memory(head_dim: int, architecture: str) -> None:
    limits = LIMITS[architecture]
    for dtype in (torch.float32, torch.float16):
        tile = prefill.tiling(dtype, head_dim, limits)
        assert tile.shared_bytes <= limits.block_shared_bytes
        assert tile.blocks_per_sm * (tile.shared_bytes + 1024) <= limits.shared_bytes


@pytest.mark.parametrize("block_size", [8, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_size_takes_the_largest_group(
    program: Program, head_dim: int, block_size: int
) -> None:
    sequences = ((5, 3), (2, 20))
    case = prefill.make_case("", torch.bfloat16, head_dim, 1, 16, block_size, sequences)
    verify(prefill.OP, program, [case])
