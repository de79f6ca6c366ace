"""NVIDIA's headers: found with and without NVIDIA's finder, and told apart from another version."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbengine.kernels import Source, compiler, toolchain
from nbengine.kernels.emulator import build
from nbengine.kernels.toolchain import ToolchainMissing, headers_identity, nvidia_headers

REMEMBERED = nvidia_headers, headers_identity, build._made_from


def forget() -> None:
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """Where the two header packages put their files."""
    root = tmp_path / "nvidia" / "cu13" / "include"
    for header in ("cuda_fp16.h", "cccl/nv/target"):
        (root / header).parent.mkdir(parents=True)
        (root / header).write_text("// 13.0")
    return root


def test_without_nvidias_finder_the_header_packages_are_found(
    include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    paths = dict.fromkeys(("purelib", "platlib"), str(tmp_path))
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: paths)
    assert nvidia_headers() == (include, include / "cccl")


def test_where_there_are_no_headers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toolchain, "_candidates", lambda: iter(()))
    with pytest.raises(ToolchainMissing, match=r"no cuda_fp16\.h: pip install nvidia-cuda-runtime"):
        nvidia_headers()


@pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC has no build for macOS")
def test_headers_of_another_version_in_the_same_folder_make_other_entries_in_both_caches(
    include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_candidates", lambda: iter((include, include / "cccl")))
    source, keys = Source("__global__ void f() {}", "f.cu"), set()
    for time in (1, 2):
        os.utime(include / "cuda_fp16.h", (time, time))
        forget()
        keys |= {build._made_from(), compiler._key(source, "f", ())}
    assert len(keys) == 4
