"""What an engine's ops cost at its batch, and the roofline that they lie under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nbengine import Engine, SamplingParams
from nbengine.errors import InvalidField, UnknownStep
from nbengine.kernel_survey import OpSurvey, RooflinePlot, Survey, survey
from nbengine.kernels.implementation import Implementation
from nbengine.kernels.op import Cost
from nbengine.kernels.ops import OPS
from nbengine.kernels.roofline import PUBLISHED, Roofline
from nbengine.kernels.timing import Timing
from tests.gpu import needs_gpu
from tests.tiny_models import save_reference

ROOFS = Roofline("a device", "1", 1e12, 1e12, 1e14, "a reader")
"""1 TB/s and 100 TFLOP/s: the ridge is at 100 operations a byte."""


def row(op: str, cost: Cost | None, seconds: float | None = None, is_own: bool = True) -> OpSurvey:
    implementation = Implementation(OPS[op], "CUDA C", f"{op}.cu", print, is_own)
    timing = None if seconds is None else Timing(seconds, seconds, seconds, 11)
    return OpSurvey(implementation, cost, timing)


MEASURED = Survey(
    (
        row("rms_norm", Cost(10**6, 10**6), 2e-6),  # at least 1 µs, by its bytes
        row("gemv", Cost(10**6, 10**9), 40e-6, is_own=False),  # at least 10 µs, by its operations
        row("copy_blocks", Cost(10**6, 0), 1e-6),
        row("rope", None),
    ),
    ROOFS,
    "measured on a device",
)


def test_a_fraction_of_the_roofline_is_the_floor_over_the_time() -> None:
    fractions = [MEASURED.of_roofline(row) for row in MEASURED.rows]
    assert fractions == [pytest.approx(0.5), pytest.approx(0.25), pytest.approx(1.0), None]


def test_the_table_has_every_op_and_says_which_the_batch_does_not_call() -> None:
    lines = {line.split()[0]: line for line in str(MEASURED).splitlines()[2:]}
    assert lines["rms_norm"].split()[-6:] == ["memory", "1.00", "µs", "2.00", "µs", "50.0%"]
    assert "swapped" in lines["gemv"] and "matrix" in lines["gemv"]
    assert lines["rope"].endswith("not called")


def test_without_an_engine_it_says_so() -> None:
    found = survey()
    assert [row.name for row in found.rows] == list(OPS)
    assert "no engine is loaded" in str(found)
    assert "<img" not in RooflinePlot(found)._repr_html_(), "nothing to draw"


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidField, match="H200, H100, A100"):
        survey(gpu="K80")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel_survey")
    save_reference("served-llama", folder)
    return folder / "served-llama"


def engine_of(model: Path, kernels: str) -> Iterator[Engine]:
    with Engine(
        model=model,
        kernels=kernels,
        device="cuda" if kernels == "cuda" else "cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        num_gpu_blocks_override=16,
    ) as engine:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        engine.add_request([5, 6, 7, 8], params)
        engine.add_request([5, 6, 7, 8, 9], params)
        engine.step(2)
        yield engine


def test_an_emulated_engine_is_held_against_published_figures_and_nothing_is_timed(
    model: Path,
) -> None:
    for engine in engine_of(model, "emulated"):
        before = engine.snapshot()
        plot = engine.kernels.roofline("A100")
        rows = {row.name: row for row in plot.survey.rows}
        assert plot.survey.roofs is PUBLISHED["A100"]
        assert all(row.timing is None for row in rows.values())
        # Two requests of a hidden size of 64 floats, with the residual: x, out and the residual
        # twice, and the weight once.
        assert rows["rms_norm"].cost == Cost(4 * 2 * 64 * 4 + 64 * 4, 4 * 2 * 64)
        assert rows["swap_blocks"].cost is None
        assert "not measured" in str(plot) and "no GPU" in str(plot)
        picture = plot._repr_html_()
        assert "(published, not measured): " in picture
        assert "rms_norm 0." in picture and "paged_attention_decode" in picture
        assert engine.snapshot() == before


def test_a_step_of_the_past_is_costed_by_what_it_computed(model: Path) -> None:
    for engine in engine_of(model, "emulated"):
        engine.run()
        cache = engine._runner.kv_cache.data.view(torch.int32)  # what was never written may be NaN
        before = cache.clone()
        first, second = (
            {row.name: row.cost for row in engine.kernels.survey(step=step).rows} for step in (1, 2)
        )
        assert (engine.history[1].num_tokens, engine.history[2].num_tokens) == (9, 2)
        assert first["rms_norm"] == Cost(4 * 9 * 64 * 4 + 64 * 4, 4 * 9 * 64)
        assert second["rms_norm"] == Cost(4 * 2 * 64 * 4 + 64 * 4, 4 * 2 * 64)
        assert first["paged_attention_prefill"] and not first["paged_attention_decode"]
        assert second["paged_attention_decode"] and not second["paged_attention_prefill"]
        assert "in step 2, not measured" in str(engine.kernels.roofline(step=2))
        assert cache.equal(before)
        with pytest.raises(UnknownStep, match="no record of step 99"):
            engine.kernels.survey(step=99)


def test_the_calls_of_a_step_of_the_past_are_those_that_it_made(model: Path) -> None:
    for engine in engine_of(model, "emulated"):
        recording = engine._runner.kernels.record("paged_attention_decode")
        engine.step()
        step = engine.history[-1].step
        engine.step(2)
        made, again = (
            recording.calls[0],
            engine.kernels.live_calls("paged_attention_decode", step=step),
        )
        for name, argument in again["paged_attention_decode"][0].items():
            if name in ("out", "k_cache", "v_cache"):
                continue  # nothing is in the one yet, and in the others more tokens than then
            if isinstance(argument, torch.Tensor):
                assert argument.equal(made[name]), name
            else:
                assert argument == made[name], name


@needs_gpu
def test_on_a_gpu_every_op_that_is_called_is_timed(model: Path) -> None:
    for engine in engine_of(model, "cuda"):
        found = engine.kernels.survey()
        assert found.roofs is not None and found.roofs.driver
        called = [row for row in found.rows if row.cost is not None]
        assert len(called) >= 6
        assert all(0 < (found.of_roofline(row) or 0) < 1.2 for row in called)
        engine.run()
        past = {row.name: row for row in engine.kernels.survey(step=1).rows}
        assert past["paged_attention_prefill"].timing and not past["paged_attention_decode"].cost
