"""What is made once and kept in the user's cache directory: compiled kernels, models, figures.

Several processes make, use and delete the same files at once. So a file appears whole or not at
all, what another process made meanwhile is as good, and what another deleted is no error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder(name: str = "") -> Path:
    """`nbengine/name` in `$XDG_CACHE_HOME`, or in ~/.cache. It need not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "nbengine" / name


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Gives a path to write to, alone in a scratch folder beside `target`; what was written there
    becomes `target` when the block ends without an exception. Raises `OSError` where the folder
    can't be written to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        path = Path(scratch) / target.name
        yield path
        path.replace(target)


def mark_used(path: Path) -> None:
    """Files that were not used for the longest are dropped first."""
    with contextlib.suppress(OSError):  # of another user, or dropped this moment
        os.utime(path)


def drop_oldest(folder: Path, pattern: str, max_bytes: int) -> None:
    """Delete the files of `pattern` that were not used for the longest, as far as all of them take
    more than `max_bytes`."""
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process dropped it
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)
