"""Inside the model: what a probe says is what transformers computes, and it disturbs nothing."""

from __future__ import annotations

import pytest
import torch

from nbengine import SamplingParams
from nbengine.errors import InvalidRequest, UnknownRequest, UnknownStep

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = [5, *range(20, 57)]


@pytest.fixture(scope="module")
def reference(tiny_llama):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()

    def run(tokens):
        with torch.inference_mode():
            return model(torch.tensor([tokens]), output_hidden_states=True, output_attentions=True)

    return run


@pytest.mark.parametrize("kernels", ["torch", "auto", "emulated"])
def test_it_is_what_transformers_computes(make, reference, kernels):
    if kernels == "emulated":
        pytest.importorskip("cuda.pathfinder")
    engine = make(kernels=kernels, device="cpu", max_num_batched_tokens=16)
    engine.add_request(PROMPT, GREEDY, request_id="a")
    engine.run(6)
    probe = engine.probe("a")
    seq = engine.snapshot().sequence("a")
    assert probe.token_ids == seq.token_ids[: seq.num_computed_tokens]
    expected = reference(list(probe.token_ids))
    torch.testing.assert_close(probe.logits, expected.logits[0, -1], atol=2e-3, rtol=2e-3)
    hidden = torch.stack([h[0, -1] for h in expected.hidden_states[:-1]])
    torch.testing.assert_close(probe.hidden_states[:-1], hidden, atol=2e-3, rtol=2e-3)
    attention = torch.stack([a[0, :, -1] for a in expected.attentions])
    torch.testing.assert_close(probe.attention, attention, atol=2e-3, rtol=2e-3)
    assert probe.block_table == seq.block_table


def test_at_an_earlier_step_it_explains_the_token_that_was_sampled_then(make):
    engine = make(max_num_batched_tokens=16)
    engine.add_request(PROMPT, GREEDY, request_id="a")
    engine.add_request([7] * 9, GREEDY, request_id="b")
    engine.run()
    for step in (4, 7, 12):
        probe = engine.probe("a", step)
        assert probe.step == step
        assert probe.top(1)[0].token_id == engine.history[step].sampled["a"]
    assert sum(c.logprob for c in engine.probe("a", 4).top(500)) < 0
    assert float(torch.tensor([c.logprob for c in probe.top(500)]).exp().sum()) == pytest.approx(1)


def test_attention_is_told_by_block(make):
    engine = make()
    engine.add_request(PROMPT, GREEDY, request_id="a")
    engine.run(3)
    probe = engine.probe("a")
    by_layer, heads = probe.attention_by_block(), probe.attention_by_block(layer=1)
    assert by_layer.shape == (2, 3) and heads.shape == (4, 3)
    torch.testing.assert_close(by_layer.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(heads[:, 0], probe.attention[1, :, :16].sum(dim=1))
    text = repr(probe)
    assert "attention of position 39 over its 3 blocks" in text and "layer 1" in text
    html = probe._repr_html_()
    assert html.count("<td title='layer ") == 6 and "block 2:" in html


def test_it_disturbs_nothing(make):
    outputs = []
    for probes in (False, True):
        engine = make(max_num_batched_tokens=16)
        engine.add_request(PROMPT, GREEDY, request_id="a")
        while engine.has_work:
            engine.step()
            if probes and engine.has_work:
                engine.probe("a")
        outputs.append((engine.output("a").outputs[0].token_ids, len(engine.history)))
    assert outputs[0] == outputs[1]


def test_what_there_is_nothing_to_see_of(make):
    engine = make(max_num_seqs=1)
    engine.add_request(PROMPT, GREEDY, request_id="a")
    engine.add_request(PROMPT, GREEDY, request_id="waits")
    engine.step()
    with pytest.raises(InvalidRequest, match=r"nothing is computed after step 1 \(waiting\)"):
        engine.probe("waits")
    with pytest.raises(UnknownRequest, match="no unfinished sequence 'nobody' after step 1"):
        engine.probe("nobody")
    with pytest.raises(UnknownStep):
        engine.probe("a", 9)
