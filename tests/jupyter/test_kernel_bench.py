"""The magics for kernels, in a plain IPython shell in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbengine import Engine
from nbengine.kernel_trial import Trial
from nbengine.kernels.contract import Contract
from nbengine.kernels.ops import OPS
from nbengine.kernels.source import CUDA_ROOT
from tests.jupyter.conftest import Notebook
from tests.jupyter.scripted import ScriptedEngine
from tests.tiny_models import save_reference

MAGICS = ["nb_kernel", "nb_kernels", "nb_source", "nb_ptx", "nb_sass", "nb_restore", "nb_watch"]
RMS_NORM = (CUDA_ROOT / "rms_norm.cu").read_text()


@pytest.fixture(autouse=True)
def own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbengine.kernels.cell.cell_folder", lambda: tmp_path / "cells")


@pytest.mark.parametrize("name", MAGICS)
def test_every_magic_has_help_in_both_ways(notebook: Notebook, name: str) -> None:
    for text in (notebook.run(f"%{name} --help"), notebook.run(f"%{name}?")):
        assert f"%{name}" in text
        assert "options:" in text


def test_help_begins_with_how_the_magic_is_written(notebook: Notebook) -> None:
    assert notebook.run("%nb_kernel --help").startswith("%%nb_kernel [--swap]")
    assert notebook.run("%nb_kernels --help").startswith("%nb_kernels [--roofline]")
    shown = notebook.run("%nb_watch?")
    assert "::" not in shown and "<" not in shown
    assert "\n%nb_watch [--case PART]" in shown
    assert "\nWatch one CUDA block of an op's kernel" in shown


def test_an_option_that_there_is_not_is_answered_with_the_nearest(notebook: Notebook) -> None:
    said = notebook.run("%nb_kernel rms_norm --swp")
    assert said == "UsageError: unrecognized arguments: --swp (did you mean --swap?)\n"
    said = notebook.run("%nb_kernel rms_norm -swap=1 more --qqq")
    assert said.endswith("arguments: -swap=1 (did you mean --swap?) more --qqq\n")


def test_help_needs_no_body(notebook: Notebook) -> None:
    assert "--swap" in notebook.run("%%nb_kernel --help")
    assert "--swap" in notebook.run("%%nb_kernel --help\n  \n")


def test_ops_and_options_complete(notebook: Notebook) -> None:
    assert notebook.complete("%nb_source paged_attention_d") == ["paged_attention_decode"]
    assert notebook.complete("%%nb_kernel rms") == ["rms_norm"]
    assert "--emulate" in notebook.complete("%%nb_kernel rms_norm --em")
    assert notebook.complete("%nb_ptx rms_norm --arch sm_8") == ["sm_80", "sm_86", "sm_87", "sm_89"]


def test_a_cell_is_tried_and_its_trial_returned(notebook: Notebook) -> None:
    trial = notebook.value(f"%%nb_kernel rms_norm --case float32-1x64 --arch sm_86\n{RMS_NORM}")
    assert isinstance(trial, Trial)
    assert set(trial.verified.errors) == {"float32-1x64", "float32-1x64-residual"}
    assert trial.resources[0].architecture == "sm_86"
    assert trial.source.path is not None and trial.source.path.read_text().endswith(RMS_NORM)
    assert notebook.shell.user_ns["_"] is trial


@pytest.mark.parametrize("before", ["", "\n\n"])
def test_an_error_is_shown_at_its_line_of_the_cell(notebook: Notebook, before: str) -> None:
    cell = f"{before}%%nb_kernel rms_norm\n{RMS_NORM.replace('rsqrtf(', 'rsqrtg(')}"
    line = next(n for n, text in enumerate(cell.splitlines(), 1) if "rsqrtg" in text)
    printed = notebook.run(cell)
    assert not notebook.result.success
    assert f".cu:{line}:23: error: " in printed.replace("\x1b[31;1m", "").replace(
        "\x1b[1m", ""
    ).replace("\x1b[0m", "")
    assert f"{line} |   const float scale = rsqrtg(" in printed
    assert "Traceback" not in printed


def test_without_cuda_c_it_says_what_a_kernel_must_do(notebook: Notebook) -> None:
    contract = notebook.value("%nb_kernel rms_norm")
    assert isinstance(contract, Contract)
    for shown in (str(contract), contract._repr_html_()):
        assert "residual: Tensor | None = None" in shown
        assert "writes out, residual" in shown
        assert "agrees with the reference on 34 calls" in shown
        assert "__nv_bfloat16* out" in shown
        assert "residual += x" in shown
        assert "is launched, for the call bfloat16-1x64:" in shown
        assert "x: [1, 64] bfloat16" in shown
    assert (
        "  rms_norm<T=__nv_bfloat16, kSize=64, kLanes=8, kRows=16, kResidual=false>\n"
        "    with 1 block of 128 threads\n"
    ) in str(contract)


def test_the_call_that_a_contract_shows_can_be_chosen(notebook: Notebook) -> None:
    contract = notebook.value("%nb_kernel rms_norm --case float32-3x576")
    assert contract.call == "float32-3x576"
    assert "kSize=576, kLanes=160, kRows=1, kResidual=false>\n    with 3 blocks of" in str(contract)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_contract(notebook: Notebook, op: str) -> None:
    assert notebook.value(f"%nb_kernel {op}").launches


def test_the_current_source_can_be_put_into_a_cell(notebook: Notebook) -> None:
    notebook.run("%nb_kernel rms_norm --source")
    assert notebook.shell.rl_next_input == f"%%nb_kernel rms_norm\n{RMS_NORM.rstrip()}"


def test_sources_are_coloured_in_a_notebook_and_plain_elsewhere(notebook: Notebook) -> None:
    view = notebook.value("%nb_source rms_norm")
    assert str(view) == RMS_NORM
    html = view._repr_html_()
    assert "var(--jp-mirror-editor-keyword-color, " in html
    assert html.count("\n") == RMS_NORM.rstrip().count("\n"), "a line each"


def test_ptx_is_shown_for_the_architecture_that_is_asked_for(notebook: Notebook) -> None:
    view = notebook.value("%nb_ptx rms_norm --arch sm_80 --case float32-1x64")
    assert ".target sm_80" in str(view)
    assert "rms_norm<float, 64, 16, 8, false> for sm_80" in view.title


def test_machine_code_says_what_it_needs(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbengine.kernels.compiler.disassembly", lambda code: None)
    assert "pip install nvidia-cuda-nvdisasm" in notebook.run("%nb_sass rms_norm")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("%nb_kernel nope", "UnknownOp: there is no op 'nope' (did you mean 'rope'?)"),
        ("%%nb_kernel nope\nint a;", "UnknownOp: there is no op 'nope'"),
        ("%%nb_kernel rms_norm --swap\nint a;", "nothing to swap it into"),
        ("%nb_ptx rms_norm --case nope", "InvalidField: case='nope'"),
        ("%nb_restore rms_norm", "no engine is loaded"),
    ],
)
def test_a_users_mistake_is_one_message(notebook: Notebook, source: str, said: str) -> None:
    printed = notebook.run(source)
    assert said in printed
    assert "Traceback" not in printed
    assert not notebook.result.success


@pytest.fixture
def emulated(notebook: Notebook, tmp_path: Path) -> Iterator[Notebook]:
    """With an engine whose kernels can be swapped."""
    save_reference("served-llama", tmp_path)
    engine = Engine(
        model=tmp_path / "served-llama",
        kernels="emulated",
        device="cpu",
        skip_tokenizer_init=True,
        max_model_len=64,
        num_gpu_blocks_override=4,
    )
    notebook.shell.push({"engine": engine})
    yield notebook
    engine.close()


def test_restoring_one_op_shows_that_op_and_restoring_all_the_table(emulated: Notebook) -> None:
    engine = emulated.shell.user_ns["engine"]
    for op in ("rope", "rms_norm"):
        engine.kernels.swap(op, "reference")
    assert emulated.run("%nb_restore rope").endswith("rope: cuda/rope.cu (CUDA C, emulated)\n")
    assert not engine.kernels.implementation("rms_norm").is_own
    table = emulated.run("%nb_restore")
    assert engine.kernels.implementation("rms_norm").is_own
    assert all(op in table for op in OPS)
    assert "alternatives: further kernels of the op, which swap takes by name" in table


def test_an_engine_without_ops_says_how_to_get_one_with(
    notebook: Notebook, make_engine: Callable[..., ScriptedEngine]
) -> None:
    notebook.shell.push({"engine": make_engine()})
    for source in ("%nb_kernels", "%%nb_kernel rms_norm --swap\nint a;"):
        said = notebook.run(source)
        assert "this engine has no ops to look at or to swap" in said
        assert "%nb_load scripted --kernels emulated" in said
        assert said.count("\n") == 1


def test_without_an_engine_the_ops_are_listed_all_the_same(notebook: Notebook) -> None:
    found = notebook.value("%nb_kernels")
    assert [row.name for row in found.rows] == list(OPS)
    assert "no engine is loaded" in str(found)
    assert notebook.complete("%nb_kernels --gpu H") == ["H200", "H100"]
