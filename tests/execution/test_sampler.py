"""The batched sampler against a plain one-row reference, and the promise that rows are alone; by
torch, and by kernels on the emulator and on a GPU."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbengine.core.sampling_params import SamplingParams
from nbengine.errors import SamplingError
from nbengine.execution.philox import uniforms
from nbengine.execution.sample_row import SampleRow
from nbengine.execution.sampler import (
    Sampler,
    beam_candidates,
    prompt_logprobs,
    top_logprobs,
)
from nbengine.kernels.table import Kernels
from tests.gpu import needs_gpu

VOCAB = 50

on_gpu = pytest.param("cuda", marks=needs_gpu)
kernels: Kernels | None = None


@pytest.fixture(scope="module", params=["torch", "emulated", on_gpu], autouse=True)
def way(request):
    """What samples."""
    global kernels
    device = "cuda" if request.param == "cuda" else "cpu"
    kernels = None if request.param == "torch" else Kernels(device, request.param)
    yield request.param
    kernels = None


def only_torch():
    if kernels is not None:
        pytest.skip("is about the sampler's own passes in torch and NumPy")


def row(prompt=(1, 2), output=(), *, seed=0, samples=(0,), eos=(), bad=(), **params):
    tokens = [*prompt, *output]
    params.setdefault("max_tokens", None)
    return SampleRow(
        "r", SamplingParams(**params), seed, list(samples), tokens, len(prompt), eos, bad
    )


def sample(logits, *rows, vocab_size=None):
    device = "cpu" if kernels is None else kernels.device
    logits = torch.as_tensor(logits, dtype=torch.float32, device=device)
    sampler = Sampler(vocab_size or logits.shape[1], device, kernels)
    return sampler.sample(logits.contiguous(), list(rows))


def one(logits, **params):
    """The token sampled from a single row."""
    return sample([logits], row(**params)).token_ids[0][0]


# The reference: one row, one move after another, in float64, nothing clever.


def reference_scores(logits, r):
    x = logits.double().clone()
    p = r.params
    output = r.tokens[r.num_prompt_tokens :]
    if p.allowed_token_ids is not None:
        mask = torch.full_like(x, -math.inf)
        mask[list(p.allowed_token_ids)] = 0
        x += mask
    for word in r.bad_words_token_ids:
        if len(word) == 1 or (output[-(len(word) - 1) :] == list(word[:-1])):
            x[word[-1]] = -math.inf
    if len(output) < p.min_tokens:
        x[list({*r.eos_token_ids, *p.stop_token_ids})] = -math.inf
    for token, bias in (p.logit_bias or {}).items():
        x[token] += bias
    for token in set(r.tokens):
        rate = p.repetition_penalty
        x[token] = x[token] / rate if x[token] > 0 else x[token] * rate
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return x


def reference_probabilities(x, p):
    if p.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    probs = (x / p.temperature).softmax(-1)
    probs = torch.where(probs >= p.min_p * probs.max() * (1 - 1e-9), probs, 0)
    if p.top_k:
        probs = torch.where(probs >= probs.sort(descending=True).values[: p.top_k][-1], probs, 0)
    if p.top_p < 1:
        ordered = probs.sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        kept = int((before < p.top_p * ordered.sum() * (1 - 1e-9)).sum())
        probs = torch.where(probs >= ordered[max(kept, 1) - 1], probs, 0)
    return probs / probs.sum()


any_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.01, 0.3, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 49, 50, 1000]),
        "top_p": st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.9999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.3, 3.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 1.1]),
        "min_tokens": st.sampled_from([0, 1, 4]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=3),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.25, 2.5, 100.0]), max_size=4
        ),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=10, max_size=40),
        "eos": st.sampled_from([(), (0,), (3, 4)]),
        "bad": st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=3),
        "prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
        "output": st.lists(st.integers(0, 4), max_size=8),
    },
)


@settings(max_examples=150, deadline=None)
@given(st.lists(any_params, min_size=1, max_size=5), st.integers(0, 2**32))
def test_every_mixed_batch_draws_what_the_reference_draws_for_each_row(batch, seed):
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    samples = range(20 if kernels is None else 4)
    rows = [row(seed=seed + i, samples=samples, **each) for i, each in enumerate(batch)]
    output = sample(logits, *rows)
    for i, r in enumerate(rows):
        scores = reference_scores(logits[i], r)
        if scores.max() == -math.inf:
            assert i in output.errors and output.token_ids[i] == []
            continue
        probs = reference_probabilities(scores, r.params)
        sums = torch.cat((torch.zeros(1, dtype=torch.float64), probs.cumsum(-1)))
        numbers = uniforms([r.seed] * len(samples), samples, [len(r.tokens)] * len(samples))
        for number, token in zip(numbers, output.token_ids[i], strict=True):
            assert probs[token] > 0
            if r.params.temperature > 0:  # float32 against float64 leaves a little room
                assert sums[token] - 1e-4 <= number <= sums[token + 1] + 1e-4


def test_logits_are_not_changed():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(logits, row(repetition_penalty=2, logit_bias={0: 5}), row(top_p=0.5, bad=[(1,)]))
    assert torch.equal(logits, before)


# Each parameter, with numbers that can be checked by hand.


def test_zero_temperature_takes_the_most_likely_and_of_equals_the_first():
    assert one([1, 3, 3, 2], temperature=0) == 1


def test_greedy_is_decided_after_penalties():
    assert one([0, 0, 4, 3], temperature=0, prompt=[2], repetition_penalty=2) == 3


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    # 4 / 2 = 2 falls below 3; -1 * 2 = -2 falls below -1.5.
    assert one([4, 3], temperature=0, prompt=[0, 0], repetition_penalty=2) == 1
    assert one([-1, -1.5], temperature=0, prompt=[0, 0], repetition_penalty=2) == 1


def test_repetition_penalty_sees_prompt_and_output_the_other_two_only_output():
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}):
        assert one([4, 3], temperature=0, prompt=[0], **penalty) == 0
        assert one([4, 3], temperature=0, prompt=[1], output=[0], **penalty) == 1


def test_frequency_counts_and_presence_does_not():
    assert one([5, 3], temperature=0, output=[0, 0, 0], presence_penalty=1) == 0
    assert one([5, 3], temperature=0, output=[0, 0, 0], frequency_penalty=1) == 1


def test_allowed_token_ids_leave_no_other_token():
    chosen = sample([[9, 8, 1, 1]], row(samples=range(200), allowed_token_ids=[2, 3, 2]))
    assert set(chosen.token_ids[0]) == {2, 3}


def test_a_bad_word_is_stopped_at_its_last_token_and_only_there():
    logits = [0, 0, 1, 2]
    assert one(logits, temperature=0, bad=[(3,)]) == 2
    assert one(logits, temperature=0, output=[1], bad=[(1, 3)]) == 2
    assert one(logits, temperature=0, output=[0], bad=[(1, 3)]) == 3
    assert one(logits, temperature=0, output=[0, 1], bad=[(0, 1, 3)]) == 2


def test_a_bad_word_does_not_begin_in_the_prompt():
    assert one([0, 0, 1, 2], temperature=0, prompt=[0, 1], bad=[(1, 3)]) == 3


def test_min_tokens_keeps_end_and_stop_tokens_away_until_reached():
    logits = [1, 5, 4, 3]
    settings = {"temperature": 0, "eos": [1], "stop_token_ids": [2], "min_tokens": 2}
    assert one(logits, output=[0], **settings) == 3
    assert one(logits, output=[0, 0], **settings) == 1


def test_logit_bias_is_added():
    assert one([1, 2], temperature=0, logit_bias={0: 1.5}) == 0


def test_top_k_keeps_ties_of_the_last_kept_token():
    chosen = sample([[2, 1, 1, 0]], row(samples=range(300), top_k=2))
    assert set(chosen.token_ids[0]) == {0, 1, 2}


def test_top_p_keeps_the_token_that_reaches_p_and_none_after_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def kept(p):
        return set(sample([logits.tolist()], row(samples=range(500), top_p=p)).token_ids[0])

    assert kept(0.49) == {0}
    assert kept(0.51) == {0, 1}
    assert kept(0.79) == {0, 1}
    assert kept(0.81) == {0, 1, 2}


def test_min_p_is_relative_to_the_most_likely_token():
    logits = torch.tensor([0.6, 0.31, 0.09]).log().tolist()
    assert set(sample([logits], row(samples=range(500), min_p=0.5)).token_ids[0]) == {0, 1}
    assert set(sample([logits], row(samples=range(500), min_p=0.52)).token_ids[0]) == {0}


def test_top_p_acts_on_what_top_k_left():
    # Of the best two, renormalised, the first has 0.4 / 0.7 = 0.57.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert set(sample([logits], row(samples=range(500), top_k=2, top_p=0.55)).token_ids[0]) == {0}


# Statistics, with fixed seeds: these either always pass or always fail.


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("over", ["samples", "positions"])
def test_frequencies_match_the_exact_distribution(params, over):
    draws = 20_000 if kernels is None else 2_000
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(5)) * 1.5
    if over == "samples":
        r = row(seed=11, samples=range(draws), **params)
        tokens = sample(logits, r).token_ids[0]
    else:
        rows = [row(prompt=range(i + 1), seed=11, **params) for i in range(draws // 10)]
        draws = len(rows)
        tokens = [ids[0] for ids in sample(logits.expand(draws, -1), *rows).token_ids]
        r = rows[0]
    expected = reference_probabilities(logits[0].double(), r.params).numpy() * draws
    counts = np.bincount(tokens, minlength=30)
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 5], expected[expected > 5]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = max(len(counts) - 1, 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_tails_of_a_large_vocabulary_are_reached():
    # Half of the probability lies in 100,000 tokens of 5e-6 each: in float32 their running sum
    # would stop growing.
    logits = torch.zeros(1, 100_001)
    logits[0, 0] = math.log(100_000)
    draws = 4000 if kernels is None else 1000
    tokens = np.array(sample(logits, row(seed=1, samples=range(draws))).token_ids[0])
    tail = tokens[tokens > 0]
    assert 0.46 < len(tail) / draws < 0.54
    assert tail.max() > 99_000 and 0.44 < (tail > 50_000).mean() < 0.56


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str)
def test_the_smallest_and_largest_number_draw_the_first_and_last_possible_token(
    monkeypatch, number, params
):
    only_torch()
    monkeypatch.setattr(
        "nbengine.execution.sampler.uniforms", lambda seeds, *_: np.full(len(seeds), number)
    )
    for possible in range(1, 40):
        logits = torch.full((1, VOCAB), -math.inf)
        logits[0, 5 : 5 + possible] = torch.linspace(0, 0.1, possible)
        (token,) = sample(logits, row(**params)).token_ids[0]
        assert token == (5 if number == 0 else 4 + possible) or params == {"top_p": 0.9}
        assert 5 <= token < 5 + possible


# Alone and together.


def mixed_rows(count):
    pick = random.Random(3)
    return [
        row(
            prompt=[pick.randrange(VOCAB) for _ in range(pick.randrange(1, 9))],
            output=[pick.randrange(VOCAB) for _ in range(pick.randrange(9))],
            seed=pick.randrange(2**64),
            samples=range(pick.choice([1, 1, 3])),
            eos=(0,),
            bad=pick.choice([(), ((5,), (1, 2))]),
            temperature=pick.choice([0.0, 0.7, 1.0, 2.0]),
            top_k=pick.choice([0, 0, 3, 20]),
            top_p=pick.choice([1.0, 0.5, 0.95]),
            min_p=pick.choice([0.0, 0.0, 0.1]),
            repetition_penalty=pick.choice([1.0, 1.2]),
            frequency_penalty=pick.choice([0.0, 0.5]),
            min_tokens=pick.choice([0, 3]),
            logprobs=pick.choice([None, 0, 4]),
            logit_bias=pick.choice([None, {7: 3.0}]),
            allowed_token_ids=pick.choice([None, None, list(range(5, 40))]),
        )
        for _ in range(count)
    ]


def test_a_row_gives_the_same_alone_and_in_any_batch_in_any_order():
    rows = mixed_rows(64)
    # Coarse logits, so that many are equal, as with bfloat16 models.
    logits = (torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)) * 8).round() / 4
    together = sample(logits, *rows)
    order = random.Random(1).sample(range(64), 64)
    permuted = sample(logits[order], *[rows[i] for i in order])
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1], rows[i])
        for other, at in ((together, i), (permuted, place)):
            assert other.token_ids[at] == alone.token_ids[0]
            assert other.logprobs[at] == alone.logprobs[0]


def test_the_torch_passes_of_other_devices_give_the_same(monkeypatch):
    only_torch()
    rows = mixed_rows(64)
    logits = (torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)) * 8).round() / 4
    with_numpy = sample(logits, *rows)
    best = top_logprobs(logits, 5)
    monkeypatch.setattr("nbengine.execution.sampler._in_host_memory", lambda values: False)
    assert sample(logits, *rows) == with_numpy
    assert top_logprobs(logits, 5) == best


def test_a_row_of_a_real_vocabulary_gives_the_same_alone_and_in_a_batch():
    logits = torch.randn(8, 49_153, generator=torch.Generator().manual_seed(0)) * 3
    kinds = [{}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.01}]
    rows = [row(seed=i, samples=range(8), logprobs=3, **kinds[i % 4]) for i in range(8)]
    together = sample(logits, *rows)
    for i in range(8):
        alone = sample(logits[i : i + 1].clone(), rows[i])
        assert together.token_ids[i] == alone.token_ids[0]
        assert together.logprobs[i] == alone.logprobs[0]


def test_row_by_row_gives_what_all_rows_at_once_give():
    """As torch samples on a GPU where results must not depend on the batch."""
    only_torch()
    rows = mixed_rows(64)
    rows.append(row(logprobs=1))
    logits = torch.randn(65, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    logits[64, 3] = torch.nan
    sampler = Sampler(VOCAB, "cpu", batch_invariant=True)
    together = sampler.sample(logits, rows)
    sampler._one_by_one = True
    found = sampler.sample(logits, rows)
    assert found.token_ids == together.token_ids and found.logprobs == together.logprobs
    assert found.errors.keys() == together.errors.keys() == {64}


@needs_gpu
@pytest.mark.parametrize("vocab_size", [1001, 49_153, 49_154, 50_000])
def test_on_a_gpu_logprobs_do_not_depend_on_where_a_row_lies(vocab_size):
    only_torch()
    logits = torch.randn(9, vocab_size, device="cuda") * 3
    together = top_logprobs(logits, 100)
    for i in range(9):
        assert top_logprobs(logits[i : i + 1].clone(), 100) == together[i : i + 1]


def test_samples_of_one_row_differ_and_each_equals_its_own_later_draw():
    logits = torch.zeros(1, 1000)
    together = sample(logits, row(seed=4, samples=range(5), n=5)).token_ids[0]
    assert len(set(together)) == 5
    for index in range(5):
        assert sample(logits, row(seed=4, samples=[index], n=5)).token_ids[0] == [together[index]]


def test_the_next_position_and_another_seed_draw_anew():
    logits = torch.zeros(1, 100_000)
    tokens = [
        sample(logits, row(prompt=[1] * length, seed=seed)).token_ids[0][0]
        for length in (1, 2, 3)
        for seed in (0, 1, -1)
    ]
    assert len(set(tokens)) == 9


# What can't be sampled.


@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_row_of_nan_infinity_or_nothing_fails_alone(params):
    good = torch.randn(VOCAB).tolist()
    nan = [*good[:-1], math.nan]
    infinite = [math.inf, *good[1:]]
    logits = [good, nan, good, infinite, [-math.inf] * VOCAB, good]
    rows = [row(seed=i, logprobs=1, **params) for i in range(6)]
    output = sample(logits, *rows)
    assert set(output.errors) == {1, 3, 4}
    for i in (1, 3, 4):
        assert isinstance(output.errors[i], SamplingError)
        assert output.token_ids[i] == [] and output.logprobs[i] is None
    for i in (0, 2, 5):
        alone = sample([logits[i]], rows[i])
        assert output.token_ids[i] == alone.token_ids[0]
        assert output.logprobs[i] == alone.logprobs[0]


def test_a_row_of_nan_that_asks_for_logprobs_fails_without_company_too():
    out = sample(torch.full((1, VOCAB), torch.nan), row(logprobs=2))
    assert isinstance(out.errors[0], SamplingError) and out.logprobs == [None]


def test_a_row_whose_every_allowed_token_is_masked_says_so():
    output = sample(torch.zeros(1, 4), row(allowed_token_ids=[2], eos=[2], min_tokens=1))
    assert "every token is masked" in str(output.errors[0])


def test_nan_under_a_mask_still_fails_a_row_that_asks_for_logprobs():
    logits = [[math.nan, 1.0, 2.0]]
    assert sample(logits, row(temperature=0, allowed_token_ids=[1, 2])).token_ids == [[2]]
    output = sample(logits, row(temperature=0, allowed_token_ids=[1, 2], logprobs=0))
    assert set(output.errors) == {0} and output.token_ids == [[]]


def test_ids_beyond_the_vocabulary_touch_no_other_row():
    # As flat indices, id 4 of row 0 would be id 0 of row 1.
    logits = torch.tensor([[1.0, 0, 0, 0], [2.0, 1, 0, 0]])
    harmful = row(
        prompt=[4, 5, -1],
        output=[4, -4],
        temperature=0,
        bad=[(4,)],
        eos=[4],
        min_tokens=9,
        repetition_penalty=9,
        frequency_penalty=2,
        logit_bias={4: -100.0},
    )
    assert sample(logits, harmful, row(temperature=0)).token_ids == [[0], [0]]


def test_padding_columns_of_the_logits_are_never_sampled():
    logits = torch.zeros(2, 16)
    logits[:, 10:] = 100.0
    for params in ({"temperature": 0}, {}, {"top_p": 0.9}, {"repetition_penalty": 2.0}):
        rows = [row(samples=range(50), **params)] * 2
        output = sample(logits, *rows, vocab_size=10)
        assert max(max(ids) for ids in output.token_ids) < 10


def test_extreme_but_finite_logits_are_sampled():
    logits = [3e38, -3e38, 0.0, -math.inf]
    for params in ({}, {"temperature": 0.01}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
        assert one(logits, **params) == 0


def test_logits_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Sampler(10, "cpu").sample(torch.zeros(2, 10), [row()])
    with pytest.raises(ValueError, match="shape"):
        Sampler(10, "cpu").sample(torch.zeros(1, 9), [row()])
    assert Sampler(10, "cpu").sample(torch.zeros(0, 10), []).token_ids == []


# Log-probabilities.


def test_logprobs_are_those_of_the_model_whatever_the_row_asks_for():
    logits = torch.randn(1, VOCAB)
    exact = logits[0].log_softmax(-1)
    r = row(
        temperature=0.3,
        repetition_penalty=2,
        allowed_token_ids=[7],
        logit_bias={7: 9.0},
        logprobs=3,
    )
    (entry,) = sample(logits, r).logprobs[0]
    assert next(iter(entry)) == 7
    assert entry[7].logprob == pytest.approx(exact[7].item(), abs=1e-6)
    assert entry[7].rank == int((exact > exact[7]).sum()) + 1
    best = exact.topk(3)
    for place, (value, token) in enumerate(zip(*best, strict=True)):
        assert entry[int(token)].logprob == pytest.approx(float(value), abs=1e-6)
        assert entry[int(token)].rank == place + 1
    assert len(entry) == len({7, *best.indices.tolist()})


def test_zero_logprobs_hold_the_sampled_token_only_and_minus_one_all():
    logits = torch.randn(2, VOCAB)
    output = sample(logits, row(logprobs=0), row(logprobs=-1))
    assert list(output.logprobs[0][0]) == output.token_ids[0]
    everything = output.logprobs[1][0]
    assert set(everything) == set(range(VOCAB))
    assert sorted(entry.rank for entry in everything.values()) == list(range(1, VOCAB + 1))
    assert sum(math.exp(entry.logprob) for entry in everything.values()) == pytest.approx(1)


def test_each_sample_of_a_row_has_its_own_logprobs():
    output = sample(torch.randn(1, VOCAB), row(samples=range(4), n=4, logprobs=0))
    assert [next(iter(entry)) for entry in output.logprobs[0]] == output.token_ids[0]


def test_equally_likely_tokens_share_a_rank_and_the_smaller_id_is_listed():
    (entry,) = sample([[1.0, 5.0, 1.0, 1.0]], row(temperature=0, logprobs=2)).logprobs[0]
    assert {token: value.rank for token, value in entry.items()} == {1: 1, 0: 2}


def test_top_logprobs_are_sorted_and_normalised_over_the_vocabulary():
    logits = torch.randn(100, VOCAB)
    values, indices = logits.log_softmax(-1).topk(5)
    result = top_logprobs(logits, 5)
    assert [[token for token, _ in found] for found in result] == indices.tolist()
    assert [[value for _, value in found] for found in result] == values.tolist()
    assert len(top_logprobs(logits, -1)[0]) == len(top_logprobs(logits, VOCAB + 9)[0]) == VOCAB


def test_prompt_logprobs_give_each_token_and_the_best_of_its_place():
    logits = torch.randn(150, VOCAB)
    ids = [i % VOCAB for i in range(150)]
    exact = logits.log_softmax(-1)
    for place, entry in enumerate(prompt_logprobs(logits, ids, 2)):
        assert entry[ids[place]].logprob == exact[place, ids[place]].item()
        assert set(entry) == {ids[place], *exact[place].topk(2).indices.tolist()}
    assert [set(entry) for entry in prompt_logprobs(logits, ids, 0)] == [{i} for i in ids]
    assert prompt_logprobs(torch.zeros(0, VOCAB), [], 2) == []


def test_prompt_logprobs_of_nan_logits_are_an_error():
    logits = torch.zeros(3, VOCAB)
    logits[1, 4] = math.nan
    with pytest.raises(SamplingError, match="prompt token 1"):
        prompt_logprobs(logits, [0, 1, 2], 1)


def test_beam_candidates_are_the_best_tokens_at_the_beams_temperature():
    logits = torch.randn(3, VOCAB)
    assert beam_candidates(logits, 4) == top_logprobs(logits, 4)
    hot = beam_candidates(logits, 4, temperature=2.0)
    assert hot == top_logprobs(logits / 2, 4)
    logits[1, :-3] = -math.inf
    with pytest.raises(SamplingError, match="beam 1"):
        beam_candidates(logits, 4)
