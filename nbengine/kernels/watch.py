"""`watch`: what each thread of one CUDA block reads and writes, barrier by barrier.

One call of an op is emulated, and of one launch one block's events are kept: a `KernelTrace`, plain
and immutable. Elements of the KV cache are named by block, head, slot and dimension, and by the
sequence whose block table leads to them: PagedAttention can be watched. `jupyter.kernel_view` draws
it; `str()` is a summary.

Between two barriers the threads have no order; the emulator's is one of many. Accesses of a thread
that follow one another, at one line, are put together.
"""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbengine.errors import InvalidField
from nbengine.kernels.arguments import cloned
from nbengine.kernels.diagnostics import lines_of
from nbengine.kernels.display import table_text
from nbengine.kernels.emulator import EmulatedKernel, EmulatedProgram, Event
from nbengine.kernels.implementation import Implementable, op_named, with_text_read
from nbengine.kernels.op import Arguments, Case, Op
from nbengine.kernels.source import Source

Three = tuple[int, int, int]
WARP = 32
MAX_ACCESSES = 400_000
"""Of a block that is watched: beyond, neither a page nor a reader could follow."""
CACHES = ("k_cache", "v_cache")
"""The arguments that are a layer's KV cache, `[num_blocks, kv_heads, block_size, head_dim]`."""


@dataclass(frozen=True, slots=True)
class WatchedTensor:
    """A tensor, or a variable in shared memory, that the block touches."""

    name: str
    is_shared: bool
    shape: tuple[int, ...]
    dtype: str
    """Of shared memory "N bytes", of an element."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_cache(self) -> bool:
        return self.name in CACHES and len(self.shape) == 4 and not self.is_shared

    def index(self, element: int) -> tuple[int, ...]:
        """Of an element, counted row by row: its place in the shape."""
        place = []
        for size in reversed(self.shape):
            element, at = divmod(element, size)
            place.append(at)
        return tuple(reversed(place))


@dataclass(frozen=True, slots=True)
class Access:
    """Elements `first` to `first + count` of a tensor, counted row by row, by one thread."""

    thread: int
    """In the block, x first."""
    tensor: int
    """In `KernelTrace.tensors`."""
    first: int
    count: int
    event: str
    """read, write or atomic."""
    line: int | None
    """Of the source."""

    @property
    def warp(self) -> int:
        return self.thread // WARP

    @property
    def is_write(self) -> bool:
        return self.event != "read"


@dataclass(frozen=True, slots=True)
class Phase:
    """What lies between two barriers."""

    accesses: tuple[Access, ...]
    """Of each thread, in the order in which it made them."""
    barrier_line: int | None
    """Of the source, where it ends; None for the last."""


@dataclass(frozen=True, slots=True)
class CachePlace:
    """An element of the KV cache."""

    block: int
    """Its number in the cache that the kernel was given."""
    head: int
    slot: int
    """The token's offset in the block."""
    dim: int
    sequences: tuple[tuple[int, int], ...]
    """(sequence, position of the token in it), for each block table that holds the block."""


@dataclass(frozen=True, slots=True, repr=False)
class KernelTrace:
    """One block of one launch."""

    op: str
    kernel: str
    source: Source
    call: str
    grid: Three
    block: Three
    """Its size, in threads."""
    of: Three
    """Its index in the grid."""
    tensors: tuple[WatchedTensor, ...]
    phases: tuple[Phase, ...]
    block_tables: tuple[tuple[int, ...], ...] = ()
    """Of each sequence of the call: its KV blocks, as far as it has tokens."""
    seq_lens: tuple[int, ...] = ()
    block_names: tuple[int, ...] | None = None
    """What an engine calls the blocks, by their number here; None where that is the same."""

    @property
    def num_threads(self) -> int:
        return math.prod(self.block)

    @property
    def title(self) -> str:
        of = ", ".join(map(str, self.of))
        return (
            f"{self.kernel}, block ({of}) of {math.prod(self.grid)}, {self.num_threads} threads; "
            f"{self.call}"
        )

    def name_of_block(self, block: int) -> int:
        """Of a KV block: the engine's own number for it."""
        return block if self.block_names is None else self.block_names[block]

    def cache_place(self, tensor: int, element: int) -> CachePlace:
        """Where an element of a KV cache is. Raises `ValueError` for another tensor."""
        watched = self.tensors[tensor]
        if not watched.is_cache:
            raise ValueError(f"{watched.name} {list(watched.shape)} is no KV cache")
        block, head, slot, dim = watched.index(element)
        block_size = watched.shape[2]
        sequences = tuple(
            (sequence, table.index(block) * block_size + slot)
            for sequence, table in enumerate(self.block_tables)
            if block in table
        )
        return CachePlace(block, head, slot, dim, sequences)

    def where(self, access: Access) -> str:
        """`k_cache: block 5, head 0, slot 3 (token 19 of sequence 0), dim 8..11`."""
        tensor = self.tensors[access.tensor]
        last = access.first + access.count - 1
        if not tensor.is_cache:
            start, end = tensor.index(access.first), tensor.index(last)
            dims = [f"{a}" if a == b else f"{a}..{b}" for a, b in zip(start, end, strict=True)]
            return f"{tensor.name}[{', '.join(dims)}]"
        place = self.cache_place(access.tensor, access.first)
        tokens = ", ".join(f"token {at} of sequence {seq}" for seq, at in place.sequences)
        dim = place.dim
        dims_shown = f"{dim}" if access.count == 1 else f"{dim}..{dim + access.count - 1}"
        return (
            f"{tensor.name}: block {self.name_of_block(place.block)}, head {place.head}, slot "
            f"{place.slot}{f' ({tokens})' if tokens else ''}, dim {dims_shown}"
        )

    def summary(self, phase: int) -> str:
        """What the phase does, in a line a tensor."""
        lines = [f"phase {phase + 1} of {len(self.phases)}{self._until(phase)}"]
        rows = list(self._rows(phase))
        if not rows:
            return f"{lines[0]}: no tensor is touched"
        return "\n".join([*lines, table_text(_HEADERS, rows)])

    def _until(self, phase: int) -> str:
        line = self.phases[phase].barrier_line
        return "" if line is None else f", to the barrier at line {line}"

    def _rows(self, phase: int) -> Iterator[tuple[str, ...]]:
        accesses = self.phases[phase].accesses
        for index, tensor in enumerate(self.tensors):
            mine = [access for access in accesses if access.tensor == index]
            if not mine:
                continue
            read, written = (
                len(_elements(access for access in mine if access.is_write == is_write))
                for is_write in (False, True)
            )
            lines = Counter(access.line for access in mine if access.line is not None)
            yield (
                tensor.name,
                f"{read:,}",
                f"{written:,}",
                f"{len({access.thread for access in mine}):,}",
                _ranges({access.warp for access in mine}),
                ", ".join(str(line) for line in sorted(lines)),
                self._blocks_of(index, mine),
            )

    def _blocks_of(self, tensor: int, accesses: Sequence[Access]) -> str:
        if not self.tensors[tensor].is_cache:
            return ""
        found = {self.cache_place(tensor, access.first).block for access in accesses}
        return ", ".join(str(self.name_of_block(block)) for block in sorted(found))

    def __str__(self) -> str:
        phases = [self.summary(phase) for phase in range(len(self.phases))]
        return "\n\n".join([self.title, *self._tables(), *phases])

    def _tables(self) -> list[str]:
        shown = [
            f"sequence {index}, {length} tokens: KV blocks "
            + " ".join(str(self.name_of_block(block)) for block in table)
            for index, (table, length) in enumerate(
                zip(self.block_tables, self.seq_lens, strict=True)
            )
        ]
        return ["\n".join(shown)] if shown else []

    __repr__ = __str__

    def facts(self) -> str:
        """All but the accesses, as JSON, for a page."""
        texts = lines_of(self.source.text)
        lines = {access.line for phase in self.phases for access in phase.accesses if access.line}
        lines |= {phase.barrier_line for phase in self.phases if phase.barrier_line}
        ends = list(itertools.accumulate(len(phase.accesses) for phase in self.phases))
        return json.dumps(
            {
                "title": self.title,
                "numThreads": self.num_threads,
                "tensors": [
                    {
                        "name": tensor.name,
                        "isShared": tensor.is_shared,
                        "isCache": tensor.is_cache,
                        "shape": tensor.shape,
                        "dtype": tensor.dtype,
                    }
                    for tensor in self.tensors
                ],
                "phases": [
                    {"end": end, "barrierLine": phase.barrier_line}
                    for phase, end in zip(self.phases, ends, strict=True)
                ],
                "tables": self.block_tables,
                "seqLens": self.seq_lens,
                "blockNames": self.block_names,
                "lines": {line: texts[line - 1].strip() for line in sorted(lines)},
            }
        )

    def packed(self) -> bytes:
        """The accesses of all phases, six numbers of 32 bits each: thread, tensor, first, count,
        1 for a write, line (0 if unknown)."""
        numbers = array("i")
        for phase in self.phases:
            for a in phase.accesses:
                numbers.extend((a.thread, a.tensor, a.first, a.count, a.is_write, a.line or 0))
        return numbers.tobytes()


_HEADERS = ("tensor", "elements read", "written", "threads", "warps", "lines", "KV blocks")


def watch(
    op: str | Op,
    what: Implementable = None,
    case: Case | str | None = None,
    *,
    arguments: Arguments | None = None,
    call: str = "a call of an engine",
    of: Three = (0, 0, 0),
    launch: int = 0,
    block_names: Sequence[int] | None = None,
) -> KernelTrace:
    """Emulate one call and keep what one block of it did.

    Args:
        what: CUDA C in the op's place (text, path, `Source`); None is the op's own.
        case: the first of the op's grid with this part in its name; default: the op's own for watching, or
            the first of its grid.
        arguments: of a call, in place of a case's; they are copied to the CPU.
        call: what to call them.
        of: the block's index in the grid.
        launch: which of the call's launches.
        block_names: of the KV blocks in `arguments`, an engine's numbers.

    Raises:
        InvalidField: no such case, block or launch, or the block does too much to be looked at.
        EmulationError: what the checks find.
        CompileError, UnknownOp
    """
    found = op_named(op)
    source = Source.of_op(found.source) if what is None else with_text_read(found, what)
    if not isinstance(source, Source):
        raise InvalidField("what", what, "only CUDA C can be watched: give its text, or a path")
    if arguments is None:
        chosen = _case(found, case)
        arguments, call = chosen.make(torch.Generator().manual_seed(0)), chosen.name
    arguments = _on_cpu(arguments)
    program = _WatchedProgram(source, of)
    found.launch_on(program, arguments)
    if not 0 <= launch < len(program.launches):
        num_made = len(program.launches)
        launches = f"launch{'es' * (num_made != 1)}"
        raise InvalidField("launch", launch, f"the call makes {num_made} {launches}")
    seen = program.launches[launch]
    if not all(0 <= at < size for at, size in zip(of, seen.grid, strict=True)):
        raise InvalidField("of", of, f"the grid of {seen.kernel.name} is {seen.grid}")
    if len(seen.events) > MAX_ACCESSES:
        raise InvalidField(
            "case",
            call,
            f"its block makes {len(seen.events):,} accesses, and {MAX_ACCESSES:,} can be looked at: "
            "take a smaller call",
        )
    tensors, phases = _phases(seen)
    tables, lengths = _tables(arguments)
    return KernelTrace(
        found.name,
        seen.kernel.name,
        source,
        call,
        seen.grid,
        seen.block,
        of,
        tensors,
        phases,
        tables,
        lengths,
        None if block_names is None else tuple(block_names),
    )


def _case(op: Op, wanted: Case | str | None) -> Case:
    if isinstance(wanted, Case):
        return wanted
    if wanted is None and op.watch_case is not None:
        return op.watch_case()
    return op.cases_named(wanted)[0]


def _on_cpu(arguments: Arguments) -> Arguments:
    """Copies, dense or with the strides that they have."""
    on_cpu = {
        name: value.cpu() if isinstance(value, Tensor) and value.is_cuda else value
        for name, value in arguments.items()
    }
    return cloned(on_cpu)


def _tables(arguments: Arguments) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Each sequence's blocks and length, of an op that has them."""
    tables, lengths = arguments.get("block_tables"), arguments.get("seq_lens")
    cache = arguments.get("k_cache")
    if not (isinstance(tables, Tensor) and isinstance(lengths, Tensor)) or cache is None:
        return (), ()
    block_size = cache.shape[2]
    found = tuple(
        tuple(table[: -(-length // block_size)])
        for table, length in zip(tables.tolist(), lengths.tolist(), strict=True)
    )
    return found, tuple(lengths.tolist())


# ---------------------------------------------------------------------- the emulator's events


@dataclass(frozen=True, slots=True)
class _Launched:
    kernel: EmulatedKernel
    grid: Three
    block: Three
    shared_bytes: int
    arguments: tuple[Any, ...]
    events: list[Event]


class _WatchedProgram(EmulatedProgram):
    """Its kernels keep what the block `of` does, of each launch."""

    def __init__(self, source: Source, of: Three) -> None:
        super().__init__(source, checks=True, counters=True)  # for whole accesses
        self.of = of
        self.launches: list[_Launched] = []

    def _make(self, expression: str) -> EmulatedKernel:
        return _WatchedKernel(self, expression)


class _WatchedKernel(EmulatedKernel):
    def __init__(self, program: _WatchedProgram, expression: str) -> None:
        super().__init__(program.source, expression, checks=True, counters=True)
        self._program = program

    def launch(
        self, grid: Three, block: Three, shared_bytes: int, arguments: tuple[Any, ...]
    ) -> None:
        of = self._program.of
        events = self.trace(grid, block, arguments, shared_bytes=shared_bytes, of=of)
        launched = _Launched(self, grid, block, shared_bytes, arguments, events)
        self._program.launches.append(launched)


_KINDS = {"read": "read", "write": "write", "atomic": "atomic", "copy arrived": "write"}
"""An asynchronous copy writes when it arrives; its reading is an event of its own."""


def _phases(seen: _Launched) -> tuple[tuple[WatchedTensor, ...], tuple[Phase, ...]]:
    views = _views(seen)
    names = list(dict.fromkeys(e.buffer for e in seen.events if e.buffer in views))
    number = {name: index for index, name in enumerate(names)}
    num_phases = 1 + max((event.epoch for event in seen.events), default=0)
    accesses: list[list[Access]] = [[] for _ in range(num_phases)]
    barriers: list[int | None] = [None] * num_phases
    latest: dict[int, int] = {}  # by thread: the place of its last access in the phase
    epoch = 0
    for event in seen.events:
        if event.epoch != epoch:
            epoch, latest = event.epoch, {}
        if event.event == "barrier":
            barriers[epoch] = event.line
        kind, name = _KINDS.get(event.event), event.buffer
        if kind is None or name is None or name not in views or event.index is None:
            continue
        element = views[name].element(event.index)
        if element is None:
            continue
        count = max(1, event.bytes // views[name].element_bytes)
        access = Access(event.thread, number[name], element, count, kind, event.line)
        of_phase = accesses[epoch]
        before = latest.get(event.thread)
        if before is not None and _follows(of_phase[before], access):
            whole = of_phase[before].count + count
            first = of_phase[before].first
            of_phase[before] = Access(event.thread, access.tensor, first, whole, kind, event.line)
        else:
            latest[event.thread] = len(of_phase)
            of_phase.append(access)
    while len(accesses) > 1 and not accesses[-1] and barriers[-1] is None:
        accesses.pop()
        barriers.pop()
    phases = tuple(
        Phase(tuple(each), barrier) for each, barrier in zip(accesses, barriers, strict=True)
    )
    return tuple(views[name].tensor for name in names), phases


def _follows(before: Access, access: Access) -> bool:
    return (
        before.tensor == access.tensor
        and before.event == access.event
        and before.line == access.line
        and before.first + before.count == access.first
    )


@dataclass(frozen=True, slots=True)
class _View:
    """How a buffer's elements are counted."""

    tensor: WatchedTensor
    strides: tuple[int, ...]
    element_bytes: int

    def element(self, offset: int) -> int | None:
        """From an offset in memory, in elements, to a number row by row; None outside of the
        tensor, as between the rows of a slice."""
        shape = self.tensor.shape
        by_stride = sorted(range(len(shape)), key=lambda dim: (-self.strides[dim], dim))
        place = [0] * len(shape)
        for dim in by_stride:
            if self.strides[dim] and shape[dim] > 1:
                place[dim], offset = divmod(offset, self.strides[dim])
                if not 0 <= place[dim] < shape[dim]:
                    return None
        if offset:
            return None
        element = 0
        for at, size in zip(place, shape, strict=True):
            element = element * size + at
        return element


def _views(seen: _Launched) -> dict[str | None, _View]:
    views: dict[str | None, _View] = {}
    for parameter, value in zip(seen.kernel.parameters, seen.arguments, strict=True):
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            watched = WatchedTensor(parameter.name, False, tuple(value.shape), dtype)
            views[parameter.name] = _View(watched, value.stride(), value.element_size())
    for name, num_bytes, size in seen.kernel.shared_variables(seen.shared_bytes):
        watched = WatchedTensor(name, True, (max(1, num_bytes // size),), f"{size} bytes")
        views[name] = _View(watched, (1,), size)
    return views


def _elements(accesses: Iterable[Access]) -> set[int]:
    return {
        element
        for access in accesses
        for element in range(access.first, access.first + access.count)
    }


def _ranges(numbers: set[int]) -> str:
    """`0..3, 6`."""
    shown: list[list[int]] = []
    for number in sorted(numbers):
        if shown and shown[-1][1] == number - 1:
            shown[-1][1] = number
        else:
            shown.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in shown)
