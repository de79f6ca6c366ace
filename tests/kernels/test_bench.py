"""`bench` and `roofline`: what they make of times and bytes, and what they say without a GPU. On a
GPU, one small measurement of each."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from nbengine.kernels import roofline as roofline_module
from nbengine.kernels import timing
from nbengine.kernels.bench import Benched, Measurement
from nbengine.kernels.lab import NeedsGpu, Timing, bench, roofline
from nbengine.kernels.op import Cost
from nbengine.kernels.ops import OPS
from nbengine.kernels.roofline import Roofline
from nbengine.kernels.timing import duration, num_sets, time_alternately
from tests.gpu import needs_gpu

MIB = 1 << 20
GPU = Roofline("A GPU", "580.1", 4e12, 3.5e12, 800e12, "read_bandwidth<512, 8>")


def test_without_a_gpu_a_measurement_says_that_it_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for measure in (lambda: bench("rms_norm"), roofline):
        with pytest.raises(NeedsGpu, match="torch sees none here"):
            measure()
    with pytest.raises(NeedsGpu, match="cpu is none"):
        bench("rms_norm", device="cpu")


def test_a_floor_is_the_larger_of_bytes_and_operations():
    reading = Cost(bytes_moved=8 * 10**9, flops=10**12)  # 2 ms and 1.25 ms
    product = Cost(bytes_moved=10**9, flops=4 * 10**12)  # 0.25 ms and 5 ms
    assert (GPU.floor_s(reading), GPU.bound(reading)) == (2e-3, "memory")
    assert (GPU.floor_s(product), GPU.bound(product)) == (5e-3, "matrix")
    assert "4,000 GB/s" in repr(GPU) and "800 TFLOP/s" in GPU._repr_html_()


def test_a_timing_has_the_median_and_the_deciles_of_its_samples():
    samples = [float(i) for i in range(11)]
    assert Timing.of(samples) == Timing(5.0, 1.0, 9.0, 11)


def test_a_measurement_is_set_against_roofline_and_current_version():
    cost = Cost(8 * 10**9, 10**12)
    new, old = Timing(2.5e-3, 2.4e-3, 2.65e-3, 11), Timing(5e-3, 5e-3, 5e-3, 11)
    row = Measurement("case", cost, GPU.floor_s(cost), GPU.bound(cost), 2, new, old)
    assert row.bytes_per_s == pytest.approx(3.2e12)
    assert row.flops_per_s == pytest.approx(400e12)
    assert row.of_roofline == pytest.approx(0.8)
    assert row.speedup == pytest.approx(2)
    result = Benched("op", "new.cu (CUDA C)", "old.cu (CUDA C)", GPU, (row,))
    line = " ".join(repr(result).splitlines()[-1].split())
    assert line == "case 2.50 ms 10.0% 3,200 400 80.0% memory 5.00 ms 2.00"
    assert "new.cu" in result._repr_html_() and "80.0%" in result._repr_html_()


def test_durations_have_three_digits_and_a_unit():
    given = (1.5, 0.0123, 123.4e-6, 9.876e-6, 0.5e-6)
    assert [duration(s) for s in given] == ["1.50 s", "12.3 ms", "123 µs", "9.88 µs", "0.500 µs"]


def test_sets_of_arguments_touch_twice_the_l2_in_all():
    l2, free = 50 * MIB, 10_000 * MIB
    assert num_sets(10 * MIB, 10 * MIB, l2, free) == 10
    assert num_sets(500 * MIB, 500 * MIB, l2, free) == 2, "one alone would find its own end in L2"
    assert num_sets(1024, 1024, l2, free) == timing.MAX_SETS
    assert num_sets(1 * MIB, 1000 * MIB, l2, free) == 5, "half of what is free, at most"
    assert num_sets(500 * MIB, 8_000 * MIB, l2, free) == 1
    assert num_sets(0, 0, l2, free) == timing.MAX_SETS


class Scripted:
    """A version whose calls take these times, the last one over and over."""

    num_calls = 100

    def __init__(self, name, log, *seconds):
        self.name, self.log, self.times = name, log, list(seconds)

    def seconds(self):
        self.log.append(self.name)
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


def test_versions_are_timed_in_turns_and_the_warm_up_is_not_counted():
    log = []
    a, b = Scripted("a", log, 1.0, 2e-5), Scripted("b", log, 5e-5)
    first, second = time_alternately([a, b])
    assert (first.median_s, second.median_s) == (2e-5, 5e-5)
    assert log == ["a", "b"] * (len(log) // 2)
    low, high = timing.SAMPLES
    assert low <= first.num_samples == second.num_samples <= high
    assert len(log) > 2 * first.num_samples


def test_a_stored_roofline_is_read_and_a_broken_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = roofline_module._cache_path("NVIDIA H200", "580.159.03")
    assert path == tmp_path / "nbengine" / "roofline" / "NVIDIA-H200-580.159.03.json"
    assert roofline_module._stored(path) is None
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"device": "A GPU"}))
    assert roofline_module._stored(path) is None
    monkeypatch.setattr(roofline_module, "_measured", {})
    monkeypatch.setattr(roofline_module, "gpu", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(roofline_module, "driver_version", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    measured = []
    monkeypatch.setattr(roofline_module, "_measure", lambda *a: measured.append(a) or GPU)
    assert roofline() == GPU and roofline() == GPU and len(measured) == 1
    roofline_module._measured.clear()  # as in another process
    assert roofline() == GPU and len(measured) == 1
    assert roofline(refresh=True) == GPU and len(measured) == 2


@needs_gpu
def test_a_small_norm_is_measured_in_turns_with_the_reference():
    case = next(iter(OPS["rms_norm"].cases()))
    result = bench("rms_norm", "reference", [case])
    (row,) = result.rows
    assert row.num_sets > 1 and row.timing.median_s > 0
    assert row.current is not None and row.current.median_s > 0
    assert row.of_roofline > 0


class FakeGpu:
    """Takes the place of torch.cuda's streams, graphs and events: a call lasts 50 µs."""

    def __init__(self, monkeypatch):
        self.now, self.calls, self.seen = 0.0, 0, set()
        gpu = self

        class Stream:
            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

            def synchronize(self):
                pass

        class Graph:
            def replay(self):
                gpu.now += 50e-6 * self.num_calls

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        @contextlib.contextmanager
        def captured(stream):
            graph, before = Graph(), gpu.calls
            yield graph
            graph.num_calls = gpu.calls - before

        for name, fake in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device: Stream(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "captured", captured)

    def call(self, index):
        self.calls += 1
        self.seen.add(index)


def test_a_graph_makes_whole_passes_over_the_sets_for_a_millisecond(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    replay = timing.Replay(gpu.call, [{"index": i} for i in range(6)], torch.device("cuda", 0))
    assert gpu.seen == set(range(6))
    assert replay.num_calls == 24, "20 calls of 50 µs, in whole passes over 6 sets"
    assert replay.seconds() == pytest.approx(50e-6)
    (timed,) = time_alternately([replay])
    assert timed.median_s == pytest.approx(50e-6)
