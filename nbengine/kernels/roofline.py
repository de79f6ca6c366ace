"""`roofline`: what this device can do at most, measured.

Reading bandwidth, copying bandwidth and the rate of bfloat16 matrix products, each by the fastest
way at hand. A call's floor is the larger of its bytes over the first and its operations over the
last; `bench` says which fraction of that a kernel reaches.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nbengine import kernels
from nbengine.disk_cache import cache_folder, made_whole
from nbengine.errors import NotEnoughMemory
from nbengine.kernels.display import table_html
from nbengine.kernels.op import Cost
from nbengine.kernels.source import Source
from nbengine.kernels.timing import Replay, collect, gpu, time_alternately
from nbengine.progress import doing

BUFFER_BYTES = 4 << 30
MATRIX = 8192


@dataclass(frozen=True, slots=True, repr=False)
class Roofline:
    """A device's ceilings, in bytes and operations a second."""

    device: str
    driver: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    """Bytes read plus bytes written, of a device-to-device copy."""
    matrix_flops_per_s: float
    """bfloat16 products with float32 sums."""
    read_by: str
    """What reached the reading bandwidth."""

    def floor_s(self, cost: Cost) -> float:
        """No version takes much less."""
        return max(cost.bytes_moved / self.read_bytes_per_s, cost.flops / self.matrix_flops_per_s)

    def bound(self, cost: Cost) -> str:
        """What the floor comes from: "memory" or "matrix"."""
        reading = cost.bytes_moved / self.read_bytes_per_s
        return "memory" if reading >= cost.flops / self.matrix_flops_per_s else "matrix"

    def _rows(self) -> list[tuple[str, str]]:
        return [
            ("reading", f"{self.read_bytes_per_s / 1e9:,.0f} GB/s ({self.read_by})"),
            ("copying", f"{self.copy_bytes_per_s / 1e9:,.0f} GB/s, reads plus writes"),
            ("bfloat16 products", f"{self.matrix_flops_per_s / 1e12:,.0f} TFLOP/s"),
        ]

    def __repr__(self) -> str:
        title = f"{self.device}, driver {self.driver}"
        return "\n".join([title, *(f"  {name:<18} {value}" for name, value in self._rows())])

    def _repr_html_(self) -> str:
        return table_html((self.device, f"driver {self.driver}"), self._rows())


def _published(device: str, gigabytes: float, teraflops: float) -> Roofline:
    read = gigabytes * 1e9
    return Roofline(device, "", read, read, teraflops * 1e12, "NVIDIA's data sheet")


PUBLISHED = {
    "H200": _published("NVIDIA H200 SXM", 4800, 989.4),
    "H100": _published("NVIDIA H100 SXM", 3350, 989.4),
    "A100": _published("NVIDIA A100 SXM 80 GB", 2039, 312),
    "L4": _published("NVIDIA L4", 300, 121),
    "RTX4090": _published("NVIDIA GeForce RTX 4090", 1008, 165.2),
}
"""What data sheets say of GPUs that are not here: dense bfloat16 products with float32 sums, and the
memory's bandwidth. No kernel reaches all of either."""

_measured: dict[tuple[str, str], Roofline] = {}


def roofline(device: torch.device | str | None = None, *, refresh: bool = False) -> Roofline:
    """The device's ceilings: measured once (a few seconds, 8 GiB of device memory at most) and kept
    on disk for this device and driver; `refresh` measures again.

    Raises:
        NeedsGpu: there is none.
    """
    device = gpu(device)
    name, driver = torch.cuda.get_device_name(device), driver_version()
    key = (name, driver)
    path = _cache_path(name, driver)
    if key not in _measured and not refresh:
        stored = _stored(path)
        if stored is not None:
            _measured[key] = stored
    if key not in _measured or refresh:
        with doing(f"measuring what {name} reads and multiplies in a second"):
            _measured[key] = _measure(device, name, driver)
        with made_whole(path) as whole:
            whole.write_text(json.dumps(dataclasses.asdict(_measured[key])))
    return _measured[key]


def driver_version() -> str:
    """NVIDIA's driver, as nvidia-smi names it; "unknown" without its library."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    text = ctypes.create_string_buffer(96)
    nvml.nvmlInit_v2()
    failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
    nvml.nvmlShutdown()
    return "unknown" if failed else text.value.decode()


def _cache_path(name: str, driver: str) -> Path:
    title = re.sub(r"[^\w.]+", "-", f"{name} {driver}")
    return cache_folder("roofline") / f"{title}.json"


def _stored(path: Path) -> Roofline | None:
    """None too if the file is of another version, or not whole."""
    try:
        return Roofline(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _measure(device: torch.device, name: str, driver: str) -> Roofline:
    read_by, reading, copying = _bandwidths(device, name)
    collect()
    matrix = _matrix_rate(device)
    collect()
    return Roofline(name, driver, reading, copying, matrix, read_by)


def _bandwidths(device: torch.device, name: str) -> tuple[str, float, float]:
    """What reads fastest, its bytes a second, and a copy's."""
    free, _ = torch.cuda.mem_get_info(device)
    size = min(BUFFER_BYTES, free // 4) >> 26 << 26  # whole tiles of every reader
    if size < 1 << 28:
        raise NotEnoughMemory(
            f"{name} has {free >> 20} MiB free: too few to measure its bandwidth on buffers several "
            "times as large as its L2, for which 1 GiB is the least. Close what else uses it"
        )
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    readers = _readers(source, device)
    *reading, copying = _medians(device, *readers.values(), lambda: target.copy_(source))
    seconds, read_by = min(zip(reading, readers, strict=True))
    return read_by, size / seconds, 2 * size / copying


def _matrix_rate(device: torch.device) -> float:
    a, b, out = (
        torch.empty(MATRIX, MATRIX, dtype=torch.bfloat16, device=device).normal_() for _ in range(3)
    )
    (seconds,) = _medians(device, lambda: torch.matmul(a, b, out=out))
    return 2 * MATRIX**3 / seconds


def _readers(source: Tensor, device: torch.device) -> dict[str, Callable[[], object]]:
    """Ways to read all of `source`, by name."""
    program = kernels.program(Source.of_op("read_bandwidth.cu"), device=device)
    words = source.view(torch.int32)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    readers: dict[str, Callable[[], object]] = {
        "torch.sum": lambda: torch.sum(source, dtype=torch.float32)
    }
    for threads, loads in ((256, 8), (512, 8), (1024, 4)):
        kernel = program.kernel("read_bandwidth", threads, loads)
        num_tiles = words.numel() // (threads * loads * 4)
        for blocks in (num_sms * 2048 // threads, num_tiles):
            sinks = torch.empty(blocks * threads // 32, dtype=torch.int32, device=device)
            launch = kernel[blocks, threads]
            readers[f"{kernel.name}, {blocks:,} blocks"] = functools.partial(
                launch, words, sinks, words.numel()
            )
    return readers


def _medians(device: torch.device, *calls: Callable[[], object]) -> list[float]:
    replays = [Replay(lambda call=call: call(), [{}], device) for call in calls]
    return [timing.median_s for timing in time_alternately(replays)]
