"""The runner turns plans into tokens: the same ones, however the scheduler cuts the work."""

import copy
import threading
import weakref
from itertools import chain

import pytest
import torch
import transformers

from nbengine.config import EngineConfig
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import Scheduler, SchedulerConfig
from nbengine.errors import InvalidField, NotEnoughMemory, SamplingError
from nbengine.execution.kv_cache import KVCache
from nbengine.execution.runner import ModelRunner
from nbengine.execution.sampler import Sampler
from nbengine.models.decoder import Decoder
from nbengine.models.registry import load_model
from tests.tiny_models import random_tokens, reference_logits, save_reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = [random_tokens(n, seed=n) for n in (5, 33, 18, 2, 27)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Decoder, transformers.PreTrainedModel]:
    directory = tmp_path_factory.mktemp("models")
    reference = save_reference("mistral", directory)
    return load_model(directory / "mistral"), reference


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    """The greedy continuation of each prompt, by transformers without any cache."""
    continuations = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(reference_logits(model[1], tokens)[-1].argmax()))
        continuations.append(tokens[len(prompt) :])
    return continuations


class Engine:
    """Scheduler and runner, and nothing else."""

    def __init__(self, decoder: Decoder, **config: object) -> None:
        config = {"num_blocks": 64, "block_size": 8} | config
        self.scheduler = Scheduler(SchedulerConfig(**config))
        self.runner = make_runner(
            decoder, config["num_blocks"], config["block_size"], config.get("num_host_blocks", 0)
        )
        self.outputs: list[StepOutput] = []

    def add(
        self, prompt: list[int], params: SamplingParams | BeamSearchParams = GREEDY, seed: int = 0
    ) -> list[Sequence]:
        request = Request(
            f"req-{len(self.scheduler.live)}-{len(self.outputs)}",
            tuple(prompt),
            params,
            arrival=len(self.scheduler.live),
            seed=seed,
            max_total_tokens=len(prompt) + params.max_tokens,
        )
        return self.scheduler.add(request).sequences

    def run(self) -> list[StepRecord]:
        records = []
        while self.scheduler.has_work:
            self.outputs.append(self.runner.execute(self.scheduler.schedule()))
            self.scheduler.commit(self.outputs[-1])
            records.append(self.scheduler.seal(Phases()))
        return records


def make_runner(
    decoder: Decoder, num_blocks: int = 32, block_size: int = 8, num_host_blocks: int = 0
) -> ModelRunner:
    cache = KVCache.allocate(
        decoder.config,
        num_blocks,
        block_size,
        decoder.dtype,
        decoder.device,
        num_host_blocks=num_host_blocks,
    )
    cache.data.fill_(float("nan"))
    cache.host.fill_(float("nan"))
    return ModelRunner(decoder, cache, Sampler(decoder.config.vocab_size, "cpu"))


def sequence(tokens: list[int], blocks: list[int], **fields: object) -> Sequence:
    request_fields = {k: fields.pop(k) for k in ("params", "seed", "request_id") if k in fields}
    request = Request(
        **{"request_id": "r", "params": GREEDY} | request_fields, prompt_token_ids=tuple(tokens)
    )
    seq = Sequence(str(fields.pop("seq_id", request.request_id)), request, 0, list(tokens))
    seq.block_table = blocks
    for name, value in fields.items():
        setattr(seq, name, value)
    return seq


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 40, "max_num_seqs": 2},
        {"long_prefill_token_threshold": 5, "block_size": 16},
        {"enable_chunked_prefill": False, "max_num_batched_tokens": 45},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers_however_batched(model, expected, config):
    engine = Engine(model[0], **config)
    sequences = [engine.add(prompt)[0] for prompt in PROMPTS]
    engine.run()
    assert [seq.output_token_ids for seq in sequences] == expected


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_greedy_tokens_survive_preemption(model, expected, mode):
    # 12 blocks of 8: two of the longer prompts with their outputs do not fit together.
    engine = Engine(model[0], num_blocks=12, preemption_mode=mode, num_host_blocks=12)
    sequences = [engine.add(prompt)[0] for prompt in PROMPTS]
    records = engine.run()
    modes = {preemption.mode for record in records for preemption in record.preempted}
    assert mode in modes
    assert [seq.output_token_ids for seq in sequences] == expected


def test_greedy_tokens_are_the_same_from_a_cached_prefix(model, expected):
    engine = Engine(model[0])
    engine.add(PROMPTS[1])
    engine.run()
    again = engine.add(PROMPTS[1])[0]
    engine.run()
    assert again.num_cached_tokens == 32
    assert again.output_token_ids == expected[1]


def test_samples_that_share_blocks_are_those_of_separate_requests(model):
    params = SamplingParams(n=3, max_tokens=10, seed=5)
    together = Engine(model[0])
    sequences = together.add(PROMPTS[2], params, seed=5)
    records = together.run()
    assert any(record.copied for record in records)  # 18 tokens: the third block is shared
    texts = [seq.output_token_ids for seq in sequences]
    assert len({tuple(text) for text in texts}) == 3
    alone = Engine(model[0])
    single = alone.add(PROMPTS[2], SamplingParams(max_tokens=10, seed=5), seed=5)
    alone.run()
    assert single[0].output_token_ids == texts[0]


def test_each_sample_keeps_its_own_randomness_after_the_fork(model):
    params = SamplingParams(n=3, max_tokens=10, seed=5)
    runner = make_runner(model[0])

    def samples(**fields: int) -> list[int]:
        seq = sequence(PROMPTS[0], [0], params=params, seed=5, **fields)
        return runner.execute(StepPlan(scheduled=[(seq, 5)])).samples["r"]

    forking = samples(pending_forks=2)
    assert [samples(index=index)[0] for index in range(3)] == forking
    assert len(set(forking)) > 1


def test_beams_get_the_best_continuations_and_their_log_probabilities(model):
    decoder, reference = model
    beam = sequence(PROMPTS[0], [3], params=BeamSearchParams(beam_width=2, max_tokens=4))
    output = make_runner(decoder).execute(StepPlan(scheduled=[(beam, 5)]))
    best = reference_logits(reference, PROMPTS[0])[-1].log_softmax(-1).topk(4)
    found = output.candidates["r"]
    assert [token for token, _ in found] == best.indices.tolist()
    torch.testing.assert_close(
        torch.tensor([logprob for _, logprob in found]), best.values, rtol=1e-3, atol=1e-3
    )
    assert not output.samples


def test_prompt_logprobs_come_with_the_chunk_that_computes_the_token_before(model):
    decoder, reference = model
    prompt = PROMPTS[1]  # 33 tokens
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, max_tokens=4)
    engine = Engine(decoder, max_num_batched_tokens=20, enable_prefix_caching=False)
    engine.add(prompt, params)
    engine.run()
    entries = [output.prompt_logprobs.get("req-0-0", []) for output in engine.outputs]
    assert [len(e) for e in entries] == [20, 12, 0, 0, 0]
    log_probabilities = reference_logits(reference, prompt).log_softmax(-1)
    for position, entry in enumerate(chain.from_iterable(entries), start=1):
        token = prompt[position]
        want = log_probabilities[position - 1, token].item()
        assert entry[token].logprob == pytest.approx(want, rel=1e-3, abs=1e-3)


def test_a_recompute_does_not_score_the_prompt_again(model):
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, max_tokens=4)
    seq = sequence(PROMPTS[0], [3], params=params)
    seq.tokens.append(7)  # it had sampled a token, and was preempted
    output = make_runner(model[0]).execute(StepPlan(scheduled=[(seq, 6)]))
    assert output.prompt_logprobs == {}
    assert len(output.samples["r"]) == 1


def test_logits_are_computed_for_the_rows_that_need_them_alone(model, monkeypatch):
    num_rows = []
    compute = Decoder.compute_logits
    monkeypatch.setattr(
        Decoder, "compute_logits", lambda d, x: num_rows.append(len(x)) or compute(d, x)
    )
    runner = make_runner(model[0])
    first, second = sequence(PROMPTS[1], [0, 1, 2, 3, 4]), sequence(PROMPTS[0], [5], seq_id="s")
    output = runner.execute(StepPlan(scheduled=[(first, 30)]))
    assert output.samples == {} and num_rows == []
    first.num_computed_tokens = 30
    output = runner.execute(StepPlan(scheduled=[(second, 3), (first, 3)]))
    assert list(output.samples) == ["r"] and num_rows == [1]


def test_a_sequence_whose_logits_are_nan_fails_alone(model):
    decoder = copy.copy(model[0])
    decoder.embedding = decoder.embedding.clone()
    decoder.embedding[42] = float("nan")
    healthy, ill = PROMPTS[0], [1, 42, 3]
    assert 42 not in healthy
    sample = sequence(healthy, [0], seq_id="sample")
    other = sequence(ill, [1], seq_id="other")
    beam_params = BeamSearchParams(beam_width=2, max_tokens=4)
    beam = sequence(ill, [2], seq_id="beam", params=beam_params)
    scored = sequence(
        ill, [3], seq_id="scored", params=SamplingParams(prompt_logprobs=1, temperature=0.0)
    )
    scheduled = [(seq, len(seq.tokens)) for seq in (other, sample, beam, scored)]
    runner = make_runner(decoder)
    output = runner.execute(StepPlan(scheduled=scheduled))
    assert set(output.errors) == {"other", "beam", "scored"}
    assert all(isinstance(error, SamplingError) for error in output.errors.values())
    want = make_runner(model[0]).execute(StepPlan(scheduled=[(sample, 5)])).samples["sample"]
    assert output.samples["sample"] == want
    # The block that held NaN goes to another sequence.
    reused = sequence(healthy, [1], seq_id="reused")
    assert runner.execute(StepPlan(scheduled=[(reused, 5)])).samples["reused"] == want


def test_blocks_are_swapped_out_then_in_then_copied_then_written(model):
    runner = make_runner(model[0], num_blocks=4, num_host_blocks=2)
    cache = runner.kv_cache
    for block in range(4):
        cache.data[:, :, block] = float(block)
    cache.host[:, :, 1] = 10.0
    seq = sequence(PROMPTS[0], [2])
    runner.execute(
        StepPlan(
            scheduled=[(seq, 5)],
            swap_out=[(0, 0)],  # the device's 0 is saved before it is overwritten
            swap_in=[(1, 0)],
            copies=[(0, 1), (2, 3)],  # of what was swapped in; of 2 before it is computed
        )
    )
    values = [cache.data[0, 0, block, 0, -1, 0].item() for block in range(4)]
    assert cache.host[0, 0, 0, 0, 0, 0].item() == 0.0
    assert values == [10.0, 10.0, 2.0, 2.0]
    assert cache.data[0, 0, 2, 0, 0, 0].item() != 2.0
    assert cache.data[0, 0, 3, 0, 0, 0].item() == 2.0


def test_an_empty_plan_computes_nothing(model):
    assert make_runner(model[0]).execute(StepPlan()) == StepOutput()


def load(path, **fields):
    return ModelRunner.load(path, EngineConfig(model=path, **fields))


def test_close_gives_the_memory_back(tmp_path):
    save_reference("qwen2", tmp_path)
    runner, _ = load(tmp_path / "qwen2", device="cpu", num_gpu_blocks_override=10)
    held = [weakref.ref(runner.decoder.embedding), weakref.ref(runner.kv_cache.data)]
    runner.close()
    assert [reference() for reference in held] == [None, None]


def test_load_gives_a_runner_that_fits_the_budget(tmp_path):
    save_reference("qwen2", tmp_path)
    runner, budget = load(
        tmp_path / "qwen2", device="cpu", num_gpu_blocks_override=10, max_model_len=64
    )
    assert runner.kv_cache.num_blocks == budget.num_blocks == 10
    assert runner.kv_cache.nbytes == budget.kv_cache
    assert runner.decoder.nbytes == budget.weights
    assert runner.decoder.max_positions == 64
    with pytest.raises(NotEnoughMemory, match="num_gpu_blocks_override=1000000000"):
        load(tmp_path / "qwen2", device="cpu", num_gpu_blocks_override=10**9)
    with pytest.raises(InvalidField, match=r"max_model_len=257: the model has 256 positions"):
        load(tmp_path / "qwen2", device="cpu", max_model_len=257)
    for field in ("dtype", "device", "quantization"):
        with pytest.raises(InvalidField, match=f"{field}='int3'"):
            load(tmp_path / "qwen2", **{field: "int3"})


def test_denormals_are_zero_on_every_thread_that_computes(tmp_path):
    """Else it would depend on the thread, and so on what shares a step, what a row holds."""
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such setting")
    save_reference("llama2", tmp_path)
    settings = EngineConfig(model=tmp_path / "llama2", num_gpu_blocks_override=8, device="cpu")
    found = []

    def engine_thread() -> None:
        torch.set_num_threads(2)
        ModelRunner.load(tmp_path / "llama2", settings)
        denormals = torch.full((1 << 20,), 1e-39) * 1.0
        found.append(denormals.view(torch.int32).count_nonzero().item())

    thread = threading.Thread(target=engine_thread)
    try:
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(1)
    assert found == [0]
