"""`try_kernel`: compiled, verified, accounted for, swapped, on a machine with or without a GPU."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbengine import Engine, SamplingParams, kernel_trial
from nbengine.errors import InvalidField, NotEnoughMemory
from nbengine.kernel_trial import compiled_now, counters, source_now, try_kernel
from nbengine.kernels import CompileError, LaunchError, Source, compiler, emulator
from nbengine.kernels.cell import cell_source
from nbengine.kernels.emulator import EmulatedKernel, EmulatedProgram, EmulationError
from nbengine.kernels.implementation import Implementation, implement
from nbengine.kernels.lab import Measurement, Mismatch, verify
from nbengine.kernels.op import Case, Cost
from nbengine.kernels.ops import OPS
from nbengine.kernels.planned import planned
from nbengine.kernels.roofline import Roofline
from nbengine.kernels.source import CUDA_ROOT
from nbengine.kernels.timing import Timing
from nbengine.progress import progress_to
from tests.gpu import needs_gpu
from tests.tiny_models import save_reference

RMS_NORM = (CUDA_ROOT / "rms_norm.cu").read_text()
WRONG = RMS_NORM.replace("scale * weights", "2.0f * scale * weights")

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")


@pytest.fixture(autouse=True)
def own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbengine.kernels.cell.cell_folder", lambda: tmp_path / "cells")


# ---------------------------------------------------------------------- the cell's file


def test_a_cell_is_kept_as_a_file_whose_lines_are_the_cells() -> None:
    source = cell_source("rms_norm", "int a;\nint b;\n", first_line=4)
    assert source.path is not None
    assert source.path.read_text().splitlines()[3:] == ["int a;", "int b;"]
    assert source.path.name == source.name
    assert cell_source("rms_norm", "int a;\nint b;\n", first_line=4).path == source.path
    assert cell_source("rms_norm", "int a;\nint c;\n", first_line=4).path != source.path


def test_a_cell_without_a_place_for_its_file_is_tried_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("nbengine.kernels.cell.cell_folder", lambda: tmp_path / "file")
    source = cell_source("rms_norm", RMS_NORM)
    assert source.path is None
    assert try_kernel("rms_norm", source, case="float32-1x64").verified.errors


def test_the_code_leads_debuggers_to_the_file_and_messages_call_it_by_its_name() -> None:
    source = cell_source("rms_norm", RMS_NORM)
    assert source.path is not None
    launches = planned(OPS["rms_norm"], source, arguments_of("rms_norm", "float32-1x64"))
    cubin = compiler.compile(source, launches[0].kernel, "sm_80")
    assert f'"{source.path}"' in cubin.ptx
    broken = cell_source("rms_norm", RMS_NORM.replace("rsqrtf", "rsqrtg"))
    line = 1 + next(n for n, text in enumerate(RMS_NORM.splitlines(), 1) if "rsqrtf" in text)
    with pytest.raises(CompileError) as raised:
        try_kernel("rms_norm", broken, case="float32-1x64")
    remark = raised.value.diagnostics[0]
    assert (remark.file, remark.line) == (broken.name, line)
    assert str(broken.path) not in str(raised.value)
    assert "^" in str(raised.value)


def test_the_emulator_too_speaks_of_the_cells_lines() -> None:
    wild = cell_source("rms_norm", RMS_NORM.replace("out += token", "out += 100000 + token"))
    line = 1 + next(n for n, text in enumerate(RMS_NORM.splitlines(), 1) if "out + at" in text)
    with pytest.raises(EmulationError, match="out of bounds") as raised:
        try_kernel("rms_norm", wild, case="float32-1x64", emulate=True)
    assert (raised.value.file, raised.value.line) == (wild.name, line)
    assert str(wild.path) not in str(raised.value)


ENDLESS = RMS_NORM.replace(
    "nb::store_floats(out + at", "for (int j = 0; j < 10; j += 0) {}\nnb::store_floats(out + at"
)
"""A new line before the store, 1 lower in a cell."""


def test_a_cell_that_does_not_end_is_an_error_with_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(emulator, "BLOCK_SECONDS", 0.1)
    line = 1 + next(n for n, text in enumerate(ENDLESS.splitlines(), 1) if "j += 0" in text)
    with pytest.raises(EmulationError, match="does its loop end") as raised:
        try_kernel("rms_norm", cell_source("rms_norm", ENDLESS), emulate=True)
    assert raised.value.line == line


def test_a_cell_that_does_not_end_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    launch = EmulatedKernel.launch

    def interrupted_soon(self: EmulatedKernel, *arguments: Any) -> None:
        timer.start()
        launch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(EmulatedKernel, "launch", interrupted_soon)
        with pytest.raises(KeyboardInterrupt):
            try_kernel("rms_norm", cell_source("rms_norm", ENDLESS), emulate=True)
    timer.join()
    assert try_kernel("rms_norm", RMS_NORM, case="float32-1x64", emulate=True).verified.errors


def test_what_is_emulated_leads_gdb_to_the_file_and_its_compiler_speaks_of_its_name() -> None:
    shape = (torch.float32, 64, 16, 8, False)
    source = cell_source("rms_norm", RMS_NORM)
    kernel = EmulatedProgram(source, checks=True).kernel("rms_norm", *shape)
    assert str(source.path).encode() in kernel._library.path.read_bytes()
    broken = cell_source("rms_norm", RMS_NORM.replace("rsqrtf", "rsqrtg"))
    with pytest.raises(CompileError) as raised:
        EmulatedProgram(broken, checks=True).kernel("rms_norm", *shape)
    assert raised.value.diagnostics[0].file == broken.name
    assert str(broken.path) not in str(raised.value)


# ---------------------------------------------------------------------- without an engine


def arguments_of(op: str, name: str) -> dict[str, object]:
    (case,) = [case for case in OPS[op].cases() if case.name == name]
    return case.make(torch.Generator().manual_seed(0))


def test_planned_launches_are_those_that_the_op_makes() -> None:
    arguments = arguments_of("rms_norm", "float32-3x576-residual")
    (launch,) = planned(OPS["rms_norm"], Source.of_op("rms_norm.cu"), arguments)
    # 576 floats are 144 packs of 4, so a row has 5 warps of its own.
    assert launch.kernel == "rms_norm<float, 576, 160, 1, true>"
    assert (launch.grid, launch.block, launch.shared_bytes) == ((3, 1, 1), (160, 1, 1), 0)
    assert arguments["out"].isnan().all(), "nothing ran"


@no_gpu
def test_without_engine_and_gpu_it_says_what_is_missing_and_gives_the_rest() -> None:
    trial = try_kernel("rms_norm", RMS_NORM, case="1x64", architecture="sm_80")
    assert trial.verified.errors.keys() == {
        f"{dtype}-1x64{residual}"
        for dtype in ("float32", "float16", "bfloat16")
        for residual in ("", "-residual")
    }
    assert trial.verified.num_live is None
    (report,) = trial.resources
    assert (report.architecture, report.block_threads) == ("sm_80", 128)
    assert 0 < report.resources.registers <= 255
    assert trial.counted is not None and trial.counted.new == trial.counted.current
    assert (trial.benched, trial.swapped) == (None, None)
    assert trial.notes == (
        "verified on the op's grid alone: no engine is loaded",
        "no GPU here: not timed, because the emulator's time says nothing about a GPU's",
    )
    for shown in (str(trial), trial._repr_html_()):
        assert "agrees with the reference on 6 calls" in shown
        assert "no GPU here" in shown
        assert "occupancy" in shown
        assert "sectors read" in shown


def test_a_case_is_chosen_by_whole_parts_of_its_name() -> None:
    def names(part: str | None) -> list[str]:
        return [case.name for case in OPS["rms_norm"].cases_named(part)]

    assert names("float32-1x64") == ["float32-1x64", "float32-1x64-residual"]
    assert names("1x64-residual") == [
        f"{dtype}-1x64-residual" for dtype in ("float32", "float16", "bfloat16")
    ]
    assert names("float16") and not [n for n in names("float16") if n.startswith("bfloat16")]
    assert len(names("float32")) + len(names("float16")) + len(names("bfloat16")) == len(
        names(None)
    )
    for part in ("float3", "x64", "residua", ""):
        with pytest.raises(InvalidField, match="has this as a part between the dashes"):
            names(part)


OTHERS = """
template <typename T, int kSize, int kLanes, int kRows, bool kResidual>
__global__ void rms_norm({}) {{}}
"""


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ("T* out, const T* x", "takes 2 arguments (float* out, float* x), not 9"),
        (
            "T* a, T* b, T* c, float* d, int e, int f, long long g, long long h, int eps",
            "eps is of type int, not a float (1e-05)",
        ),
    ],
)
def test_a_kernel_with_other_parameters_is_told_which_are_given(
    parameters: str, problem: str
) -> None:
    other = OTHERS.format(parameters)
    wanted = (
        "A kernel in the place of rms_norm is given 9: float* out, float* x, float* residual, "
        "float* weight, int num_rows, int num_sets, long long x_stride, long long out_stride, "
        "float eps"
    )
    tried = (
        lambda: try_kernel("rms_norm", other, case="float32-1x64"),
        lambda: verify("rms_norm", other, OPS["rms_norm"].cases_named("float32-1x64")),
    )
    for attempt in tried:
        with pytest.raises(LaunchError) as raised:
            attempt()
        assert str(raised.value).endswith(f"{problem}. {wanted}")


def test_counters_tell_two_kernels_apart_by_what_they_ask_of_the_memory() -> None:
    arguments = arguments_of("rms_norm", "float32-1x64")
    new = counters(OPS["rms_norm"], Source.of_op("rms_norm.cu"), arguments)
    # 64 floats of x and of the weight, by 16 lanes of 16 bytes, in sectors of 32; 64 of out.
    assert (new.global_reads, new.sectors_read, new.sectors_written) == (2, 16, 8)
    twice = RMS_NORM.replace(
        "nb::store_floats(out + at",
        "nb::store_floats(out + at, weights[i]);\n nb::store_floats(out + at",
    )
    again = counters(OPS["rms_norm"], Source(twice, "twice.cu"), arguments)
    assert (again.sectors_read, again.sectors_written) == (16, 16)


def test_a_wrong_kernel_is_refused_with_its_first_wrong_element() -> None:
    with pytest.raises(Mismatch, match=r"rms_norm float32-1x64: out\[0, 0\]"):
        try_kernel("rms_norm", WRONG, case="float32-1x64")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"case": "no such"}, "no call of rms_norm has this .*; there are float32-1x64"),
        ({"architecture": "sm_12"}, "NVRTC compiles for sm_"),
        ({"swap": True}, "nothing to swap it into: no engine is loaded"),
    ],
)
def test_what_can_not_be_done_is_refused_before_anything_is(
    fields: dict[str, object], problem: str
) -> None:
    with pytest.raises(InvalidField, match=problem):
        try_kernel("rms_norm", WRONG, **fields)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- with an engine


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel_trial")
    save_reference("served-llama", folder)
    return folder / "served-llama"


def engine_of(model: Path, kernels: str) -> Engine:
    return Engine(
        model=model,
        kernels=kernels,
        device="cuda" if kernels == "cuda" else "cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        num_gpu_blocks_override=16,
    )


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    """Emulated, with a request under way."""
    with engine_of(model, "emulated") as engine:
        engine.add_request([5, 6, 7, 8], GREEDY)
        engine.step(2)
        yield engine


def test_a_kernel_agrees_on_live_tensors_goes_in_and_the_requests_go_on(
    engine: Engine, model: Path
) -> None:
    trial = try_kernel("gated_mlp", (CUDA_ROOT / "gated_mlp.cu").read_text(), engine, swap=True)
    assert trial.verified.num_live == 2
    assert trial.call == "the engine's batch"
    assert trial.swapped is not None and trial.swapped.before.is_own
    assert source_now("gated_mlp", engine) is trial.source
    assert "swapped in" in str(trial) and "swapped in" in trial._repr_html_()
    engine.run()
    with engine_of(model, "torch") as plain:
        plain.add_request([5, 6, 7, 8], GREEDY)
        plain.run()
        expected = plain.output("req-0").outputs[0].token_ids
    assert engine.output("req-0").outputs[0].token_ids == expected


def test_a_swap_tells_what_it_does_on_whichever_thread(engine: Engine) -> None:
    told: list[str] = []
    with progress_to(told.append):
        engine.kernels.swap("rms_norm", RMS_NORM)
    once = list(dict.fromkeys(words.partition(";")[0] for words in told))
    num_calls = len(list(OPS["rms_norm"].cases()))
    assert once == [
        *(
            f"verifying rms_norm on its grid: {n} of {num_calls} calls"
            for n in range(1, num_calls + 1)
        ),
        "waiting for the engine's step to end",
        "looking at a step of the engine's batch",
        "verifying rms_norm on live tensors: call 1",
        "verifying rms_norm on live tensors: call 2",
    ]
    assert "compiling rms_norm<float, 64, 16, 8, true>" in " ".join(told)


def test_a_trial_tells_what_it_compiles_and_that_it_counts(engine: Engine) -> None:
    told: list[str] = []
    fresh = f"{RMS_NORM}// {torch.rand(1).item()}\n"  # which no cache knows
    with progress_to(told.append):
        try_kernel("rms_norm", fresh, engine, case="float32-1x64", architecture="sm_80")
    assert "compiling rms_norm<float, 64, 16, 8, true> for sm_80" in " ".join(told)
    assert "counting what it reads and writes" in told


def test_what_is_wrong_on_the_live_cache_alone_stays_out(engine: Engine) -> None:
    """It is right for every call of the grid: none has the eps of the model."""
    wrong = RMS_NORM.replace("scale * weights", "(eps == 2e-5f ? 2.0f : 1.0f) * scale * weights")
    for layer in engine.model.layers:
        layer.post_attention_norm.eps = 2e-5
    with pytest.raises(Mismatch, match="live call"):
        try_kernel("rms_norm", wrong, engine, swap=True)
    assert engine.kernels.implementation("rms_norm").is_own
    engine.run()


def test_a_swap_wants_the_whole_grid(engine: Engine) -> None:
    with pytest.raises(InvalidField, match="must agree on the whole grid"):
        try_kernel("rms_norm", RMS_NORM, engine, swap=True, case="1x64")


def test_an_engine_without_ops_is_said_to_have_none(model: Path) -> None:
    with engine_of(model, "torch") as plain:
        trial = try_kernel("rms_norm", RMS_NORM, plain, case="float32-1x64", emulate=True)
        with pytest.raises(InvalidField) as refused:
            try_kernel("rms_norm", RMS_NORM, plain, swap=True)
    assert trial.notes[0].startswith("verified on the op's grid alone: this engine has no ops")
    assert "there is nothing to swap it into: this engine has no ops" in str(refused.value)
    assert "verified" not in str(refused.value), "nothing was"
    for said in (trial.notes[0], str(refused.value)):
        assert "Engine(..., kernels='emulated')" in said
        assert f"%nb_load {model} --kernels emulated" in said


def test_ptx_and_code_are_of_what_runs_the_op_now(engine: Engine) -> None:
    (own,) = compiled_now("rms_norm", engine, architecture="sm_80")
    # Rows of 64 floats are 16 packs; 8 rows share a block, and the last call has a residual.
    assert own.expression == "rms_norm<float, 64, 16, 8, true>"
    (of_grid,) = compiled_now("rms_norm", engine, case="bfloat16-2x4096-residual")
    assert of_grid.expression == "rms_norm<__nv_bfloat16, 4096, 512, 1, true>"
    assert ".target sm_80" in own.ptx


def test_what_is_no_cuda_c_has_no_source(engine: Engine) -> None:
    engine.kernels.swap("rms_norm", "reference")
    with pytest.raises(InvalidField, match="has no CUDA C"):
        source_now("rms_norm", engine)


def test_a_shape_that_does_not_fit_the_memory_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine holds most of a GPU's memory."""
    timing = Timing(2e-6, 2e-6, 2e-6, 11)

    def measured(
        new: Implementation, current: Implementation, case: Case, *_: object
    ) -> Measurement:
        if case.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measurement(case.name, Cost(10**6, 0), 1e-6, "memory", 2, timing, timing)

    roofs = Roofline("a device", "1", 1e12, 1e12, 1e14, "a reader")
    monkeypatch.setattr(kernel_trial, "measure", measured)
    monkeypatch.setattr(kernel_trial, "roofline", lambda device: roofs)
    monkeypatch.setattr(kernel_trial, "collect", lambda: None)
    own = implement(OPS["rms_norm"], None, torch.device("cpu"))
    cases = [Case("the engine's batch", dict), Case("large", dict)]
    notes: list[str] = []
    benched = kernel_trial._benched(own, own, cases, torch.device("cpu"), notes)
    assert benched is not None
    assert [(row.case, row.of_roofline, row.speedup) for row in benched.rows] == [
        ("the engine's batch", 0.5, 1.0)
    ]
    assert notes == ["large was not timed: it does not fit the memory that is free"]


def test_without_a_roofline_nothing_is_timed_and_a_note_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(device: torch.device) -> Roofline:
        raise NotEnoughMemory("a device has 100 MiB free")

    monkeypatch.setattr(kernel_trial, "roofline", full)
    own = implement(OPS["rms_norm"], None, torch.device("cpu"))
    notes: list[str] = []
    assert kernel_trial._benched(own, own, [], torch.device("cpu"), notes) is None
    assert "100 MiB free" in notes[0]


@needs_gpu
class TestOnAGpu:
    def test_it_is_timed_against_the_current_version_and_the_roofline(self, model: Path) -> None:
        with engine_of(model, "cuda") as engine:
            engine.add_request([5, 6, 7, 8], GREEDY)
            engine.step(2)
            trial = try_kernel("rms_norm", RMS_NORM, engine, swap=True)
            assert trial.benched is not None and trial.benched.current is not None
            assert trial.benched.rows[0].case == "the engine's batch"
            assert all(row.of_roofline > 0 and row.speedup for row in trial.benched.rows)
            assert trial.swapped is not None
            engine.run()

    def test_emulated_it_is_checked_on_the_cpu(self) -> None:
        racy = RMS_NORM.replace("sum = nb::warp_reduce<nb::Sum, kLanes>(sum, nb::Sum());", "")
        with pytest.raises(Mismatch):
            try_kernel("rms_norm", racy, case="float32-1x64", emulate=True)
        trial = try_kernel("rms_norm", RMS_NORM, case="float32-1x64", emulate=True)
        assert trial.benched is None
        assert trial.counted is not None
