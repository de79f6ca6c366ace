"""paged_attention_prefill: its reference and its cost against the definition, and its compilation.

(The kernel itself meets its reference wherever the whole op table is verified.)
"""

import pytest
import torch

from nbengine.kernels.op import Arguments, Case
from nbengine.kernels.ops import paged_attention_prefill as prefill
from nbengine.kernels.report import LIMITS
from nbengine.kernels.source import Source, instantiation

CASES = list(prefill.cases())


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


@pytest.mark.parametrize("head_dim", prefill.HEAD_DIMS)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_a_tile_stays_in_registers(head_dim: int, architecture: str) -> None:
    compiler = pytest.importorskip("nbengine.kernels.compiler")
    tile = prefill.tiling(torch.bfloat16, head_dim, LIMITS[architecture])
    expression = instantiation(
        "paged_attention_prefill",
        (torch.bfloat16, head_dim, 7, 16, *tile.template_arguments, head_dim == 256, False),
    )
    try:
        found = compiler.compile(
            Source.of_op("paged_attention_prefill.cu"), expression, architecture
        )
    except compiler.ToolchainMissing as missing:
        pytest.skip(str(missing))
    assert found.warnings == ()
    assert found.resources.spill_load_bytes <= 64  # a few addresses, and no part of a tile
