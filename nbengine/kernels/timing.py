"""How long a call takes on a GPU: CUDA events around replays of a captured graph.

A graph holds many calls on rotating sets of arguments, so that neither Python nor a single launch
is in the figure, and each call finds its arguments in device memory and not in the L2.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nbengine.errors import NbengineError
from nbengine.kernels.arguments import cloned, nbytes
from nbengine.kernels.capture import capture_stream, captured, give_back_memory
from nbengine.kernels.op import Arguments

MAX_SETS = 4096
REPLAY_S = 1e-3
"""What a replay takes at least: an event's own error is about a microsecond."""
WARM_UP_S = 0.1
SAMPLES = (11, 51)
"""At least and at most, each of one replay, ..."""
SAMPLING_S = 0.4
"""... within about this time for each version."""


class NeedsGpu(NbengineError, RuntimeError):
    """A measurement was asked for on a machine where torch sees no GPU."""


def gpu(device: torch.device | str | None = None) -> torch.device:
    """The device, or the current GPU, with its index. Raises `NeedsGpu`."""
    wanted = torch.device("cuda" if device is None else device)
    if wanted.type != "cuda" or not torch.cuda.is_available():
        why = f"{wanted} is none" if wanted.type != "cuda" else "torch sees none here"
        raise NeedsGpu(
            f"this measures on a GPU, and {why}. `verify` works without one; how long the emulator "
            "takes says nothing about a GPU"
        )
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    return torch.device("cuda", index)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call, over many samples."""

    median_s: float
    low_s: float
    """A tenth of the samples is below, ..."""
    high_s: float
    """... and a tenth above."""
    num_samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """`samples`: at least two."""
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(statistics.median(samples), deciles[0], deciles[-1], len(samples))

    def __str__(self) -> str:
        return f"{duration(self.median_s)} ({duration(self.low_s)} to {duration(self.high_s)})"


def duration(seconds: float) -> str:
    """3 digits, with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-7)):
        if seconds >= size:
            return f"{seconds / max(size, 1e-6):#.3g} {unit}".replace(". ", " ")
    return f"{seconds / 1e-9:#.3g} ns".replace(". ", " ")


def num_sets(bytes_moved: int, set_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """How many sets of arguments to rotate through: enough to touch twice the L2, never fewer than
    two, as memory allows (half of what is free; one where two do not fit)."""
    wanted = max(2, math.ceil(2 * l2_bytes / max(1, bytes_moved)))
    return max(1, min(wanted, MAX_SETS, free_bytes // 2 // max(1, set_bytes)))


def rotating(arguments: Arguments, bytes_moved: int, device: torch.device) -> list[Arguments]:
    """`arguments` and copies of it: see `num_sets`."""
    properties: Any = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    count = num_sets(bytes_moved, nbytes(arguments), properties.L2_cache_size, free)
    return [arguments, *(cloned(arguments) for _ in range(count - 1))]


class Timed(Protocol):
    """Something that can be timed once more."""

    def seconds(self) -> float:
        """Of one call, by one replay."""


class Replay:
    """A captured graph of calls on sets of arguments, all of which it keeps alive."""

    def __init__(
        self, call: Callable[..., None], sets: Sequence[Arguments], device: torch.device
    ) -> None:
        """Warm up on a side stream (kernels are compiled and loaded there), then capture as many
        passes over the sets as take `REPLAY_S`."""
        self._call, self._sets, self._device = call, sets, device
        self._stream = capture_stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            for arguments in [*sets[:3], sets[0]]:
                call(**arguments)
        self._stream.synchronize()
        self._capture(num_passes=1)
        self.seconds()
        once = self.seconds() * len(sets)
        if once < REPLAY_S:
            self._capture(min(math.ceil(REPLAY_S / once), max(1, MAX_SETS // len(sets))))

    def _capture(self, num_passes: int) -> None:
        self.num_calls = num_passes * len(self._sets)
        with captured(self._stream) as graph:
            for _ in range(num_passes):
                for arguments in self._sets:
                    self._call(**arguments)
        self._graph = graph  # no earlier: the one before goes, which would end the capture

    def seconds(self) -> float:
        """Of one call. A replay that is not timed goes first: the timed one is queued behind it, so
        that the time of submitting it is not in the figure, and the clock is up."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._graph.replay()
            start.record()
            self._graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.num_calls


def time_alternately(versions: Sequence[Timed]) -> list[Timing]:
    """Time each, in turns, so that what else happens to the device happens to all of them."""
    num_calls = [getattr(version, "num_calls", 1) for version in versions]

    def one_round() -> list[float]:
        return [version.seconds() for version in versions]

    first = one_round()
    # A sample is two replays.
    round_s = 2 * sum(map(lambda s, n: s * n, first, num_calls))
    for _ in range(min(200, math.ceil(WARM_UP_S / max(round_s, 1e-6)))):
        one_round()
    low, high = SAMPLES
    count = int(SAMPLING_S * len(versions) / max(round_s, 1e-6))
    rounds = [one_round() for _ in range(min(high, max(low, count)))]
    return [Timing.of(samples) for samples in zip(*rounds, strict=True)]


def collect() -> None:
    """Give the memory of dropped graphs and argument sets back to the device."""
    gc.collect()
    give_back_memory()
