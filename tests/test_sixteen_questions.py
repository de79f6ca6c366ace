"""Sixteen questions that are asked again and again of inference engines, each answered in one line.

The lesson of the same name asks them of a real model; here each answer is held to what is true.
"""

from __future__ import annotations

import gc
import signal
import sys
import threading
import weakref

import pytest

from nbengine import Engine, SamplingParams
from nbengine.errors import NotEnoughMemory

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = {
    "a": [5, *range(20, 52)],
    "b": [5, *range(20, 36), 99, *range(37, 52)],  # another token at position 17
    "c": [9] * 20,
}


@pytest.fixture
def engine(make):
    """Three requests, the third of which there are no blocks for, after nine steps."""
    engine = make(num_gpu_blocks_override=6, max_model_len=64, max_num_batched_tokens=32)
    for name, prompt in PROMPTS.items():
        engine.add_request(prompt, GREEDY, request_id=name)
    engine.step(9)
    return engine


def test_which_requests_ran_in_each_step_and_with_how_many_tokens(engine):
    answer = {record.step: record.scheduled for record in engine.history}
    assert answer[1] == {"a": 32}
    assert answer[2] == {"a": 1, "b": 17}, "16 of the 33 tokens of b were in the cache"
    assert (
        sum(n for step in answer.values() for n in step.values())
        == sum(s.num_computed_tokens for s in engine.snapshot().running)
        - engine.snapshot().sequence("b").num_cached_tokens
    )


def test_why_is_this_request_waiting_now(engine):
    answer = str(engine.why("c"))
    assert "c: waiting, 0 of 20 tokens computed" in answer
    assert "is next in the queue (Fcfs)" in answer
    assert "needs 2 blocks, 1 available" in answer


def test_can_this_request_ever_fit_with_numbers(engine):
    answer = engine.fit([5] * 40, SamplingParams(max_tokens=24))
    assert answer and str(answer) == "fits: needs 4 of 6 blocks at most, 1 of 256 seats"
    assert not engine.fit([5] * 4, SamplingParams(n=300))


def test_how_many_blocks_are_free_and_who_holds_which(engine):
    answer = engine.snapshot()
    assert (answer.num_free_blocks, answer.num_held_blocks) == (1, 5)
    assert answer.holders() == {0: ["a", "b"], 1: ["a"], 2: ["a"], 3: ["b"], 4: ["b"]}


def test_where_did_the_memory_go(engine):
    answer = str(engine.memory)
    for part in ("weights", "activations", "KV cache", "6 blocks of 16 = 96 tokens"):
        assert part in answer


def test_why_no_prefix_hit_the_first_block_that_differs(engine):
    answer = str(engine.why("b"))
    assert "16 of 33 tokens came from the prefix cache" in answer
    assert "block 1 is the first that differs, at position 17 (token 99, cached: 36)" in answer


def test_who_was_preempted_when_for_whom_and_how_many_tokens_were_lost(make):
    engine = make(num_gpu_blocks_override=4, max_model_len=64)
    for name in ("a", "b"):
        engine.add_request([ord(name)] * 28, GREEDY, request_id=name)
    engine.run()
    answer = [(r.step, *p) for r in engine.history for p in r.preempted]
    assert answer == [(6, "b", "a", "recompute", 32, 2)]


def test_the_true_traceback_of_a_failed_start_in_the_cell(tiny_llama):
    with pytest.raises(NotEnoughMemory) as answer:
        Engine(model=tiny_llama, num_gpu_blocks_override=10**9, skip_tokenizer_init=True)
    assert "num_gpu_blocks_override=1000000000 blocks of" in str(answer.value)
    frames = [entry.name for entry in answer.traceback]
    assert frames[0] == "test_the_true_traceback_of_a_failed_start_in_the_cell"
    assert frames[-1] == "plan_memory", "down to the line that says no"


def test_interrupt_a_cell_and_go_on(engine):
    press = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    slow = engine.break_on(lambda record: threading.Event().wait(0.05) and False)
    press.start()
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    slow.remove()
    engine.run()
    assert [len(engine.output(name).outputs[0].token_ids) for name in PROMPTS] == [24, 24, 24]


def test_free_all_memory_without_restarting_the_kernel(make):
    engine = make()
    cache, weights = weakref.ref(engine.kv_cache), weakref.ref(engine.model.embedding)
    engine.close()
    gc.collect()
    assert cache() is None and weights() is None


def test_start_up_time_by_phase(engine):
    answer = engine.startup
    assert answer.seconds["weights"] > 0 and "KV cache" in str(answer)


def test_stream_tokens_in_plain_python(make):
    engine = make()
    lengths = [len(o.outputs[0].token_ids) for o in engine.stream(PROMPTS["a"], GREEDY)]
    assert lengths == list(range(1, 25))


def test_a_debugger_inside_a_step(engine, monkeypatch):
    """That a prompt opens in the cell is tested in a real kernel."""
    seen = []

    def hook():
        frame = sys._getframe(1)
        seen.append((frame.f_code.co_name, frame.f_locals["sequence"].seq_id))

    monkeypatch.setattr(sys, "breakpointhook", hook)

    class Stops:
        dynamic = True

        def rank(self, sequence):
            breakpoint()
            return 0

    engine.set_policy(Stops)
    engine.step()
    assert ("rank", "c") in seen


def test_each_requests_queue_prefill_first_token_and_per_token_times(engine):
    engine.run()
    answer = engine.metrics("c")
    assert answer.time_in_queue > engine.metrics("a").time_in_queue
    assert answer.prefill_time > 0 and answer.ttft >= answer.prefill_time
    assert len(answer.inter_token_latencies) == 23


def test_logits_candidates_hidden_states_and_attention_of_a_request_at_a_step(engine):
    answer = engine.probe("a", 5)
    assert answer.top(1)[0].token_id == engine.history[5].sampled["a"]
    num_tokens = engine.state_at(5).sequence("a").num_computed_tokens
    assert answer.logits.shape == (500,) and answer.hidden_states.shape == (3, 64)
    assert answer.attention.shape == (2, 4, num_tokens)


def test_why_does_the_same_prompt_give_another_answer_in_another_batch(make):
    logprobs = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)

    def alone_and_in_company(**fields):
        engine = make(max_num_batched_tokens=16, enable_prefix_caching=False, **fields)
        told = []
        for company in (0, 3):
            name = f"in company of {company}"
            engine.add_request(PROMPTS["a"], logprobs, request_id=name)
            for i in range(company):
                engine.add_request([30 + i] * 11, GREEDY)
            engine.run()
            told.append([*map(str, engine.output(name).outputs[0].logprobs)])
        return engine, told

    engine, _ = alone_and_in_company()
    batches = engine.history.batches_of("in company of 3")
    assert max(len(batch) for _, batch in batches) == 4, "the batch's composition"
    _, (alone, in_company) = alone_and_in_company(batch_invariant=True)
    assert alone == in_company, "and a mode in which it does not matter, to the last bit"
