"""Capturing CUDA graphs in a process whose other threads use the device too.

While a stream is being captured, a wait for the whole device is an error on any thread, and the
capture is lost (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations"). torch begins
every capture with such a wait. So captures, and waits for the device, take turns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_turn = threading.RLock()
_lost: list[torch.cuda.CUDAGraph] = []
"""torch's allocator may go on asking these whether they are being captured."""


@contextlib.contextmanager
def captured(stream: torch.cuda.Stream, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """What this thread launches inside is captured into the graph. Raises what is raised inside, and
    torch's errors for what can't be captured."""
    graph = torch.cuda.CUDAGraph()
    with _turn, torch.cuda.device(stream.device):
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                yield graph
        except BaseException:
            _lost.append(graph)
            torch.cuda.set_stream(current)  # which torch does not do if ending the capture fails
            raise


def wait_for_device(device: torch.device) -> None:
    """Until all that was launched on it has ended."""
    with _turn:
        torch.cuda.synchronize(device)
