"""paged_attention_decode: its reference by hand, and what its kernel promises beyond the grid."""

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.emulator import EmulatedProgram
from nbengine.kernels.op import Arguments, Case, Op
from nbengine.kernels.ops import paged_attention_decode as decode
from nbengine.kernels.program import Program
from nbengine.kernels.source import Source
from nbengine.kernels.verification import verify

CPU = torch.device("cpu")


@pytest.fixture
def program(program_for: Callable[[Op], Program]) -> Program:
    return program_for(decode.OP)


def _made(case: Case, device: torch.device = CPU, **changes: object) -> Arguments:
    return {**case.make(torch.Generator(device).manual_seed(1)), **changes}


def _launched(program: Program, arguments: Arguments) -> torch.Tensor:
    out = torch.full_like(arguments["out"], torch.nan)
    decode.launch(program, **{**arguments, "out": out})
    return out


def _assert_right(arguments: Arguments, out: torch.Tensor) -> None:
    wanted = torch.full_like(out, torch.nan)
    decode.reference(**{**arguments, "out": wanted})
    allowed = decode.tolerance(arguments)
    torch.testing.assert_close(
        out.float(), wanted.float(), rtol=allowed.relative, atol=allowed.absolute, equal_nan=True
    )


def test_the_kernel_agrees_with_the_reference_on_its_grid(program: Program) -> None:
    verify(decode.OP, program)


@pytest.mark.parametrize("case", list(decode.cases()), ids=lambda case: case.name)
def test_the_reference_is_attention_over_the_tokens_that_a_row_sees(case: Case) -> None:
    a = _made(case)
    decode.reference(**a)
    block_size = a["k_cache"].shape[2]
    group = a["q"].shape[1] // a["k_cache"].shape[1]
    expected = torch.full(a["out"].shape, torch.nan, dtype=torch.float64)
    for s, length in enumerate(a["seq_lens"].tolist()):
        if length == 0:
            continue
        row = s if a["rows"] is None else a["rows"][s].item()
        seen = torch.arange(max(0, length - (a["window"] or length)), length)
        blocks = a["block_tables"][s, seen // block_size]
        k = a["k_cache"][blocks, :, seen % block_size].double().repeat_interleave(group, 1)
        v = a["v_cache"][blocks, :, seen % block_size].double().repeat_interleave(group, 1)
        scores = torch.einsum("hd,phd->hp", a["q"][row].double(), k) * a["scale"]
        if a["softcap"] is not None:
            scores = a["softcap"] * torch.tanh(scores / a["softcap"])
        expected[row] = torch.einsum("hp,phd->hd", scores.softmax(-1), v)
    allowed = decode.tolerance(a)
    torch.testing.assert_close(
        a["out"].double(), expected, rtol=allowed.relative, atol=allowed.absolute, equal_nan=True
    )


def test_the_cost_counts_what_is_in_the_window_once_for_a_group() -> None:
    # 5 and 20 tokens, of which 5 and 8 are seen; 2 KV heads of 64 with 3 query heads each.
    cost = decode.cost(_made(decode.case(torch.float16, (3, 2, 64), 8, (5, 20), window=8)))
    assert cost.bytes_moved == 2 * (2 * 13 * 2 * 64 + 2 * 2 * 6 * 64)
    assert cost.flops == 4 * 13 * 6 * 64


def test_a_compact_call_has_the_used_blocks_alone_and_the_same_result() -> None:
    a = _made(decode.case(torch.float32, (2, 1, 64), 8, (5, 0, 20), spread_rows=True))
    compact = decode.compact(a)
    assert len(compact["k_cache"]) == len(compact["v_cache"]) == 4
    out = torch.full_like(a["out"], torch.nan)
    decode.reference(**a)
    decode.reference(**{**compact, "out": out})
    assert torch.equal(out.nan_to_num(9), a["out"].nan_to_num(9))


CHUNKED = decode.case(torch.bfloat16, (7, 2, 128), 16, (300, 5, 700, 0, 64))


def test_one_workspace_serves_launch_after_launch_of_any_shape(program: Program) -> None:
    """Counters are zero again, and partial results of one launch are garbage to the next."""
    shared = torch.zeros(
        decode.workspace_bytes(program.device, 14, 2, 128), dtype=torch.uint8, device=program.device
    )
    calls = [
        _made(case, program.device, workspace=shared)
        for case in (CHUNKED, decode.case(torch.bfloat16, (7, 1, 128), 16, (200,)))
    ]
    first = [_launched(program, a) for a in calls]
    for a, out in zip(calls, first, strict=True):
        _assert_right(a, out)
        assert torch.equal(_launched(program, a).nan_to_num(9), out.nan_to_num(9))


def test_a_larger_bound_on_the_lengths_changes_nothing_but_the_division(program: Program) -> None:
    """As in a captured graph, whose grid is made for the longest sequence there may be."""
    a = _made(CHUNKED, program.device, max_seq_len=100_000)
    _assert_right(a, _launched(program, a))
    one = _made(
        decode.case(torch.bfloat16, (7, 2, 128), 16, (3, 0)), program.device, max_seq_len=100_000
    )
    _assert_right(one, _launched(program, one))


def test_a_batch_of_padding_alone_writes_nothing(program: Program) -> None:
    a = _made(CHUNKED, program.device)
    a["seq_lens"].zero_()
    assert _launched(program, a).isnan().all()


def test_more_sequences_than_lanes_find_their_chunks(program: Program) -> None:
    """The search for a chunk's beginning takes 32 lengths at a time."""
    lengths = [(7 * i) % 40 if i % 3 else 0 for i in range(70)]
    a = _made(decode.case(torch.bfloat16, (4, 1, 64), 16, lengths), program.device)
    _assert_right(a, _launched(program, a))


def test_slices_of_wider_tables_and_rows_are_read_in_place(program: Program) -> None:
    a = _made(CHUNKED, program.device)
    assert a["q"].stride(0) > a["q"].shape[1] * a["q"].shape[2]
    assert a["block_tables"].stride(0) > a["block_tables"].shape[1]
    wide = torch.full((5, 3, 14, 128), torch.nan, dtype=torch.bfloat16, device=program.device)
    decode.launch(program, **{**a, "out": wide[:, 1]})
    _assert_right(a, wide[:, 1])
    assert wide[:, [0, 2]].isnan().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(5, 14, 48), "out": torch.zeros(5, 14, 48)}, "head_dim is 48"),
        ({"q": torch.zeros(5, 15, 128), "out": torch.zeros(5, 15, 128)}, "15 query heads over 2"),
        ({"q": torch.zeros(5, 34, 128), "out": torch.zeros(5, 34, 128)}, "16 at most"),
        ({"k_cache": torch.zeros(9, 2, 12, 128)}, "block_size is 12"),
        ({"v_cache": torch.zeros(9, 2, 16, 64)}, "v_cache has the shape"),
        ({"workspace": torch.zeros(64, dtype=torch.uint8)}, "workspace has 64 bytes"),
        (
            {"workspace": torch.zeros(10**7, dtype=torch.uint8)[8:]},
            "workspace starts 8 bytes after",
        ),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "rows has the shape"),
        ({"q": torch.zeros(4, 14, 128), "out": torch.zeros(4, 14, 128)}, "4 rows for 5 sequences"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_words(
    changes: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        decode.launch(EmulatedProgram(Source.of_op(decode.OP.source)), **_made(CHUNKED, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("few_pairs", [True, False])
def test_the_partial_results_of_any_shape_fit_the_least_shared_memory_of_a_gpu(
    dtype: torch.dtype, few_pairs: bool
) -> None:
    """sm_86, sm_89 and sm_120 give a block 99 KiB."""
    for head_dim in decode.HEAD_DIMS:
        for group in range(1, 17):
            warps, _ = decode.block_shape(dtype, head_dim, group, few_pairs)
            assert warps * decode._partial_bytes(group, head_dim) + 1024 <= 99 * 1024


@pytest.mark.parametrize("block_size", [8, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_size_takes_the_largest_group(
    program: Program, head_dim: int, block_size: int
) -> None:
    verify(
        decode.OP,
        program,
        [decode.case(torch.bfloat16, (16, 2, head_dim), block_size, [1, 9, 70])],
    )
