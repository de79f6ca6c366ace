"""Capturing CUDA graphs in a process whose other threads use the device too.

While a stream is being captured, a wait for the whole device is an error on any thread, and the
capture is lost (CUDA C++ Programming Guide, "Prohibited and Unhandled Operations"); so it is when a
graph is destroyed, and torch's allocator gives nothing back meanwhile. So captures, waits for the
device and the return of memory take turns.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

_turn = threading.RLock()
_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
"""Those that somebody may replay."""
_of_thread = threading.local()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which this thread warms up and captures: for each, cuBLAS keeps a workspace."""
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


@contextlib.contextmanager
def captured(stream: torch.cuda.Stream, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """What this thread launches inside is captured into the graph. Raises what is raised inside, and
    torch's errors for what can't be captured. Let go of no graph inside."""
    graph = torch.cuda.CUDAGraph()
    with _turn, torch.cuda.device(stream.device), _without_collector():
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                yield graph
        except BaseException:
            # What torch leaves undone where it can't end the capture, up to version 2.11.
            torch.cuda.set_stream(current)
            with contextlib.suppress(RuntimeError):
                index = torch.cuda.current_device()
                torch._C._cuda_endAllocateToPool(index, pool)
                torch._C._cuda_releasePool(index, pool)
            raise
        _graphs.add(graph)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """It might find the graphs of an engine that was dropped."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def wait_for_device(device: torch.device) -> None:
    """Until all that was launched on it has ended."""
    with _turn:
        torch.cuda.synchronize(device)


def give_back_memory() -> None:
    """What torch keeps of memory that nobody holds, on the devices and pinned on the host; and
    cuBLAS's workspaces, unless there are graphs, which hold their addresses."""
    with _turn:
        if not _graphs:
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
