"""`engine.kernels`: the ops that run an engine's model, looked at and swapped while it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from nbengine.progress import say

if TYPE_CHECKING:
    import torch

    from nbengine.engine import Engine
    from nbengine.kernel_survey import RooflinePlot, Survey
    from nbengine.kernels.implementation import Implementable, Implementation
    from nbengine.kernels.op import Arguments, Case
    from nbengine.kernels.table import Candidate, Implementations, Kernels, Swapped
    from nbengine.kernels.verification import Verified
    from nbengine.kernels.watch import KernelTrace

T = TypeVar("T")


class EngineKernels:
    """`engine.kernels`: the ops that run this engine's model. A swap is made between two steps, so
    it loses neither a request nor a KV block; the next step uses the new implementation."""

    def __init__(self, engine: Engine, table: Kernels) -> None:
        self._engine, self._table = engine, table

    @property
    def backend(self) -> str:
        """`cuda` or `emulated`."""
        return self._table.backend

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return self._table.device

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
        candidate = self.candidate(op, what)
        return self.put(candidate, self.verify(candidate))

    def candidate(self, op: str, what: Implementable) -> Candidate:
        """The first part of a swap: `what` as it is now. It changes nothing."""
        return self._table.candidate(op, what)

    def verify(self, candidate: Candidate, cases: Iterable[Case] | None = None) -> Verified:
        """The second: on the op's grid (or on these cases), then on live tensors. Raises as `swap`
        does."""
        from nbengine.kernels.verification import verify_implementation, verify_live

        op = candidate.checked.op.name
        on_grid = verify_implementation(candidate.checked, self.device, cases)
        return self.between_steps(
            lambda: verify_live(candidate.checked, self._called(op)[op], on_grid)
        )

    def put(self, candidate: Candidate, verified: Verified) -> Swapped:
        """The last: in the op's place. A command of its own, because one that verifies can't be
        taken back by who interrupts the wait."""
        return self.between_steps(lambda: self._table.put(candidate, verified))

    def restore(self, op: str) -> Implementation:
        """Put the op's own implementation back."""
        return self.between_steps(lambda: self._table.restore(op))

    @property
    def implementations(self) -> Implementations:
        """What runs each op now."""
        return self._table.implementations

    def implementation(self, op: str) -> Implementation:
        """What runs this op now."""
        return self._table.implementation(op)

    def live_calls(self, *ops: str, step: int | None = None) -> dict[str, list[Arguments]]:
        """Arguments of calls of each op at the engine's current batch: those of a step that computes
        the running requests' last tokens again, or one token where none runs. Two of each at most,
        as copies; none of an op that such a step does not call.

        Args:
            step: that step's calls instead. It is laid out and computed again; of blocks that have
                passed on to others since, the numbers are the new holders'.

        Raises:
            UnknownStep: the history does not reach that step.
        """
        return self.between_steps(lambda: self._called(*ops, step=step))

    def survey(self, gpu: str | None = None, *, step: int | None = None) -> Survey:
        """What each op costs at the engine's batch, or in step `step`: bytes, operations, and on a
        GPU its time and which fraction of the roofline it reaches (that takes some seconds).
        Elsewhere against the published figures of `gpu` ("H100", "A100", "L4", ...).

        Raises:
            UnknownStep: the history does not reach that step.
        """
        from nbengine.kernel_survey import survey

        return survey(self, gpu, step)

    def roofline(self, gpu: str | None = None, *, step: int | None = None) -> RooflinePlot:
        """The same, drawn: each op under the roofs of memory and of matrix products."""
        from nbengine.kernel_survey import RooflinePlot

        return RooflinePlot(self.survey(gpu, step=step))

    def watch(self, op: str, *, of: tuple[int, int, int] = (0, 0, 0)) -> KernelTrace:
        """What each thread of one CUDA block does in a call at the engine's batch, emulated: see
        `lab.watch`. KV blocks have the engine's own numbers.

        Args:
            of: the block's index in the grid.

        Raises:
            InvalidField: the engine's batch does not call the op, no CUDA C runs it, there is no such
                block, or it does too much to be looked at.
        """
        from nbengine.errors import InvalidField
        from nbengine.kernels.watch import watch

        runs = self.implementation(op)
        if runs.source is None:
            raise InvalidField("op", op, f"{runs} runs it, which has no CUDA C to watch")
        calls, tables = self.between_steps(lambda: (self._called(op)[op], self._tables()))
        if not calls:
            raise InvalidField("op", op, "a step of the engine's batch does not call it")
        # Of a live call the KV blocks are kept that it uses, in the order of their numbers.
        used = sorted({block for table in tables for block in table})
        cache = calls[-1].get("k_cache")
        names = used if cache is not None and len(cache) == len(used) else None
        call = f"the engine's batch of {len(tables)}" if tables else "the engine's batch"
        return watch(op, runs.source, arguments=calls[-1], call=call, of=of, block_names=names)

    def _tables(self) -> list[list[int]]:
        """The KV blocks that hold computed tokens, of each running sequence."""
        scheduler, size = self._engine.scheduler, self._engine.config.block_size
        return [
            seq.block_table[: -(-seq.num_computed_tokens // size)]
            for seq in scheduler.running
            if seq.num_computed_tokens
        ]

    def between_steps(self, command: Callable[[], T]) -> T:
        """Run `command` on the engine's thread while no step is computed, and return its result."""
        say("waiting for the engine's step to end")
        return self._engine._call(command)

    def _called(self, *ops: str, step: int | None = None) -> dict[str, list[Arguments]]:
        """`live_calls`, on the engine's thread."""
        what = "a step of the engine's batch" if step is None else f"step {step}"
        say(f"looking at {what}")
        return self._engine._live_calls(*ops, step=step)

    def __repr__(self) -> str:
        return repr(self._table.implementations)

    def _repr_html_(self) -> str:
        return self._table.implementations._repr_html_()
