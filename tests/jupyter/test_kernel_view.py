"""The kernel view's Python side: its still picture, its words, its widget's traits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from xml.dom import minidom

import pytest

from nbengine import Engine, SamplingParams
from nbengine.errors import InvalidField
from nbengine.jupyter import kernel_view
from nbengine.jupyter.block_map import PALETTE
from nbengine.jupyter.kernel_view import KernelView, phase_svg
from nbengine.kernels.watch import KernelTrace, watch
from tests.jupyter.conftest import Notebook
from tests.tiny_models import save_reference


@pytest.fixture(scope="module")
def trace() -> KernelTrace:
    return watch("paged_attention_decode")


WIDGET = "application/vnd.jupyter.widget-view+json"


def test_it_is_a_widget_a_picture_and_words_in_one_bundle(trace: KernelTrace) -> None:
    view = KernelView(trace)
    bundle = view._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == view._widget.model_id
    assert "data:image/svg+xml;base64," in bundle["text/html"]
    assert bundle["text/plain"] == str(trace)
    assert json.loads(view._widget.facts)["title"] == trace.title
    assert view._widget.accesses == trace.packed()


def test_without_the_notebook_extras_the_picture_stands_alone(
    trace: KernelTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_view, "_make_widget", lambda trace, phase: None)
    view = KernelView(trace, 0)
    view.phase = 2
    assert view.phase == 2
    bundle = view._repr_mimebundle_()
    assert WIDGET not in bundle
    assert "phase 3 of 4" in bundle["text/html"]


def test_a_view_that_was_closed_stands_still(trace: KernelTrace) -> None:
    view = KernelView(trace)
    view.phase = 3
    view.close()
    bundle = view._repr_mimebundle_()
    assert WIDGET not in bundle
    assert "</b>, phase 4 of 4</div>" in bundle["text/html"]


def test_it_begins_with_the_phase_that_reads_the_cache(trace: KernelTrace) -> None:
    assert KernelView(trace).phase == 1


def test_the_phase_is_the_pages_and_stays_within_the_trace(trace: KernelTrace) -> None:
    view = KernelView(trace)
    view._widget.phase = 3  # as the page sets it
    assert view.phase == 3
    view.phase = 0
    assert view._widget.phase == 0
    for phase in (-1, 4):
        with pytest.raises(InvalidField, match="phases 0 to 3"):
            view.phase = phase


def test_the_picture_has_the_blocks_that_are_touched_in_the_colours_of_their_warps(
    trace: KernelTrace,
) -> None:
    svg = minidom.parseString(phase_svg(trace, 1))
    panels = {
        group.getElementsByTagName("text")[0].firstChild.data: [
            path.getAttribute("fill") for path in group.getElementsByTagName("path")
        ]
        for group in svg.getElementsByTagName("g")
    }
    for warp, block in enumerate(trace.block_tables[0]):
        assert panels[f"k_cache, block {block}: from token {16 * warp} of sequence 0"] == [
            PALETTE[warp]
        ]
    assert not any("sequence 1" in title for title in panels), "no thread here reads its blocks"


def test_the_magic_watches_a_case_of_the_grid(notebook: Notebook) -> None:
    view = notebook.value("%nb_watch rms_norm --case float32-3x576 --block 2 --phase 1")
    assert isinstance(view, KernelView)
    assert view.trace.of == (2, 0, 0)
    assert view.trace.call == "float32-3x576"
    assert view.phase == 0
    assert "the grid of rms_norm" in notebook.run("%nb_watch rms_norm --block 1,2,3")
    assert "no index such as 2" in notebook.run("%nb_watch rms_norm --block x")
    assert "no engine is loaded" in notebook.run("%nb_watch rms_norm --live")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("kernel_view")
    save_reference("served-llama", folder)
    with Engine(
        model=folder / "served-llama",
        kernels="emulated",
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        num_gpu_blocks_override=16,
    ) as engine:
        yield engine


def test_an_engines_call_is_watched_with_the_engines_own_block_numbers(
    engine: Engine, notebook: Notebook
) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    engine.add_request([1], params, request_id="first")
    engine.step(2)
    engine.add_request(list(range(3, 37)), params, request_id="long")
    engine.step(3)
    engine.abort("first")  # so that the blocks that are held are not the first ones
    notebook.shell.push({"engine": engine})
    before = engine.snapshot()
    trace = notebook.value("%nb_watch paged_attention_decode --live").trace
    (sequence,) = before.running
    table = tuple(trace.name_of_block(block) for block in trace.block_tables[0])
    assert table == tuple(sequence.block_table[: len(table)])
    assert table != trace.block_tables[0], "renumbered for the call, and named back"
    assert len(table) == 3
    assert trace.call == "the engine's batch of 1"
    assert f"KV blocks {' '.join(map(str, table))}" in str(trace)
    assert engine.snapshot() == before
    engine.run()
