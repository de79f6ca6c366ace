"""A plan laid out flat: numbers that a reader can check by hand."""

from nbengine.core.plan import StepPlan
from nbengine.execution.batch import Batch
from tests.tiny_models import make_sequence


def sequence(num_tokens: int, first: int, computed: int, table: list[int]):
    seq = make_sequence(list(range(first, first + num_tokens)))
    seq.num_computed_tokens, seq.block_table = computed, table
    return seq


def test_a_prefill_chunk_and_a_decode_lie_end_to_end():
    chunk = sequence(20, first=100, computed=6, table=[5, 2, 9])  # the last block is not needed yet
    decode = sequence(9, first=200, computed=8, table=[7, 4])
    batch = Batch.from_plan(StepPlan(scheduled=[(chunk, 4), (decode, 1)]), block_size=8)
    assert batch.token_ids.tolist() == [106, 107, 108, 109, 208]
    assert batch.positions.tolist() == [6, 7, 8, 9, 8]
    assert batch.slot_mapping.tolist() == [5 * 8 + 6, 5 * 8 + 7, 2 * 8, 2 * 8 + 1, 4 * 8]
    assert batch.query_start_loc.tolist() == [0, 4, 5]
    assert batch.seq_lens.tolist() == [10, 9]
    assert batch.block_tables.tolist() == [[5, 2], [7, 4]]
    assert batch.logits_rows.tolist() == [4]  # the chunk's prompt is not complete
    assert (batch.num_tokens, batch.num_seqs) == (5, 2)
    assert (batch.max_query_len, batch.max_seq_len) == (4, 10)
    assert (batch.query_lens, batch.context_lens) == ([4, 1], [6, 8])


def test_tables_of_unequal_length_are_padded():
    long, short = sequence(17, 0, 16, [1, 2, 3]), sequence(3, 0, 0, [6])
    batch = Batch.from_plan(StepPlan(scheduled=[(short, 3), (long, 1)]), block_size=8)
    assert batch.block_tables.tolist() == [[6, 0, 0], [1, 2, 3]]
    assert batch.logits_rows.tolist() == [2, 3]


def test_rows_that_need_logits_can_be_named():
    seq = sequence(5, 0, 0, [1])
    batch = Batch.from_plan(StepPlan(scheduled=[(seq, 5)]), block_size=8, logits_rows=[4, 0, 1])
    assert batch.logits_rows.tolist() == [4, 0, 1]
    none = Batch.from_plan(StepPlan(scheduled=[(seq, 2)]), block_size=8)
    assert none.logits_rows.tolist() == []


def test_rows_apart_are_sequences_that_each_see_their_own_past():
    chunk = sequence(20, first=100, computed=6, table=[5, 2, 9])
    decode = sequence(9, first=200, computed=8, table=[7, 4])
    plan = StepPlan(scheduled=[(decode, 1), (chunk, 3)])
    apart = Batch.from_plan(plan, block_size=8).rows_apart()
    assert apart.token_ids.tolist() == [208, 106, 107, 108]
    assert apart.slot_mapping.tolist() == [4 * 8, 5 * 8 + 6, 5 * 8 + 7, 2 * 8]
    assert apart.seq_lens.tolist() == [9, 7, 8, 9]
    assert apart.block_tables.tolist() == [[7, 4], [5, 2], [5, 2], [5, 2]]
    assert apart.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert (apart.query_lens, apart.context_lens) == ([1] * 4, [8, 6, 7, 8])
    assert (apart.num_tokens, apart.num_seqs, apart.max_query_len) == (4, 4, 1)

    alone = apart.sequences(2, 3)
    assert (alone.token_ids.tolist(), alone.positions.tolist()) == ([107], [7])
    assert (alone.seq_lens.tolist(), alone.block_tables.tolist()) == ([8], [[5, 2]])
    assert (alone.query_start_loc.tolist(), alone.slot_mapping.tolist()) == ([0, 1], [47])
    assert (alone.num_tokens, alone.num_seqs, alone.max_seq_len) == (1, 1, 8)
    assert (alone.query_lens, alone.context_lens) == ([1], [7])
    last = apart.sequences(1, 9)
    assert last.token_ids.tolist() == [106, 107, 108]
    assert (last.seq_lens.tolist(), last.query_start_loc.tolist()) == ([7, 8, 9], [0, 1, 2, 3])
    assert (last.num_tokens, last.num_seqs, last.max_seq_len) == (3, 3, 9)


def test_padding_has_no_rows():
    decode = sequence(9, first=200, computed=8, table=[7, 4])
    batch = Batch.from_plan(StepPlan(scheduled=[(decode, 1)]), block_size=8, padded_to=(3, 4))
    assert batch.query_start_loc.tolist() == [0, 1, 1, 1]
    assert (batch.seq_lens.tolist(), batch.slot_mapping.tolist()) == ([9, 0, 0], [32, -1, -1])
