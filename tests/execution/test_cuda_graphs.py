"""When a decode step is captured, replayed or launched kernel by kernel. The graphs here are made
up; what real ones compute is tested on a GPU (tests/test_engine_kernels.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nbengine.core.plan import StepPlan
from nbengine.execution import cuda_graphs
from nbengine.execution.batch import Batch
from nbengine.execution.cuda_graphs import DecodeGraphs
from nbengine.execution.kv_cache import KVCache
from nbengine.kernels.table import Kernels
from nbengine.models.kernel_layers import KernelLayers
from nbengine.models.registry import load_model
from tests.tiny_models import make_sequence, save_reference

BLOCK_SIZE = 8


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    """Writes what was computed when it was captured."""

    def __init__(self) -> None:
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Those that were made."""
    made: list[Graph] = []

    @contextlib.contextmanager
    def captured(stream: object, pool: object) -> Iterator[Graph]:
        graph = Graph()
        yield graph
        made.append(graph)

    monkeypatch.setattr(cuda_graphs, "captured", captured)
    monkeypatch.setattr(cuda_graphs, "capture_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return made


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("graphs")
    save_reference("served-llama", directory)
    return load_model(directory / "served-llama", dtype=torch.float32, for_kernels=True)


@pytest.fixture(params=["reference", "emulated"])
def graphs(request: pytest.FixtureRequest, decoder: Any, captures: list[Graph]) -> DecodeGraphs:
    kernels = Kernels("cpu", request.param)
    decoder.kernel_layers = KernelLayers(decoder, kernels)
    cache = KVCache.allocate(decoder.config, 16, BLOCK_SIZE, torch.float32, "cpu")
    cache.data.zero_()
    return DecodeGraphs(decoder, cache, 20, 300)


def decodes(graphs: DecodeGraphs, num_seqs: int, *, padded: bool = True) -> Batch:
    plan = StepPlan()
    for index in range(num_seqs):
        seq = make_sequence([index, index + 1], name=f"s{index}")
        seq.num_computed_tokens, seq.block_table = 1, [index]
        plan.scheduled.append((seq, 1))
    size = graphs.graph_size(num_seqs, 1) if padded else None
    return Batch.from_plan(plan, BLOCK_SIZE, padded_to=size)


def test_sizes_are_rounded_up_to_a_few(graphs: DecodeGraphs) -> None:
    rows = [graphs.graph_size(n, 1)[0] for n in (1, 2, 3, 5, 8, 9, 16, 17, 20)]
    assert rows == [1, 2, 4, 8, 8, 16, 16, 20, 20]
    columns = [graphs.graph_size(1, n)[1] for n in (1, 64, 65, 256, 257, 300)]
    assert columns == [64, 64, 256, 256, 300, 300]


def test_the_first_step_of_a_size_runs_and_is_captured_and_later_ones_are_replayed(
    graphs: DecodeGraphs, captures: list[Graph], decoder: Any
) -> None:
    alone = decodes(graphs, 3, padded=False)
    expected = decoder.compute_logits(decoder.forward(alone, graphs.kv_cache))
    written = graphs.kv_cache.data.clone()
    graphs.kv_cache.data.zero_()
    torch.testing.assert_close(graphs.logits(decodes(graphs, 3)), expected)
    assert torch.equal(graphs.kv_cache.data, written)  # padding rows have written nothing
    assert [graph.num_replays for graph in captures] == [0]
    assert graphs.logits(decodes(graphs, 4)).shape == (4, decoder.config.vocab_size)
    assert [graph.num_replays for graph in captures] == [1]
    graphs.logits(decodes(graphs, 5))
    assert [graph.num_replays for graph in captures] == [1, 0]


def test_the_largest_size_can_be_captured_before_there_are_sequences(
    graphs: DecodeGraphs, captures: list[Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Buffer:
        def host(self, num_elements: int) -> Any:
            self.data = torch.zeros(num_elements, dtype=torch.int64)
            return self.data.numpy()

        def upload(self, num_elements: int) -> torch.Tensor:
            return self.data

    before = graphs.kv_cache.data.clone()
    graphs.reserve(Buffer())  # type: ignore[arg-type]
    assert len(captures) == 1
    assert torch.equal(graphs.kv_cache.data, before)
    graphs.logits(Batch.from_plan(StepPlan(), BLOCK_SIZE, padded_to=graphs.graph_size(20, 300)))
    assert captures[0].num_replays == 1


def test_a_swapped_op_drops_the_graphs_and_python_is_not_captured(
    graphs: DecodeGraphs, captures: list[Graph], decoder: Any
) -> None:
    kernels = decoder.kernel_layers.kernels
    graphs.logits(decodes(graphs, 1))
    kernels.version += 1
    graphs.logits(decodes(graphs, 1))
    assert [graph.num_replays for graph in captures] == [0, 0]
    assert not graphs.is_usable  # torch's references are Python


def test_a_capture_that_fails_costs_no_step_and_after_a_few_no_more_are_tried(
    graphs: DecodeGraphs,
    captures: list[Graph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(type(graphs.decoder.kernel_layers.kernels), "is_capturable", True)  # type: ignore[union-attr]
    assert graphs.is_usable
    expected = graphs.logits(decodes(graphs, 2)).clone()

    @contextlib.contextmanager
    def lost(stream: object, pool: object) -> Iterator[Graph]:
        yield Graph()
        raise RuntimeError("the capture was ended by another thread")

    for num_failures, num_seqs in ((1, 3), (2, 5), (3, 9)):  # of three sizes
        with monkeypatch.context() as patch:
            patch.setattr(cuda_graphs, "captured", lost)
            assert graphs.is_usable
            torch.testing.assert_close(graphs.logits(decodes(graphs, num_seqs))[:2], expected)
        assert f"({num_failures} of 3 tries): the capture was ended" in caplog.text
        if num_failures < 3:  # the next one holds
            graphs.logits(decodes(graphs, num_seqs))
            graphs.logits(decodes(graphs, num_seqs))
            assert captures[-1].num_replays == 1
    assert not graphs.is_usable
    graphs.decoder.kernel_layers.kernels.version += 1  # type: ignore[union-attr]
    assert graphs.is_usable  # another implementation may fare better
