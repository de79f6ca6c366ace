"""From addresses in a kernel's library to lines of its source, with the debugger's tables."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nbengine.kernels.diagnostics import lines_of
from nbengine.kernels.emulator.build import UNIT
from nbengine.kernels.source import Source

_EMULATOR = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the source, or of a header where the source has no part in it. `inside` is the
    header's line that the source's line led to, if any."""

    file: str
    line: int
    text: str
    """The line itself, "" where the file is not to be had."""
    inside: str | None = None

    def shown(self) -> str:
        inside = f" (inside {self.inside})" if self.inside else ""
        return f"{self.file}:{self.line}{inside}\n    {self.text.strip()}"


class Places:
    """Of one library, compiled from one source."""

    def __init__(self, library: Path, source: Source) -> None:
        self._library, self._source = library, source
        self._known: dict[int, Place | None] = {}

    def of(self, pcs: Iterable[int]) -> dict[int, Place | None]:
        """By address, counted from the library's start; each is the one that a call returns to."""
        wanted = set(pcs)
        missing = sorted(wanted - self._known.keys())
        if missing:
            self._known.update(zip(missing, self._looked_up(missing), strict=True))
        return {pc: self._known[pc] for pc in wanted}

    def at(self, file: str, line: int) -> Place:
        """A place that the compiler named."""
        file = self._source.name if file == self._source.compiled_name else file
        return Place(file, line, self._line(file, line))

    def _looked_up(self, pcs: list[int]) -> list[Place | None]:
        tool = _addr2line()
        if tool is None:
            return [None] * len(pcs)
        # The call is before the address that it returns to.
        command = [tool, "-a", "-i", "-e", str(self._library), *(hex(pc - 1) for pc in pcs)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        frames: list[list[str]] = []  # of each address, the innermost inlined function's first
        for line in output.splitlines():
            if line.startswith("0x"):
                frames.append([])
            else:
                frames[-1].append(line.partition(" (discriminator ")[0])
        return [self._chosen(of_one) for of_one in frames]

    def _chosen(self, frames: list[str]) -> Place | None:
        split = [(file, int(line)) for file, _, line in (f.rpartition(":") for f in frames)
                 if line.isdigit() and int(line) and Path(file).parts[: len(_EMULATOR.parts)]
                 != _EMULATOR.parts]  # fmt: skip
        for file, line in split:
            if self._is_source(file):
                inner = split[0]
                inside = None if self._is_source(inner[0]) else f"{inner[0]}:{inner[1]}"
                return Place(self._source.name, line, self._line(self._source.name, line), inside)
        return Place(*split[0], self._line(*split[0])) if split else None

    def _is_source(self, file: str) -> bool:
        # g++ may name the unit itself in spite of #line; the lines are the source's all the same.
        names = (self._source.name, self._source.compiled_name)
        return file.endswith((f"/{self._source.name}", f"/{UNIT}")) or file in names

    def _line(self, file: str, line: int) -> str:
        text = self._source.texts.get(file)
        if text is None:
            try:
                text = Path(file).read_text(errors="replace")
            except OSError:
                return ""
        lines = lines_of(text)
        return lines[line - 1] if 0 < line <= len(lines) else ""


@functools.cache
def _addr2line() -> str | None:
    return shutil.which("addr2line") or shutil.which("llvm-addr2line")
