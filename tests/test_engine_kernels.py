"""The engine with its kernels: what it generates is what it generates in torch's operations, through
everything that a scheduler does to a sequence. On a GPU, and emulated on a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from nbengine import LLM, Engine, SamplingParams
from nbengine.execution import cuda_graphs
from nbengine.kernels import CompileError, emulator, load
from nbengine.kernels.capture import captured
from nbengine.kernels.emulator import EmulationError
from nbengine.kernels.lab import Mismatch
from nbengine.kernels.ops import OPS
from tests.gpu import needs_gpu, needs_gpu_alone
from tests.tiny_models import SERVED, random_tokens, save_reference

PROMPTS = [random_tokens(n, seed=n) for n in (5, 40, 17, 33)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

KERNELS = ["emulated", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("engine_kernels")
    for name in SERVED:
        save_reference(name, directory)
    return {name: directory / name for name in SERVED}


def make(path: Path, kernels: str, **fields: Any) -> Engine:
    settings = {"device": "cpu" if kernels == "emulated" else "cuda", "dtype": "float32"}
    settings |= {"skip_tokenizer_init": True, "max_model_len": 128, "num_gpu_blocks_override": 64}
    return Engine(model=path, kernels=kernels, **settings | fields)


def run(engine: Engine, prompts=PROMPTS, params=GREEDY) -> list[list[list[int]]]:
    names = [engine.add_request(prompt, params) for prompt in prompts]
    engine.run()
    return [[o.token_ids for o in engine.output(name).outputs] for name in names]


@pytest.fixture(scope="module")
def expected(models) -> dict[str, list[list[list[int]]]]:
    """By family, in torch's operations, one request after the other."""
    found = {}
    for name, path in models.items():
        with make(path, "torch", device="cpu") as engine:
            found[name] = [run(engine, [prompt])[0] for prompt in PROMPTS]
    return found


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", SERVED)
def test_greedy_tokens_are_those_of_torch(models, expected, family, kernels):
    with make(models[family], kernels) as engine:
        assert run(engine) == expected[family]


@pytest.mark.parametrize("kernels", [*KERNELS, pytest.param("torch", marks=needs_gpu)])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_give_the_tokens_of_the_cpus_own_kernels(models, kernels, quantization):
    path = models["served-llama"]
    with make(path, "auto", device="cpu", quantization=quantization) as engine:
        expected = run(engine)
    with make(path, kernels, quantization=quantization) as engine:
        assert run(engine) == expected


@pytest.mark.parametrize("kernels", KERNELS)
class TestWhateverTheScheduleDoes:
    FAMILY = "served-llama"

    def test_in_chunks_mixed_with_decodes(self, models, expected, kernels):
        with make(models[self.FAMILY], kernels, max_num_batched_tokens=7) as engine:
            assert run(engine) == expected[self.FAMILY]

    @pytest.mark.parametrize("mode", ["recompute", "swap"])
    def test_after_preemption(self, models, expected, kernels, mode):
        settings = {
            "num_gpu_blocks_override": 6,
            "max_model_len": 64,
            "preemption_mode": mode,
            "swap_space": 0.01,
        }
        with make(models[self.FAMILY], kernels, enable_prefix_caching=False, **settings) as engine:
            assert run(engine) == expected[self.FAMILY]
            assert {p.mode for r in engine.history for p in r.preempted} == {mode}

    def test_with_prefix_hits(self, models, expected, kernels):
        with make(models[self.FAMILY], kernels) as engine:
            run(engine)
            assert run(engine) == expected[self.FAMILY]
            assert sum(r.num_hit_tokens for r in engine.history) >= 32 + 16 + 32

    def test_samples_share_their_prompt_by_copy_on_write(self, models, kernels):
        params = GREEDY.clone(n=3, temperature=1.0, seed=5)
        with make(models[self.FAMILY], kernels) as engine:
            found = run(engine, PROMPTS[:2], params)
            assert sum(len(r.copied) for r in engine.history) > 0
        with make(models[self.FAMILY], "torch", device="cpu") as engine:
            assert found == run(engine, PROMPTS[:2], params)

    def test_numbers_in_unused_slots_never_leak(self, models, expected, kernels):
        with make(models[self.FAMILY], kernels, enable_prefix_caching=False) as engine:
            engine.kv_cache.data.fill_(float("nan"))
            assert run(engine) == expected[self.FAMILY]


def test_a_real_model_says_the_same_with_every_op_emulated():
    """SmolLM2: the text of `torch`'s operations, from prompt to last token."""
    params = SamplingParams(temperature=0, max_tokens=5)
    texts = []
    for kernels in ("torch", "emulated"):
        with LLM(
            "smollm2-135m",
            device="cpu",
            dtype="float32",
            kernels=kernels,
            max_model_len=64,
            num_gpu_blocks_override=8,
        ) as llm:
            (output,) = llm.generate("The capital of France is", params)
            texts.append(output.outputs[0].text)
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]


@pytest.mark.parametrize("kernels", KERNELS)
class TestSwap:
    FAMILY = "served-llama"

    @pytest.fixture
    def engine(self, models, kernels) -> Iterator[Engine]:
        """Two requests in the middle of their decodes."""
        with make(models[self.FAMILY], kernels) as engine:
            for index, prompt in enumerate(PROMPTS[:2]):
                engine.add_request(prompt, GREEDY, request_id=f"r{index}")
            engine.step(4)
            yield engine

    def outputs(self, engine: Engine) -> list[list[list[int]]]:
        engine.run()
        return [[o.token_ids for o in engine.output(name).outputs] for name in ("r0", "r1")]

    def test_requests_go_on_with_the_new_kernel(self, engine, expected):
        calls = []

        def mine(**arguments: Any) -> None:
            calls.append(arguments)
            OPS["rms_norm"].reference(**arguments)

        before = engine.kv_cache.data.clone()
        swapped = engine.kernels.swap("rms_norm", mine)
        assert "mine" in str(swapped.now) and "rms_norm.cu" in str(swapped.before)
        assert torch.equal(before.nan_to_num(), engine.kv_cache.data.nan_to_num())
        calls.clear()
        assert self.outputs(engine) == expected[self.FAMILY][:2]
        assert calls

        calls.clear()
        engine.kernels.restore("rms_norm")
        engine.add_request(PROMPTS[0], GREEDY)
        engine.run()
        assert not calls

    def test_what_it_left_in_the_workspace_harms_nobody(self, models, kernels, monkeypatch):
        """The lengths are such that several blocks share a sequence, and count themselves there."""
        empty_like = torch.empty_like

        def poisoned(x: torch.Tensor, **options: Any) -> torch.Tensor:
            made = empty_like(x, **options)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, "empty_like", poisoned)

        def careless(**arguments: Any) -> None:
            OPS["paged_attention_decode"].reference(**arguments)
            arguments["workspace"].fill_(7)

        prompts = [random_tokens(n, seed=n) for n in (230, 180, 205)]
        found = []
        for each in ("torch", kernels):
            device = "cuda" if kernels == "cuda" else "cpu"
            with make(models[self.FAMILY], each, max_model_len=256, device=device) as engine:
                names = [engine.add_request(prompt, GREEDY) for prompt in prompts]
                engine.step(4)
                if each != "torch":
                    engine.kernels.swap("paged_attention_decode", careless)
                    engine.step(2)
                    engine.kernels.restore("paged_attention_decode")
                engine.run()
                found.append([engine.output(name).outputs[0].token_ids for name in names])
        assert found[0] == found[1]

    def test_before_any_request_it_is_verified_on_the_models_own_shapes(self, models, kernels):
        with make(models[self.FAMILY], kernels) as idle:
            before = idle.kv_cache.data.clone()
            shape = (1, idle.model.config.intermediate_size)

            def wrong(**arguments: Any) -> None:
                OPS["gated_mlp"].reference(**arguments)
                if arguments["out"].shape == shape:
                    arguments["out"] += 1

            with pytest.raises(Mismatch, match="live call"):
                idle.kernels.swap("gated_mlp", wrong)
            assert torch.equal(before.nan_to_num(), idle.kv_cache.data.nan_to_num())

    def test_the_engine_goes_on_while_the_grid_is_verified(self, engine, expected):
        def patient(**arguments: Any) -> None:
            deadline = time.monotonic() + 60
            while not engine.output("r1").finished:
                assert time.monotonic() < deadline, "the engine waits for the swap"
                time.sleep(0.01)
            OPS["rms_norm"].reference(**arguments)

        engine.start()
        engine.kernels.swap("rms_norm", patient)
        assert self.outputs(engine) == expected[self.FAMILY][:2]

    @pytest.mark.parametrize(
        "op", ["rms_norm", "kv_cache_write", "paged_attention_decode", "gated_mlp"]
    )
    def test_a_kernel_that_is_wrong_on_live_tensors_alone_is_refused(self, engine, expected, op):
        """It is right on the op's whole grid, whose batches have other sizes."""
        output = OPS[op].outputs[0]

        def wrong(**arguments: Any) -> None:
            OPS[op].reference(**arguments)
            if arguments[output].shape == live:
                arguments[output].flatten(1)[1, 3] += 1

        live = engine._call(lambda: engine._live_calls(op))[op][0][output].shape
        with pytest.raises(Mismatch, match=rf"{output}\[1, .*the reference says"):
            engine.kernels.swap(op, wrong)
        assert engine.kernels.implementations[list(OPS).index(op)].is_own
        assert self.outputs(engine) == expected[self.FAMILY][:2]

    def test_an_interrupt_while_the_live_calls_are_verified_takes_the_swap_back(
        self, engine, expected, monkeypatch
    ):
        verifying, interrupted = threading.Event(), threading.Event()

        def mine(**arguments: Any) -> None:
            if engine._thread.is_current:
                verifying.set()
                assert interrupted.wait(60)
            OPS["rms_norm"].reference(**arguments)

        def interrupt(future: Future[Any]) -> None:
            assert verifying.wait(60)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", interrupt)
            with pytest.raises(KeyboardInterrupt):
                engine.kernels.swap("rms_norm", mine)
        interrupted.set()
        assert self.outputs(engine) == expected[self.FAMILY][:2]
        assert engine.kernels.implementations[list(OPS).index("rms_norm")].is_own

    def test_the_result_says_on_how_many_live_calls_it_agrees(self, engine):
        def mine(**arguments: Any) -> None:
            OPS["rms_norm"].reference(**arguments)

        assert engine.kernels.swap("rms_norm", mine).verified.num_live == 2

        def unused(**arguments: Any) -> None:
            OPS["swap_blocks"].reference(**arguments)

        swapped = engine.kernels.swap("swap_blocks", unused)
        assert swapped.verified.num_live == 0
        assert "on no live one: the engine makes none now" in str(swapped)

    def test_a_kernel_that_does_not_compile_is_refused(self, engine, expected):
        with pytest.raises(CompileError, match="retrun"):
            engine.kernels.swap("rms_norm", "__global__ void rms_norm() {\n  retrun;\n}\n")
        assert self.outputs(engine) == expected[self.FAMILY][:2]


class TestAnEmulatedKernelThatDoesNotEnd:
    FAMILY = "served-llama"
    TEXT = "__global__ void endless(volatile int* x) { while (x[0] == 0) {} }"

    @pytest.fixture
    def engine(self, models, monkeypatch) -> Iterator[Engine]:
        """In the middle of its decodes, its next step is one that would not end."""
        endless = load(self.TEXT, "endless", device="cpu")
        flag = torch.zeros(1, dtype=torch.int32)
        self.is_endless, self.has_begun = False, threading.Event()

        def mine(**arguments: Any) -> None:
            if self.is_endless:
                self.has_begun.set()
                endless[2, 32](flag)
            OPS["rms_norm"].reference(**arguments)

        with make(models[self.FAMILY], "emulated") as engine:
            engine.kernels.swap("rms_norm", mine)
            for index, prompt in enumerate(PROMPTS[:2]):
                engine.add_request(prompt, GREEDY, request_id=f"r{index}")
            engine.step(4)
            monkeypatch.setattr(emulator, "BLOCK_SECONDS", 0.3)
            self.is_endless = True
            yield engine

    def goes_on(self, engine: Engine, expected) -> bool:
        self.is_endless = False
        engine.run()
        outputs = [engine.output(name).outputs for name in ("r0", "r1")]
        return [[o.token_ids for o in each] for each in outputs] == expected[self.FAMILY][:2]

    def test_fails_its_step_which_is_taken_back(self, engine, expected):
        with pytest.raises(EmulationError, match="timeout: endless, block"):
            engine.step()
        assert "timeout" in engine.history[-1].error
        assert self.goes_on(engine, expected)

    def test_holds_up_a_pause_no_longer_than_its_limit(self, engine, expected):
        engine.start()
        assert self.has_begun.wait(60)
        engine.pause()
        assert isinstance(engine.error, EmulationError)
        assert self.goes_on(engine, expected)

    def test_does_not_keep_who_waits_for_it_from_an_interrupt(self, engine, expected):
        timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        timer.join()
        assert self.goes_on(engine, expected)


@needs_gpu
class TestOnTheGpu:
    def test_auto_picks_the_gpu_and_its_kernels(self, models):
        with Engine(
            model=models["served-qwen3"], skip_tokenizer_init=True, num_gpu_blocks_override=64
        ) as engine:
            assert engine.model.device.type == "cuda"
            assert engine.kernels.backend == "cuda"

    @pytest.mark.parametrize("family", SERVED)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_graphs_give_the_tokens_of_single_launches(self, models, family, dtype):
        found = []
        for enforce_eager in (True, False):
            with make(models[family], "cuda", dtype=dtype, enforce_eager=enforce_eager) as engine:
                found.append(run(engine))
        assert found[0] == found[1]

    @pytest.fixture
    def replays(self, monkeypatch) -> list[torch.cuda.CUDAGraph]:
        """The graphs that were replayed, in order."""
        made = []
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph: torch.cuda.CUDAGraph) -> None:
            made.append(graph)
            replay(graph)

        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
        return made

    def test_more_rows_than_matrix_vector_kernels_take_are_captured_too(self, models, replays):
        prompts = [random_tokens(4 + n % 20, seed=n) for n in range(40)]
        settings = {"num_gpu_blocks_override": 256, "max_num_seqs": 48}
        found = []
        for enforce_eager in (True, False):
            with make(models["served-llama"], "cuda", enforce_eager=enforce_eager, **settings) as e:
                found.append(run(e, prompts))
                assert bool(replays) is not enforce_eager
        assert found[0] == found[1]

    def test_a_capture_that_a_wait_ends_costs_no_token_and_the_next_holds(
        self, models, expected, replays, monkeypatch, caplog
    ):
        waits = iter([torch.cuda.synchronize])

        @contextlib.contextmanager
        def once_ended(stream, pool):
            with captured(stream, pool) as graph:
                yield graph
                next(waits, lambda: None)()

        with make(models["served-llama"], "cuda") as engine:
            monkeypatch.setattr(cuda_graphs, "captured", once_ended)
            assert run(engine) == expected["served-llama"]
        assert "(1 of 3 tries)" in caplog.text and "(2 of 3 tries)" not in caplog.text
        assert replays

    def test_python_in_an_ops_place_runs_without_graphs(self, models):
        with make(models["served-llama"], "cuda", enable_prefix_caching=False) as engine:
            expected = run(engine)
            engine.kernels.swap("paged_attention_decode", "reference")  # reads lengths back
            assert run(engine) == expected
            engine.kernels.restore("paged_attention_decode")
            assert run(engine) == expected

    def test_a_steady_decode_step_allocates_no_device_memory(self, models):
        with make(models["served-llama"], "cuda", dtype="bfloat16") as engine:
            for prompt in PROMPTS:
                engine.add_request(prompt, GREEDY.clone(max_tokens=60))
            engine.step(20)
            before = torch.cuda.memory_stats()
            engine.step(20)
            after = torch.cuda.memory_stats()
        for counter in ("num_device_alloc", "segment.all.allocated"):
            assert after[counter] == before[counter]

    @needs_gpu_alone
    def test_closing_returns_the_memory_and_a_second_engine_works(self, models, expected):
        with make(models["served-llama"], "cuda") as engine:  # what stays: context, libraries
            run(engine)
        free = torch.cuda.mem_get_info()[0]
        large = {"num_gpu_blocks_override": None, "block_size": 256}
        with make(models["served-llama"], "cuda", gpu_memory_utilization=0.3, **large) as engine:
            assert run(engine) == expected["served-llama"]
            assert torch.cuda.mem_get_info()[0] < free - 2**30
        assert free - torch.cuda.mem_get_info()[0] < 64 * 2**20
        with make(models["served-llama"], "cuda") as engine:
            assert run(engine) == expected["served-llama"]

    @needs_gpu_alone
    def test_two_engines_have_a_share_each_and_run_at_once(self, models, expected):
        share = {"num_gpu_blocks_override": None, "block_size": 256, "gpu_memory_utilization": 0.3}
        with (
            make(models["served-llama"], "cuda", **share) as one,
            make(models["served-qwen3"], "cuda", **share) as other,
        ):
            names = [
                [engine.add_request(prompt, GREEDY) for prompt in PROMPTS]
                for engine in (one, other)
            ]
            for engine in (one, other):
                engine.start()
            deadline = time.monotonic() + 120
            while (one.has_work or other.has_work) and time.monotonic() < deadline:
                time.sleep(0.01)
            for engine, family, of_engine in zip(
                (one, other), ("served-llama", "served-qwen3"), names, strict=True
            ):
                found = [engine.output(name).outputs for name in of_engine]
                assert [[o.token_ids for o in each] for each in found] == expected[family]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
    def test_on_the_second_gpu(self, models, expected):
        with make(models["served-llama"], "cuda", device="cuda:1") as engine:
            assert run(engine) == expected["served-llama"]
            assert engine.kv_cache.data.device == torch.device("cuda", 1)

    @needs_gpu_alone
    def test_memory_stays_within_its_utilization(self, models):
        with make(models["served-llama"], "cuda") as engine:  # what stays: context, libraries
            run(engine)
        free, total = torch.cuda.mem_get_info()
        large = {"num_gpu_blocks_override": None, "block_size": 256}
        with make(models["served-llama"], "cuda", gpu_memory_utilization=0.25, **large) as engine:
            run(engine)
            used = free - torch.cuda.mem_get_info()[0]
        assert 0.9 * 0.25 * total < used < 0.25 * total + 256 * 2**20

    def test_a_context_of_32_thousand_tokens(self, tmp_path):
        import transformers

        from tests.tiny_models import SHAPE

        shape = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64}
        shape |= {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 33_000,
        }
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**shape, initializer_range=0.2)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
        prompt = random_tokens(32_000, seed=9)
        params = GREEDY.clone(max_tokens=8)
        found = []
        for kernels in ("cuda", "torch"):
            with make(
                tmp_path, kernels, max_model_len=33_000, num_gpu_blocks_override=2100
            ) as engine:
                found.append(run(engine, [prompt], params))
        assert found[0] == found[1]
