"""The cache directory: files appear whole, the unused go first, and other processes do not matter."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbengine.disk_cache import cache_folder, drop_oldest, made_whole, mark_used


def test_the_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("cubin") == tmp_path / "nbengine" / "cubin"
    assert cache_folder() == tmp_path / "nbengine"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("cubin") == tmp_path / ".cache" / "nbengine" / "cubin"


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "kernel.so"
    with made_whole(target) as path:
        path.write_text("half")
        assert not target.exists()
        path.with_name("beside.o").write_text("left behind")
        path.write_text("whole")
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "kernel.so"
    target.write_text("the one before")
    with pytest.raises(KeyError), made_whole(target) as path:
        path.write_text("half")
        raise KeyError
    assert target.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [target]


def test_those_not_used_for_longest_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new.so", "middle.so", "old.so", "old.txt")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    mark_used(tmp_path / "old.so")
    drop_oldest(tmp_path, "*.so", 299)
    assert {path.name for path in tmp_path.iterdir()} == {"old.so", "new.so", "old.txt"}
    drop_oldest(tmp_path, "*.so", 200)
    assert len(list(tmp_path.iterdir())) == 3
    drop_oldest(tmp_path, "*.so", 0)
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_a_file_that_another_process_drops_between_two_looks_is_no_error(tmp_path: Path) -> None:
    gone = tmp_path / "gone.so"
    gone.symlink_to(tmp_path / "nowhere")  # listed, and not found
    (tmp_path / "kept.so").write_bytes(bytes(100))
    drop_oldest(tmp_path, "*.so", 100)
    mark_used(gone)
    assert (tmp_path / "kept.so").exists()


def test_many_make_and_drop_the_same_files_at_once(tmp_path: Path) -> None:
    def live(worker: int) -> None:
        for turn in range(100):
            with made_whole(tmp_path / f"{(worker + turn) % 5}.so") as path:
                path.write_bytes(bytes(100))
            mark_used(tmp_path / f"{turn % 5}.so")
            drop_oldest(tmp_path, "*.so", 250)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(8)))
    assert len(list(tmp_path.iterdir())) <= 2
