"""The engine's contract over a small random model: same tokens whatever the schedule, nothing lost
in a failed step, nobody harmed by a bad request."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref

import pytest

from nbengine import LLM, BeamSearchParams, Engine, SamplingParams
from nbengine.errors import (
    DeviceLost,
    EngineClosed,
    InvalidField,
    InvalidRequest,
    RequestTooLarge,
    UnknownRequest,
)

PROMPTS = [[5 + i, *range(20 + i, 20 + i + length)] for i, length in enumerate((3, 40, 17, 33))]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def tokens(engine, names):
    return [[o.token_ids for o in engine.output(name).outputs] for name in names]


def run(engine, prompts=PROMPTS, params=GREEDY):
    params = params if isinstance(params, list) else [params] * len(prompts)
    names = [engine.add_request(p, q) for p, q in zip(prompts, params, strict=True)]
    engine.run()
    return tokens(engine, names)


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """transformers' greedy tokens for PROMPTS."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    model.generation_config.eos_token_id = None
    results = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        results.append([out[0, len(prompt) :].tolist()])
    return results


class TestSameTokensWhateverTheSchedule:
    def test_one_by_one(self, make, expected):
        engine = make()
        assert [run(engine, [p])[0] for p in PROMPTS] == expected

    def test_batched(self, make, expected):
        assert run(make()) == expected

    def test_in_chunks_mixed_with_decodes(self, make, expected):
        engine = make(max_num_batched_tokens=7)
        assert run(engine) == expected
        assert max(r.num_tokens for r in engine.history) == 7

    @pytest.mark.parametrize("block_size", [8, 32])
    def test_with_other_block_sizes(self, make, expected, block_size):
        assert run(make(block_size=block_size)) == expected

    def test_with_prefix_hits(self, make, expected):
        engine = make()
        run(engine)
        assert run(engine) == expected
        assert sum(r.num_hit_tokens for r in engine.history) >= 32 + 16 + 32

    @pytest.mark.parametrize("mode", ["recompute", "swap"])
    def test_after_preemption(self, make, expected, mode):
        engine = make(
            num_gpu_blocks_override=8,
            max_model_len=128,
            preemption_mode=mode,
            swap_space=0.01,
            enable_prefix_caching=False,
        )
        assert run(engine) == expected
        assert {p.mode for r in engine.history for p in r.preempted} == {mode}

    def test_stale_numbers_in_reused_blocks_never_leak(self, make, expected):
        engine = make(enable_prefix_caching=False)
        engine._call(lambda: engine._runner.kv_cache.data.fill_(float("nan")))
        assert run(engine) == expected


class TestSampling:
    SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)

    def test_a_seeded_request_depends_on_nothing_else_in_the_batch(self, make):
        alone = run(make(), [PROMPTS[1]], self.SEEDED)
        noisy = [SamplingParams(temperature=2.0, max_tokens=9, top_k=5), GREEDY]
        among = run(make(seed=99), [PROMPTS[0], PROMPTS[2], PROMPTS[1]], [*noisy, self.SEEDED])
        assert among[-1] == alone[0]

    def test_three_samples_with_a_seed_differ_and_repeat(self, make):
        params = self.SEEDED.clone(n=3)
        first, again = run(make(), [PROMPTS[1]], params), run(make(), [PROMPTS[1]], params)
        assert len({tuple(t) for t in first[0]}) == 3
        assert first == again

    def test_engine_seed_decides_unseeded_requests(self, make):
        params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True)
        a, b, c = (run(make(seed=s), [PROMPTS[1]], params) for s in (1, 1, 2))
        assert a == b != c

    def test_samples_survive_preemption(self, make):
        params = self.SEEDED.clone(n=3)
        tight = make(num_gpu_blocks_override=7, max_model_len=64, enable_prefix_caching=False)
        assert run(tight, [PROMPTS[1]], params) == run(make(), [PROMPTS[1]], params)
        assert any(r.preempted for r in tight.history)

    def test_logprobs_are_the_models_own_before_temperature(self, make, tiny_llama):
        import torch
        from transformers import LlamaForCausalLM

        engine = make()
        params = SamplingParams(
            temperature=3.0, top_k=3, seed=1, max_tokens=5, logprobs=2, prompt_logprobs=1
        )
        name = engine.add_request(PROMPTS[2], params)
        engine.run()
        out = engine.output(name)
        ids = PROMPTS[2] + out.outputs[0].token_ids
        with torch.no_grad():
            logits = LlamaForCausalLM.from_pretrained(tiny_llama)(torch.tensor([ids])).logits[0]
        reference = torch.log_softmax(logits, -1)
        first = len(PROMPTS[2])
        for i, entry in enumerate(out.outputs[0].logprobs):
            token = ids[first + i]
            row = reference[first + i - 1]
            assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-3)
            assert entry[token].rank == int((row > row[token]).sum()) + 1
            assert set(row.topk(2).indices.tolist()) <= entry.keys()
        assert out.outputs[0].cumulative_logprob == pytest.approx(
            sum(e[t].logprob for e, t in zip(out.outputs[0].logprobs, ids[first:], strict=True))
        )
        assert out.prompt_logprobs[0] is None
        assert len(out.prompt_logprobs) == len(PROMPTS[2])
        for i, entry in enumerate(out.prompt_logprobs[1:], start=1):
            assert entry[ids[i]].logprob == pytest.approx(reference[i - 1][ids[i]].item(), abs=1e-3)

    def test_each_sample_has_the_logprobs_of_its_own_tokens(self, make):
        engine = make()
        params = self.SEEDED.clone(n=3, logprobs=0, max_tokens=4)
        name = engine.add_request(PROMPTS[1], params)
        engine.run()
        for sample in engine.output(name).outputs:
            assert [list(entry) for entry in sample.logprobs] == [[t] for t in sample.token_ids]

    def test_prompt_logprobs_are_whole_despite_prefix_hits_and_chunks(self, make):
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
        plain, chunked = make(), make(max_num_batched_tokens=9)
        rows = []
        for engine in (plain, plain, chunked):
            name = engine.add_request(PROMPTS[1], params)
            engine.run()
            rows.append(engine.output(name).prompt_logprobs)
        for other in rows[1:]:
            assert len(other) == len(PROMPTS[1])
            for a, b in zip(rows[0][1:], other[1:], strict=True):
                assert a.keys() == b.keys()
                for token in a:
                    assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)


class TestBeams:
    def plain_search(self, engine, prompt, width, length):
        """Beams in a list, their candidates from logprobs, one request a beam and token."""
        one = SamplingParams(temperature=0, max_tokens=1, logprobs=2 * width, ignore_eos=True)
        beams = [([], 0.0)]
        for _ in range(length):
            grown = []
            for tokens_so_far, total in beams:
                name = engine.add_request(prompt + tokens_so_far, one)
                engine.run()
                (entry,) = engine.output(name).outputs[0].logprobs
                grown += [([*tokens_so_far, t], total + lp.logprob) for t, lp in entry.items()]
            beams = sorted(grown, key=lambda beam: -beam[1])[:width]
        return beams

    @pytest.mark.parametrize("num_blocks", [64, 7])
    def test_beam_search_equals_a_plain_one(self, make, num_blocks):
        expected = self.plain_search(make(), PROMPTS[3], 3, 12)
        engine = make(num_gpu_blocks_override=num_blocks, max_model_len=64)
        params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
        name = engine.add_request(PROMPTS[3], params)
        engine.run()
        beams = engine.output(name).outputs
        assert [b.token_ids for b in beams] == [tokens for tokens, _ in expected]
        for beam, (_, total) in zip(beams, expected, strict=True):
            assert beam.cumulative_logprob == pytest.approx(total, abs=1e-3)
        assert engine.scheduler.pool.num_held == 0


class TestStopping:
    def test_stop_token_ids_end_it_and_are_named(self, make, expected):
        stop = expected[1][0][5]
        params = GREEDY.clone(stop_token_ids=[stop])
        engine = make()
        name = engine.add_request(PROMPTS[1], params)
        engine.run()
        (out,) = engine.output(name).outputs
        assert (out.finish_reason, out.stop_reason) == ("stop", stop)
        assert out.token_ids == expected[1][0][: expected[1][0].index(stop) + 1]

    def test_min_tokens_postpones_them(self, make, expected):
        stop = expected[1][0][5]
        params = GREEDY.clone(stop_token_ids=[stop], min_tokens=10)
        (out,) = run(make(), [PROMPTS[1]], params)
        assert len(out[0]) >= 10
        assert stop not in out[0][:9]

    def test_max_model_len_ends_a_request_without_max_tokens(self, make):
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        engine = make(max_model_len=64)
        name = engine.add_request(PROMPTS[1], params)
        engine.run()
        out = engine.output(name)
        assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == 64
        assert out.outputs[0].finish_reason == "length"


class TestBadInput:
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "empty"),
            ("", "tokenizer"),
            ([1, -1], "-1"),
            ([1, 500], "500"),
            ([1, 2**70], "vocabulary"),
            ([1, True], "bool"),
            ([1, 2.0], "float"),
            ([1] * 200, "max_model_len"),
            ({"prompt_token_ids": [1], "prompt_embeds": "x"}, "prompt_embeds"),
            ({}, "prompt"),
            (None, "prompt"),
        ],
    )
    def test_bad_prompts_are_refused_and_harm_nobody(self, make, expected, prompt, message):
        engine = make()
        good = engine.add_request(PROMPTS[0], GREEDY)
        engine.step()
        with pytest.raises(InvalidRequest, match=message):
            engine.add_request(prompt, GREEDY)
        engine.run()
        assert tokens(engine, [good]) == [expected[0]]

    @pytest.mark.parametrize(
        "options",
        [
            {"cache_salt": ""},
            {"cache_salt": "x" * 129},
            {"cache_salt": 3},
            {"priority": 1.5},
            {"priority": True},
            {"priority": 2**63},
            {"request_id": ""},
            {"request_id": "a#1"},
        ],
    )
    def test_bad_options_are_refused(self, make, options):
        with pytest.raises(InvalidField, match=next(iter(options))):
            make().add_request([1, 2], GREEDY, **options)

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(logprobs=21),
            SamplingParams(stop_token_ids=[500]),
            SamplingParams(allowed_token_ids=[3, 999]),
            SamplingParams(logit_bias={500: 1.0}),
            SamplingParams(min_tokens=300, max_tokens=300),
        ],
    )
    def test_params_that_this_model_cannot_serve_are_refused(self, make, params):
        with pytest.raises(InvalidField):
            make().add_request([1, 2], params)

    def test_ids_in_use_are_refused(self, make):
        engine = make()
        engine.add_request([1, 2], GREEDY, request_id="a")
        with pytest.raises(InvalidRequest, match="in use"):
            engine.add_request([1, 2], GREEDY, request_id="a")
        engine.run()
        engine.add_request([1, 2], GREEDY, request_id="a")

    def test_more_samples_than_seats_are_refused_with_the_numbers(self, make):
        with pytest.raises(RequestTooLarge, match="5 sequences"):
            make(max_num_seqs=4).add_request([1, 2], SamplingParams(n=5))

    def test_bad_config_names_field_and_value(self, make):
        for fields in (
            {"block_size": 12},
            {"block_size": True},
            {"max_num_seqs": 0},
            {"gpu_memory_utilization": float("nan")},
            {"quantization": "fp8"},
            {"scheduling_policy": "lifo"},
            {"max_model_len": 100_000},
            {"no_such_field": 1},
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 10},
        ):
            with pytest.raises(InvalidField):
                make(**fields)


class TestFaults:
    def test_a_failed_step_raises_its_own_error_and_loses_nothing(
        self, make, expected, monkeypatch
    ):
        engine = make(enforce_eager=True)  # a replayed graph would call no function of ours
        names = [engine.add_request(p, GREEDY) for p in PROMPTS]
        engine.step(3)

        def fail(*args, **kwargs):
            raise RuntimeError("planted")

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="planted"):
            patch.setattr(type(engine._runner.decoder), "forward", fail)
            engine.step()
        assert engine.history[-1].error == "RuntimeError: planted"
        engine.run()
        assert tokens(engine, names) == expected

    def test_nan_logits_end_that_request_alone(self, make, expected, monkeypatch):
        engine = make()
        names = [engine.add_request(p, GREEDY) for p in PROMPTS[:2]]
        engine.step()
        decoder = type(engine._runner.decoder)
        compute = decoder.compute_logits

        def poison(self, hidden, out=None):
            logits = compute(self, hidden).clone()
            logits[0] = float("nan")
            return logits if out is None else out.copy_(logits)

        with monkeypatch.context() as patch:
            patch.setattr(decoder, "compute_logits", poison)
            engine.step()
        engine.run()
        assert engine.output(names[0]).outputs[0].finish_reason == "error"
        assert tokens(engine, names[1:]) == expected[1:2]

    def test_a_background_failure_reaches_the_one_who_waits(self, make, monkeypatch):
        engine = make()
        monkeypatch.setattr(type(engine._runner.decoder), "forward", None)
        with pytest.raises(TypeError):
            list(engine.stream(PROMPTS[0], GREEDY))
        assert not engine.has_work
        assert isinstance(engine.error, TypeError)

    def test_a_lost_device_ends_the_engine_loudly(self, make, monkeypatch):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY)
        monkeypatch.setattr(type(engine._runner), "has_lost_device", True)
        monkeypatch.setattr(type(engine._runner.decoder), "forward", None)
        with pytest.raises(DeviceLost, match=r"lost to TypeError(.|\n)*restart") as lost:
            engine.step()
        assert isinstance(lost.value.__cause__, TypeError)
        for use in (engine.step, engine.run, engine.start, engine.snapshot):
            with pytest.raises(DeviceLost, match="restart"):
                use()
        with pytest.raises(DeviceLost, match="restart"):
            engine.add_request(PROMPTS[0], GREEDY)
        engine.close()

    def test_a_device_lost_in_the_background_is_told_to_the_one_who_waits(self, make, monkeypatch):
        engine = make()
        monkeypatch.setattr(type(engine._runner), "has_lost_device", True)
        monkeypatch.setattr(type(engine._runner.decoder), "forward", None)
        with pytest.raises(DeviceLost):
            list(engine.stream(PROMPTS[0], GREEDY))
        assert isinstance(engine.error, DeviceLost)


class TestLife:
    def test_runs_in_the_background_until_paused(self, make, expected):
        engine = make()
        engine.start()
        names = [engine.add_request(p, GREEDY) for p in PROMPTS]
        deadline = time.monotonic() + 60
        while engine.has_work and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.pause()
        assert tokens(engine, names) == expected
        paused = engine.add_request(PROMPTS[0], GREEDY)
        time.sleep(0.05)
        assert engine.output(paused).outputs == []

    def test_abort_ends_one_request_and_no_other(self, make, expected):
        engine = make()
        names = [engine.add_request(p, GREEDY) for p in PROMPTS]
        engine.step(4)
        engine.abort(names[0], names[2])
        engine.run()
        assert engine.output(names[0]).outputs[0].finish_reason == "abort"
        assert tokens(engine, [names[1], names[3]]) == [expected[1], expected[3]]
        with pytest.raises(UnknownRequest):
            engine.abort("nobody")

    def test_ctrl_c_aborts_that_calls_requests_and_the_engine_goes_on(
        self, make, expected, monkeypatch
    ):
        llm = LLM.__new__(LLM)
        llm.engine = engine = make()
        other = engine.add_request(PROMPTS[0], GREEDY)
        forward = type(engine._runner.decoder).forward
        begun = threading.Event()

        def slowly(self, *args):
            begun.set()
            time.sleep(0.02)
            return forward(self, *args)

        monkeypatch.setattr(type(engine._runner.decoder), "forward", slowly)

        def press():
            begun.wait(30)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS[1:3], GREEDY.clone(max_tokens=150), use_tqdm=False)
        snapshot = engine.snapshot()
        live = {s.request_id for s in (*snapshot.running, *snapshot.waiting)}
        assert live <= {other}
        monkeypatch.undo()
        assert [[o.token_ids for o in r.outputs] for r in llm.generate(PROMPTS, GREEDY)] == expected
        assert tokens(engine, [other]) == [expected[0]]

    def test_leaving_a_stream_aborts_it(self, make):
        engine = make()
        for _ in engine.stream(PROMPTS[0], GREEDY):
            break
        gc.collect()
        assert not engine.has_work

    def test_close_gives_memory_and_thread_back(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY)
        engine.step()
        data = weakref.ref(engine._runner.kv_cache.data)
        thread = engine._thread
        engine.close()
        engine.close()
        gc.collect()
        assert data() is None
        assert not thread.is_alive
        with pytest.raises(EngineClosed):
            engine.step()

    @pytest.mark.parametrize("in_background", [False, True])
    def test_close_gives_memory_back_though_an_error_is_kept(
        self, make, monkeypatch, in_background
    ):
        engine = make()
        weights = weakref.ref(engine._runner.decoder.embedding)
        real = type(engine._runner.decoder).forward

        def fail(self, *args):
            real(self, *args)
            raise RuntimeError("planted")

        monkeypatch.setattr(type(engine._runner.decoder), "forward", fail)
        engine.add_request(PROMPTS[0], GREEDY)
        with pytest.raises(RuntimeError, match="planted") as kept:
            if in_background:
                list(engine.stream(PROMPTS[1], GREEDY))
            else:
                engine.step()
        engine.close()
        gc.collect()
        assert weights() is None
        assert "planted" in str(kept.value)

    def test_an_error_that_is_its_own_cause_does_not_hold_close_up(self, make):
        engine = make()

        def fail(record):
            error = RuntimeError("a ring")
            try:
                raise error from error
            except RuntimeError as raised:
                engine.error = raised

        engine.on_step(fail)
        engine.add_request(PROMPTS[0], GREEDY)
        engine.step()
        assert engine.error.__cause__ is engine.error
        engine.close()

    def test_what_a_failed_start_loaded_does_not_stay_with_the_error(self, tiny_llama, monkeypatch):
        loaded = []

        def fail(self, *args, **kwargs):
            loaded.append(weakref.ref(args[0].embedding))
            raise RuntimeError("planted")

        monkeypatch.setattr("nbengine.execution.runner.ModelRunner.__init__", fail)
        with pytest.raises(RuntimeError, match="planted") as kept:
            Engine(model=tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=8)
        gc.collect()
        assert loaded[0]() is None
        assert kept.value.__traceback__ is not None

    def test_dropping_the_last_reference_does_too(self, tiny_llama):
        engine = Engine(
            model=tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=8, max_model_len=64
        )
        data = weakref.ref(engine._runner.kv_cache.data)
        thread = engine._thread
        del engine
        gc.collect()
        deadline = time.monotonic() + 10
        while thread.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not thread.is_alive
        assert data() is None

    def test_reset_prefix_cache(self, make):
        engine = make()
        run(engine)
        assert engine.reset_prefix_cache() > 0
        run(engine, [PROMPTS[1]])
        assert engine.history[-1].num_cached_blocks <= 5

    def test_a_command_from_another_thread_waits_for_one_step_at_most(self, make):
        engine = make(max_model_len=256, num_gpu_blocks_override=64)
        engine.start()
        engine.add_request([1, 2, 3], GREEDY.clone(max_tokens=200))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(engine.snapshot()))
        thread.start()
        thread.join(30)
        assert seen and seen[0].num_blocks == 64
        engine.pause()


def test_metrics_are_in_order(make):
    engine = make()
    name = engine.add_request(PROMPTS[1], GREEDY)
    engine.run()
    m = engine.output(name).metrics
    assert (
        m.arrival_time
        <= m.first_scheduled_time
        <= m.first_token_time
        <= m.last_token_time
        <= m.finished_time
    )


def test_why_answers_for_running_waiting_and_finished_requests(make):
    engine = make(max_num_seqs=1)
    names = [engine.add_request(p, GREEDY) for p in PROMPTS[:2]]
    engine.step()
    assert "seat" in str(engine.why(names[1]))
    engine.run()
    assert "length" in str(engine.why(names[0]))
    with pytest.raises(UnknownRequest):
        engine.why("nobody")


class TestLookingIn:
    def test_a_sequences_keys_are_read_through_its_block_table(self, make):
        engine = make()
        one, other = (engine.add_request(PROMPTS[1], GREEDY) for _ in range(2))
        engine.step()
        snapshot = engine.snapshot()
        tables = [list(snapshot.sequence(name).block_table) for name in (one, other)]
        assert tables[0] != tables[1]
        for cache in (*engine.kv_cache.k, *engine.kv_cache.v):
            # [blocks, kv_heads, block_size, head_dim] -> [tokens, kv_heads, head_dim]
            a, b = (cache[table].transpose(1, 2).flatten(0, 1)[:40] for table in tables)
            assert (a - b).abs().max() < 1e-5
        assert engine.kv_cache.k[0].shape[1] == engine.model.config.num_kv_heads

    def test_a_snapshot_says_which_sequence_it_does_not_know(self, make):
        with pytest.raises(UnknownRequest, match="no unfinished sequence 'req-9' after step 0"):
            make().snapshot().sequence("req-9")

    def test_an_engine_without_ops_says_how_to_have_them(self, make):
        with pytest.raises(InvalidField, match="kernels='emulated'"):
            make(kernels="torch").kernels.swap("rms_norm", "reference")

    def test_a_closed_engine_has_nothing_to_look_into(self, make):
        engine = make()
        engine.close()
        for name in ("model", "kv_cache"):
            with pytest.raises(EngineClosed):
                getattr(engine, name)


class TestLookingAhead:
    def test_fit_says_whether_a_request_could_ever_run_with_the_numbers(self, make):
        engine = make(num_gpu_blocks_override=13, max_num_seqs=2)
        fit = engine.fit([5] * 30, SamplingParams(max_tokens=20))
        assert fit and str(fit) == "fits: needs 4 of 13 blocks at most, 1 of 2 seats"
        too_many = engine.fit([5] * 30, SamplingParams(max_tokens=20, n=3))
        assert not too_many and "3 of 2 seats" in str(too_many)
        assert not engine.has_work, "nothing was queued"

    def test_fit_and_add_request_agree(self, make):
        engine = make(num_gpu_blocks_override=13, max_num_seqs=4)
        for n in (1, 4, 5):
            params = SamplingParams(max_tokens=9, n=n)
            fit = engine.fit([5] * 30, params)
            if fit:
                engine.abort(engine.add_request([5] * 30, params))
            else:
                with pytest.raises(RequestTooLarge) as refused:
                    engine.add_request([5] * 30, params)
                assert (refused.value.needed, refused.value.available) == (5, 4)

    def test_start_up_time_is_told_by_phase(self, make):
        startup = make().startup
        assert {"find the model", "weights", "KV cache"} <= startup.seconds.keys()
        assert startup.total == sum(startup.seconds.values()) > 0
        assert str(startup).splitlines()[-1].startswith("in all")

    def test_a_sequences_company_is_told_step_by_step(self, make):
        engine = make(max_num_batched_tokens=16)
        engine.add_request([5] * 20, SamplingParams(max_tokens=3, ignore_eos=True), request_id="a")
        engine.step()
        engine.add_request([6] * 4, SamplingParams(max_tokens=3, ignore_eos=True), request_id="b")
        engine.run()
        batches = engine.history.batches_of("a")
        assert batches[:2] == [(1, {"a": 16}), (2, {"a": 4, "b": 4})]

    def test_each_requests_times_are_told(self, make):
        engine = make()
        name = engine.add_request([5] * 20, SamplingParams(max_tokens=4, ignore_eos=True))
        assert engine.metrics(name).ttft is None
        engine.run()
        metrics = engine.metrics(name)
        assert len(metrics.token_times) == 4 and len(metrics.inter_token_latencies) == 3
        assert metrics.time_in_queue + metrics.prefill_time == pytest.approx(metrics.ttft)
        assert metrics.tpot == pytest.approx(sum(metrics.inter_token_latencies) / 3)
        assert "first token after" in str(metrics)
