"""Placeholder until the explanations land."""

from __future__ import annotations

from typing import Any

Explanation = Any


def explain(scheduler: Any, history: Any, name: str) -> Explanation:
    raise KeyError(name)
