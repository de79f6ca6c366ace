"""`cell_source`: CUDA C that was typed into a cell, as a file that a debugger or profiler can open.

Compilers are given the file's path, so that the line information in the code (`-lineinfo`, `#line`)
leads Nsight and cuda-gdb to it; messages call it by its name alone. Its lines are numbered as they
stand in the cell. A text has one file, whose name says what it holds: to run a cell again compiles
nothing anew.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from nbengine.disk_cache import cache_folder, drop_oldest, made_whole, mark_used
from nbengine.kernels.source import Source

KEPT_BYTES = 16 * 2**20
"""Cells that were not run for the longest are deleted when all take more."""


def cell_source(op: str, text: str, first_line: int = 2, folder: Path | None = None) -> Source:
    """`text` as a source whose first line has the number `first_line`: line 1 of a cell is its
    magic. `folder` is where its own `#include "..."` are looked for (the notebook's). Where the user's
    cache directory can't be written to there is no file.

    Raises:
        CompileError: there is a null character in it.
    """
    title = f"// %%nb_kernel {op}\n" if first_line > 1 else ""
    whole = "\n" * (first_line - 2) + title + text
    name = f"{op}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}.cu"
    path = cell_folder() / name
    if path.exists():
        mark_used(path)
    else:
        with contextlib.suppress(OSError):
            with made_whole(path) as written:
                written.write_text(whole)
            drop_oldest(path.parent, "*.cu", KEPT_BYTES)
    return Source(whole, name, folder, path if path.exists() else None)


def cell_folder() -> Path:
    """Where the files are."""
    return cache_folder("cells")
