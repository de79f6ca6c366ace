"""The engine among callers that interrupt, fail, call back and vanish: nobody else is harmed, and
nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest

from nbengine import LLM, Engine, RequestOutputKind, SamplingParams
from nbengine.errors import EngineBusy, EngineClosed, UnknownRequest
from nbengine.requests import MAX_FINISHED_KEPT

PROMPT = [5, 20, 21, 22]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = GREEDY.clone(max_tokens=190)


def llm_of(engine: Engine) -> LLM:
    llm = LLM.__new__(LLM)
    llm.engine = engine
    return llm


def is_idle(engine: Engine) -> bool:
    """After all that was queued before: no request, and no wish to step."""
    return engine._call(lambda: not engine.has_work and not engine.requests.driven)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


class TestInterrupts:
    """Ctrl-C strikes where the main thread waits: for the engine's thread, or for an output."""

    @staticmethod
    def interrupt_wait(monkeypatch, number):
        """KeyboardInterrupt at the `number`-th wait, after the command has been run: the caller
        never learns what it gave."""
        waits = iter(range(1000))
        main = threading.main_thread()
        result, simple_queue = Future.result, queue.SimpleQueue

        def interrupted(wait):
            def wrapped(self, *args, **options):
                if threading.current_thread() is main and next(waits) == number:
                    wait(self, *args, **options)
                    raise KeyboardInterrupt
                return wait(self, *args, **options)

            return wrapped

        class Queue:
            def __init__(self):
                self.inner = simple_queue()
                self.put = self.inner.put

            get = interrupted(lambda self: self.inner.get())

        monkeypatch.setattr(Future, "result", interrupted(result))
        monkeypatch.setattr(queue, "SimpleQueue", Queue)

    @pytest.mark.parametrize("number", range(6))
    def test_generate_leaves_nothing_behind(self, make, monkeypatch, number):
        engine = make()
        with monkeypatch.context() as patch:
            self.interrupt_wait(patch, number)
            try:
                llm_of(engine).generate([PROMPT, PROMPT], GREEDY, use_tqdm=False)
                was_interrupted = False
            except KeyboardInterrupt:
                was_interrupted = True
        assert was_interrupted == (number < 4)  # queueing, two outputs, cleaning up
        assert is_idle(engine)

    def test_the_clean_up_itself_may_be_interrupted(self, make, monkeypatch):
        engine = make()
        stream = engine.stream(PROMPT, LONG)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                stream.close()
        assert is_idle(engine)

    def test_an_interrupted_close_closes_nevertheless(self, make, monkeypatch):
        engine = make()
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.close()
        wait_for(lambda: engine.is_closed and not engine._thread.is_alive)

    def test_an_interrupted_start_leaves_no_thread(self, tiny_llama, monkeypatch):
        before = set(threading.enumerate())
        loaded = threading.Event()

        def interrupt(self):
            loaded.wait(60)
            raise KeyboardInterrupt

        load = Engine._load
        monkeypatch.setattr(Engine, "_load", lambda self, c: (load(self, c), loaded.set()))
        monkeypatch.setattr(Future, "result", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            Engine(model=tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=8)
        # Although the traceback still holds the engine, as a notebook's last traceback does.
        wait_for(lambda: not set(threading.enumerate()) - before)
        del caught


class TestCallbacks:
    def test_a_failing_subscriber_harms_only_itself(self, make, caplog):
        engine = make()
        first = engine.add_request(PROMPT, GREEDY, subscriber=lambda output: 1 / 0)
        got = []
        engine.add_request(PROMPT, GREEDY, subscriber=got.append)
        with caplog.at_level(logging.ERROR, "nbengine"):
            engine.run()
        assert "ZeroDivisionError" in caplog.text
        assert got[-1].finished
        assert engine.output(first).finished
        assert engine.output(first).metrics.finished_time is not None

    def test_a_failing_listener_is_dropped_and_the_others_go_on(self, make, caplog):
        engine = make()
        calls = []

        def fail(record):
            calls.append("fail")
            raise ValueError("planted")

        engine.on_step(fail)
        engine.on_step(lambda record: calls.append("good"))
        engine.add_request(PROMPT, GREEDY)
        with caplog.at_level(logging.ERROR, "nbengine"):
            engine.step(2)
        assert calls == ["fail", "good", "good"]
        assert "planted" in caplog.text

    def test_a_listener_may_end_itself_and_the_next_is_still_called(self, make):
        engine = make()
        calls = []

        def once(record):
            calls.append("once")
            remove()

        remove = engine.on_step(once)
        engine.on_step(lambda record: calls.append("other"))
        engine.step()
        engine.step()
        assert calls == ["once", "other", "other"]
        remove()  # again: no error

    def test_a_listener_hears_of_failed_steps(self, make, monkeypatch):
        engine = make()
        errors = []
        engine.on_step(lambda record: errors.append(record.error))
        engine.add_request(PROMPT, GREEDY)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(type(engine._runner.decoder), "forward", None)
            engine.step()
        assert "TypeError" in errors[0]

    def test_a_subscriber_may_abort_and_add(self, make):
        engine = make()
        got = []

        def subscriber(output):
            got.append(output)
            if not output.finished:
                engine.abort(output.request_id)
                engine.add_request(PROMPT, GREEDY, request_id="next")

        engine.add_request(PROMPT, LONG, request_id="a", subscriber=subscriber)
        engine.run()
        assert [o.finished for o in got] == [False, True]
        assert engine.output("a").outputs[0].finish_reason == "abort"
        assert engine.output("next").outputs[0].finish_reason == "length"

    @pytest.mark.parametrize(
        "misdeed",
        [
            lambda engine: engine.step(),
            lambda engine: engine.abort("a"),
            lambda engine: engine.add_request(PROMPT, GREEDY),
            lambda engine: engine.snapshot(),
            lambda engine: engine.close(),
            lambda engine: list(engine.stream(PROMPT, GREEDY)),
        ],
    )
    def test_a_policy_that_calls_the_engine_is_told_so_and_nothing_is_lost(self, make, misdeed):
        engine = make()

        class Meddling:
            dynamic = True
            armed = False

            def rank(self, sequence):
                if self.armed:
                    self.armed = False
                    misdeed(engine)
                return 0

        policy = Meddling()
        engine.set_policy(policy)
        names = [engine.add_request(PROMPT, GREEDY, request_id=i) for i in ("a", "b")]
        engine.step(2)
        policy.armed = True
        with pytest.raises(EngineBusy, match=r"submit|add_request"):
            engine.step()
        engine.run()
        assert [len(engine.output(n).outputs[0].token_ids) for n in names] == [12, 12]
        assert engine.scheduler.pool.num_held == 0

    def test_waiting_for_a_stream_inside_a_listener_is_refused_not_a_deadlock(self, make):
        engine = make()
        errors = []

        def listener(record):
            try:
                llm_of(engine).generate(PROMPT, GREEDY, use_tqdm=False)
            except EngineBusy as error:
                errors.append(error)

        engine.on_step(listener)
        engine.step()
        assert len(errors) == 1
        assert is_idle(engine)

    @pytest.mark.parametrize("rank", [lambda s: 1 / 0, lambda s: object(), lambda s: "x"])
    def test_a_policy_that_fails_on_add_refuses_that_request_alone(self, make, rank):
        engine = make()
        policy = type("P", (), {"rank": lambda self, seq: 0})()
        engine.set_policy(policy)
        good = engine.add_request(PROMPT, GREEDY)
        engine.step()
        type(policy).rank = lambda self, seq: rank(seq)
        with pytest.raises((ZeroDivisionError, TypeError)):
            engine.add_request(PROMPT, GREEDY)
        with pytest.raises((ZeroDivisionError, TypeError)):
            llm_of(engine).generate([PROMPT, PROMPT], GREEDY, use_tqdm=False)
        engine.run()
        assert len(engine.output(good).outputs[0].token_ids) == 12
        assert is_idle(engine)

    @pytest.mark.parametrize("rank", [float("nan"), {1, 2}])
    def test_ranks_that_order_nothing_still_serve_everybody(self, make, rank):
        engine = make(max_num_seqs=2)
        engine.set_policy(type("P", (), {"rank": lambda self, seq: rank}))
        names = [engine.add_request(PROMPT, GREEDY) for _ in range(5)]
        engine.run(max_steps=200)
        assert all(engine.output(name).finished for name in names)


class TestThreads:
    def test_close_ends_whoever_generates_streams_or_steps(self, make):
        for _ in range(3):
            engine = make()
            ends = queue.SimpleQueue()

            def call(function, ends=ends):
                try:
                    function()
                    ends.put("returned")
                except EngineClosed:
                    ends.put("closed")

            llm = llm_of(engine)
            jobs = [
                lambda llm=llm: llm.generate([PROMPT] * 3, LONG, use_tqdm=False),
                lambda llm=llm: list(llm.stream(PROMPT, LONG)),
                lambda engine=engine: [engine.step() for _ in range(10_000)],
                lambda engine=engine: [engine.snapshot() for _ in range(100_000)],
            ]
            threads = [threading.Thread(target=call, args=(j,), daemon=True) for j in jobs]
            for thread in threads:
                thread.start()
            time.sleep(0.03)
            engine.close()
            for thread in threads:
                thread.join(30)
            assert not any(thread.is_alive() for thread in threads)
            assert ends.qsize() == len(jobs)

    def test_a_call_that_comes_just_as_the_thread_ends_is_answered(self, make, monkeypatch):
        engine = make()
        monkeypatch.setattr(engine, "_check_open", lambda: None)  # it was open when looked at
        engine.close()
        monkeypatch.undo()
        future = engine._thread.submit(lambda: engine._if_open(lambda: 1))
        with pytest.raises(EngineClosed):
            future.result(10)

    def test_a_refused_call_leaves_no_ring_that_keeps_a_dropped_engine(self, tiny_llama):
        engine = Engine(model=tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=8)
        thread = engine._thread
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(UnknownRequest):
                engine.abort("nobody")
            with contextlib.suppress(UnknownRequest):
                engine.output("nobody")
            del engine
            wait_for(lambda: not thread.is_alive, 5)
        finally:
            gc.enable()

    def test_an_engine_dropped_while_it_runs_ends(self, tiny_llama):
        engine = Engine(model=tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=32)
        thread = engine._thread
        engine.start()
        engine.add_request(PROMPT, LONG)
        del engine
        gc.collect()
        wait_for(lambda: not thread.is_alive)

    def test_a_stream_that_the_collector_closes_inside_a_step_is_aborted_after_it(self, make):
        engine = make()
        streams = [engine.stream(PROMPT, LONG)]
        next(streams[0])
        engine.pause()
        closed = threading.Event()

        class Collects:
            dynamic = True

            def rank(self, sequence):
                if streams:
                    streams.pop().close()
                    closed.set()
                return 0

        engine.set_policy(Collects())  # closes it on the engine's thread
        assert closed.wait(10)
        wait_for(lambda: is_idle(engine))
        assert engine.scheduler.pool.num_held == 0
        assert engine.history[-1].error is None

    @pytest.mark.parametrize("life", ["background", "stream", "generate in a daemon thread"])
    def test_a_process_may_exit_while_its_engine_runs(self, tiny_llama, life):
        program = f"""
import sys, threading, time
from nbengine import LLM, SamplingParams
llm = LLM({str(tiny_llama)!r}, skip_tokenizer_init=True, num_gpu_blocks_override=64)
params = SamplingParams(max_tokens=200, ignore_eos=True)
if {life!r} == "background":
    for _ in range(20):
        llm.engine.add_request([5, 6, 7], params)
    llm.engine.start()
elif {life!r} == "stream":
    stream = llm.stream([5, 6, 7], params)
    next(stream)
else:
    call = lambda: llm.generate([[5, 6, 7]] * 20, params, use_tqdm=False)
    threading.Thread(target=call, daemon=True).start()
while llm.engine.scheduler.step_count < 3:
    time.sleep(0.001)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], timeout=60, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_forked_process_gets_an_honest_error(self, make):
        engine = make()
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)

        def child():
            try:
                engine.step()
            except EngineClosed as error:
                writer.send(str(error))
            engine.close()

        process = context.Process(target=child, daemon=True)
        process.start()
        try:
            assert reader.poll(30)
            assert "fork" in reader.recv()
            process.join(30)
            assert process.exitcode == 0
        finally:
            process.kill()
        engine.step()  # the parent's is untouched


class TestFailedSteps:
    def test_the_engine_stops_after_a_failure_even_if_a_stream_is_never_asked_again(
        self, make, monkeypatch
    ):
        engine = make()
        stream = engine.stream(PROMPT, LONG)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "compute", None)  # the model itself may be in a graph
            wait_for(lambda: engine.error is not None)
            steps = engine._call(lambda: engine.scheduler.step_count)
            time.sleep(0.05)
            assert engine._call(lambda: engine.scheduler.step_count) == steps
        with pytest.raises(TypeError):
            list(stream)
        assert is_idle(engine)

    def test_what_finished_before_a_step_failed_is_delivered(self, make, monkeypatch):
        engine = make()
        got = []
        engine.add_request(PROMPT, GREEDY.clone(max_tokens=1), subscriber=got.append)
        monkeypatch.setattr(engine.requests, "take", None)
        with pytest.raises(TypeError):
            engine.step()
        assert [output.finished for output in got] == [True]


class TestAsync:
    def test_cancelling_a_task_at_any_moment_leaves_nothing_behind(self, make):
        engine = make()

        async def main():
            async def consume():
                async for _ in engine.astream(PROMPT, LONG):
                    await asyncio.sleep(0)

            for turns in range(12):
                task = asyncio.ensure_future(consume())
                for _ in range(turns):
                    await asyncio.sleep(0.0005 * (turns > 5))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(main())
        wait_for(lambda: is_idle(engine))

    def test_a_loop_that_is_closed_early_ends_its_streams(self, make):
        engine = make()
        loop = asyncio.new_event_loop()
        stream = engine.astream(PROMPT, LONG)
        loop.run_until_complete(anext(stream))
        loop.close()
        wait_for(lambda: is_idle(engine))
        (out,) = [engine.output(name) for name in engine.requests._finished]
        assert out.outputs[0].finish_reason == "abort"
        del stream

    def test_streams_run_together_and_one_that_is_left_stops_alone(self, make):
        engine = make()

        async def consume(limit):
            stream = engine.astream(PROMPT, LONG.clone(max_tokens=30))
            n = 0
            async for output in stream:
                n = len(output.outputs[0].token_ids)
                if n >= limit:
                    await stream.aclose()
                    break
            return n

        async def main():
            return await asyncio.gather(consume(3), consume(99))

        few, all_of_them = asyncio.run(main())
        assert few >= 3
        assert all_of_them == 30
        wait_for(lambda: is_idle(engine))


class TestLongSessions:
    def test_finished_requests_are_forgotten_while_an_old_one_waits(self, make, monkeypatch):
        monkeypatch.setattr("nbengine.requests.MAX_FINISHED_KEPT", 5)
        engine = make(scheduling_policy="priority", max_num_seqs=1)
        engine.add_request(PROMPT, GREEDY, request_id="waits", priority=9)
        one = GREEDY.clone(max_tokens=1)
        names = []
        for _ in range(12):
            names.append(engine.add_request(PROMPT, one))
            engine.step()
        assert len(engine.requests._finished) == 5
        with pytest.raises(UnknownRequest):
            engine.output(names[0])
        assert engine.output(names[-1]).finished
        assert not engine.output("waits").finished

    def test_long_finished_requests_are_forgotten_sooner(self, make, monkeypatch):
        monkeypatch.setattr("nbengine.requests.MAX_FINISHED_SIZE", 40)
        engine = make()
        names = [engine.add_request(PROMPT, GREEDY) for _ in range(4)]
        engine.run()
        assert [name in engine.requests._finished for name in names] == [False, False, True, True]

    def test_many_aborted_before_a_step_do_not_break_it(self, make):
        engine = make()
        names = [engine.add_request(PROMPT, GREEDY) for _ in range(MAX_FINISHED_KEPT + 1)]
        engine.abort(*names)
        assert engine.step().error is None

    def test_an_aborted_id_may_be_used_again_before_the_next_step(self, make):
        engine = make()
        got = []
        engine.add_request(PROMPT, GREEDY, request_id="a")
        engine.abort("a")
        ended = engine.output("a").metrics.finished_time
        assert ended is not None
        engine.step()
        assert engine.output("a").metrics.finished_time == ended
        engine.add_request(PROMPT, GREEDY, request_id="a", subscriber=got.append)
        engine.abort("a")
        engine.add_request(PROMPT, GREEDY, request_id="a", subscriber=got.append)
        engine.run()
        assert got[0].outputs[0].finish_reason == "abort"
        assert [len(o.outputs[0].token_ids) for o in got[1:]] == list(range(1, 13))

    def test_an_id_of_the_callers_never_gets_in_the_way_of_the_engines_own(self, make):
        engine = make()
        engine.add_request(PROMPT, GREEDY, request_id="req-1")
        names = [engine.add_request(PROMPT, GREEDY) for _ in range(3)]
        assert len({"req-1", *names}) == 4


class TestOutputs:
    def test_an_output_does_not_change_after_it_was_given(self, make):
        engine = make(max_num_batched_tokens=16)
        params = GREEDY.clone(prompt_logprobs=0, logprobs=1)
        name = engine.add_request(list(range(5, 45)), params)
        engine.step()
        early = engine.output(name)
        before = repr((early.metrics, early.prompt_logprobs, early.outputs, early.finished))
        engine.run()
        after = repr((early.metrics, early.prompt_logprobs, early.outputs, early.finished))
        assert after == before
        assert early.metrics.finished_time is None

    def test_looking_at_a_delta_request_takes_nothing_from_its_stream(self, make):
        engine = make()
        got = []
        params = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
        name = engine.add_request(PROMPT, params, subscriber=got.append)
        while engine.has_work:
            engine.step()
            engine.output(name)
        pieces = [t for o in got for t in o.outputs[0].token_ids]
        assert engine.output(name).outputs[0].token_ids == pieces
        assert len(pieces) == 12

    @pytest.mark.parametrize("ending", ["abort", "error"])
    def test_a_request_that_ends_without_a_token_says_why(self, make, monkeypatch, ending):
        engine = make()
        name = engine.add_request(PROMPT, GREEDY)
        if ending == "abort":
            engine.abort(name)
        else:
            decoder = type(engine._runner.decoder)
            compute = decoder.compute_logits
            monkeypatch.setattr(
                decoder, "compute_logits", lambda self, h: compute(self, h) * float("nan")
            )
            engine.run()
        (out,) = engine.output(name).outputs
        assert out.finish_reason == ending
        assert out.token_ids == []
        assert (ending == "error") == ("nan" in str(out.stop_reason))

    def test_prompt_logprobs_of_a_single_token_are_none_for_it(self, make):
        engine = make()
        name = engine.add_request([7], GREEDY.clone(prompt_logprobs=1))
        engine.run()
        assert engine.output(name).prompt_logprobs == [None]

    @pytest.mark.parametrize("mode", ["recompute", "swap"])
    def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt(self, make, mode):
        prompt = list(range(30, 94))
        params = GREEDY.clone(prompt_logprobs=0, max_tokens=2)

        def scored(engine, *before):
            for other in before:
                engine.add_request(other, GREEDY.clone(max_tokens=40))
                engine.step()
            name = engine.add_request(prompt, params)
            engine.run()
            return engine.output(name)

        expected = scored(make()).prompt_logprobs
        tight = make(
            num_gpu_blocks_override=6,
            max_model_len=96,
            max_num_batched_tokens=8,
            preemption_mode=mode,
            swap_space=0.01,
            scheduling_policy="priority",
        )
        name = tight.add_request(prompt, params, priority=1)
        tight.step(4)
        tight.add_request(list(range(200, 264)), GREEDY.clone(max_tokens=1), priority=0)
        tight.step(2)
        tight.add_request(list(range(300, 330)), GREEDY.clone(max_tokens=40), priority=0)
        tight.run()
        got = tight.output(name).prompt_logprobs
        assert len(got) == len(prompt)
        for a, b in zip(expected[1:], got[1:], strict=True):
            assert a.keys() == b.keys()
            for token in a:
                assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)

    def test_delta_logprobs_of_three_samples_are_those_of_their_tokens(self, make):
        engine = make()
        params = SamplingParams(
            n=3, seed=4, max_tokens=5, logprobs=0, ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        tokens, totals = {}, {}
        for output in engine.stream(PROMPT, params):
            for sample in output.outputs:
                assert [list(e) for e in sample.logprobs] == [[t] for t in sample.token_ids]
                tokens.setdefault(sample.index, []).extend(sample.token_ids)
                totals[sample.index] = sample.cumulative_logprob
        assert [len(t) for t in tokens.values()] == [5, 5, 5]
        whole = params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
        (last,) = engine.stream(PROMPT, whole)
        assert {o.index: o.token_ids for o in last.outputs} == tokens
        for sample in last.outputs:
            assert sample.cumulative_logprob == pytest.approx(totals[sample.index])
