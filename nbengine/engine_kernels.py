"""`engine.kernels`: the ops that run an engine's model, looked at and swapped while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.kernels.implementation import Implementable, Implementation
    from nbengine.kernels.table import Implementations, Kernels, Swapped


class EngineKernels:
    """`engine.kernels`: the ops that run this engine's model. A swap is made between two steps, so
    it loses neither a request nor a KV block; the next step uses the new implementation."""

    def __init__(self, engine: Engine, table: Kernels) -> None:
        self._engine, self._table = engine, table

    @property
    def backend(self) -> str:
        """`cuda` or `emulated`."""
        return self._table.backend

    def swap(self, op: str, what: Implementable) -> Swapped:
        """Put another implementation of an op in its place, after it was compared with the
        reference: on the op's grid, while the engine goes on, and on tensors of the running
        requests, between two steps (those of a step that computes their last tokens again).

        Args:
            what: CUDA C (text, path, `Source`), a Python function, or the name of an alternative.

        Raises:
            Mismatch: it is wrong, with the first wrong element; what ran the op still does.
            CompileError: it does not compile; the same.
        """
        from nbengine.kernels.verification import verify_implementation, verify_live

        table, engine = self._table, self._engine
        candidate = table.candidate(op, what)
        on_grid = verify_implementation(candidate.checked, table.device)
        verified = engine._call(
            lambda: verify_live(candidate.checked, engine._live_calls(op), on_grid)
        )
        # A command of its own: one that verifies can't be taken back by who interrupts the wait.
        return engine._call(lambda: table.put(candidate, verified))

    def restore(self, op: str) -> Implementation:
        """Put the op's own implementation back."""
        return self._engine._call(lambda: self._table.restore(op))

    @property
    def implementations(self) -> Implementations:
        """What runs each op now."""
        return self._table.implementations

    def __repr__(self) -> str:
        return repr(self._table.implementations)

    def _repr_html_(self) -> str:
        return self._table.implementations._repr_html_()
