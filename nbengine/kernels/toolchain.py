"""NVIDIA's headers, which NVRTC and the emulator both compile: where they are, and which they are.

They come as Python packages, or with an installed toolkit. NVIDIA's own finder is asked first; it is
no package for every system that the emulator runs on, and there the header packages may be alone.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nbengine.errors import NbengineError


class ToolchainMissing(NbengineError, ImportError):
    """NVRTC, cuda-python or NVIDIA's headers are not installed."""


@functools.cache
def nvidia_headers() -> tuple[Path, ...]:
    """The folders of cuda_fp16.h and its like, and of the C++ library. Raises `ToolchainMissing`."""
    candidates, found = list(_candidates()), []
    for header in ("cuda_fp16.h", "nv/target"):
        folder = next((folder for folder in candidates if (folder / header).is_file()), None)
        if folder is None:
            raise ToolchainMissing(
                f"compiling CUDA C, emulated too, needs NVIDIA's headers, and there is no {header}: "
                "pip install nvidia-cuda-runtime nvidia-cuda-cccl (neither GPU nor driver is needed)"
            )
        found.append(folder)
    return tuple(dict.fromkeys(found))


@functools.cache
def headers_identity() -> bytes:
    """Changes when another version of the headers is installed, in their place too."""
    digest = hashlib.sha256()
    for folder in nvidia_headers():
        files = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in os.scandir(folder))
        digest.update(repr((str(folder), files)).encode())
    return digest.digest()


def _candidates() -> Iterator[Path]:
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = [find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
        yield from (Path(folder) for folder in found if folder)
    except (ImportError, RuntimeError):  # not installed, or older than 1.3
        pass
    for kind in ("purelib", "platlib"):
        packages = Path(sysconfig.get_paths()[kind]) / "nvidia"
        for folder in sorted(packages.glob("*/include"), reverse=True):
            yield from (folder, folder / "cccl")
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            yield from (Path(root) / "include", Path(root) / "include" / "cccl")
