"""Captures beside other threads, and captures that fail."""

from __future__ import annotations

import threading

import pytest
import torch

from nbengine.kernels.capture import captured, give_back_memory, wait_for_device
from tests.gpu import needs_gpu


@needs_gpu
def test_another_threads_waits_for_the_device_do_not_end_a_capture() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, stop = torch.zeros(1000, device=device), threading.Event()

    def wait() -> None:
        while not stop.is_set():
            wait_for_device(device)

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        stream = torch.cuda.Stream(device)
        graphs = []  # one that goes ends the next capture
        for _ in range(20):
            with captured(stream) as graph:
                for _ in range(100):
                    x += 1
            graphs.append(graph)
            graph.replay()
    finally:
        stop.set()
        waiting.join()
    assert x.tolist() == [2000.0] * 1000


@needs_gpu
def test_a_capture_that_fails_leaves_the_stream_and_the_next_capture_as_they_were() -> None:
    x = torch.zeros(10, device="cuda")
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    with pytest.raises(RuntimeError), captured(stream):
        x.sum().item()  # waits
    assert torch.cuda.current_stream() == before
    give_back_memory()
    with captured(stream) as graph:
        x += 1
    graph.replay()
    assert x.tolist() == [1.0] * 10
    assert torch.rand(3, device="cuda").isfinite().all()


@needs_gpu
def test_what_is_raised_inside_comes_out() -> None:
    with pytest.raises(KeyError), captured(torch.cuda.Stream()):
        raise KeyError
