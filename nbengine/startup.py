"""Where an engine's start-up time goes: `engine.startup`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StartupTimes:
    """Seconds by phase, in the order in which the phases were; print it, or read `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done inside to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        rows = [*self.seconds.items(), ("in all", self.total)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {seconds:7.2f} s" for name, seconds in rows)

    def __repr__(self) -> str:
        return str(self)
