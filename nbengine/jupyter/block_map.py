"""The block map as a still picture: which KV block belongs to whom, as text, SVG or HTML.

Pure functions of a `Snapshot`, for `%nb_blocks`, for `Snapshot`'s own notebook form and for the
dashboard where no live page is there to draw (`block_map.js` draws the same picture on a canvas).
Kinds of block differ in shape and not only in colour: held ones are solid, shared ones carry a
white diagonal, cached ones are hatched, free ones are an outline.
"""

from __future__ import annotations

import enum
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

from nbengine.core.prefix_cache import BlockContent
from nbengine.core.request import Sequence
from nbengine.core.snapshot import Snapshot
from nbengine.jupyter.picture import image

PALETTE = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#BFA80F", "#7B61C4",
    "#004C77", "#9A6A00", "#4FC3A1", "#8E3E69", "#9AD4F5", "#8F3F00", "#DDD06A", "#B3A1E6",
)  # fmt: skip
"""Eight hues after Okabe and Ito's colour-blind-safe set, in two shades each."""

MAX_CELLS = 2048
"""Blocks that a still picture draws one by one; beyond, a cell stands for several."""

_COLUMNS = 64
_GREY = "#8a8a8a"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class BlockKind(enum.IntEnum):
    """What a block is to the scheduler."""

    FREE = 0
    CACHED = 1
    """Nobody holds it; it keeps a prefix."""
    HELD = 2
    SHARED = 3
    """More than one block table names it."""


_CHARS = {BlockKind.FREE: ".", BlockKind.CACHED: "=", BlockKind.SHARED: "+"}


@lru_cache(maxsize=4096)
def colour_index(seq_id: str) -> int:
    """A sequence's place in `PALETTE`. It depends on the id alone, so that every view agrees;
    requests that arrive one after the other get different colours."""
    name, _, sample = seq_id.partition("#")
    number = re.fullmatch(r"req-(\d+)", name)
    base = int(number[1]) if number else zlib.crc32(name.encode())
    return (base + 5 * int(sample or 0)) % len(PALETTE)


def short_name(seq_id: str) -> str:
    """What fits a cell or a legend: `req-12#1` is `12#1`."""
    return seq_id.removeprefix("req-")


@dataclass(frozen=True, slots=True)
class BlockState:
    """One block of the map."""

    kind: BlockKind
    owner: str | None = None
    """The first sequence that holds it, in the order of the running queue."""
    num_holders: int = 0


def block_states(snapshot: Snapshot) -> list[BlockState]:
    """Every block's state, by block id."""
    free, cached = BlockState(BlockKind.FREE), BlockState(BlockKind.CACHED)
    states = [free] * snapshot.num_blocks
    for block in snapshot.cached_blocks:
        states[block] = cached
    owners: dict[int, str] = {}
    for seq in snapshot.running:
        for block in seq.block_table:
            owners.setdefault(block, seq.seq_id)
    for block, owner in owners.items():
        count = snapshot.ref_counts[block]
        kind = BlockKind.SHARED if count > 1 else BlockKind.HELD
        states[block] = BlockState(kind, owner, count)
    return states


def counts_line(snapshot: Snapshot) -> str:
    """`12 held (3 shared), 4 cached, 48 free of 64 blocks of 16 tokens`."""
    num_shared = sum(count > 1 for count in snapshot.ref_counts)
    return (
        f"{snapshot.num_held_blocks} held ({num_shared} shared), "
        f"{len(snapshot.cached_blocks)} cached, {snapshot.num_free_blocks} free "
        f"of {snapshot.num_blocks} blocks of {snapshot.block_size} tokens"
    )


def _cells(snapshot: Snapshot) -> tuple[list[BlockState], int]:
    """What to draw, and how many blocks each cell stands for (by the busiest of them)."""
    states = block_states(snapshot)
    per_cell = -(-len(states) // MAX_CELLS)
    if per_cell <= 1:
        return states, 1
    return [
        max(states[i : i + per_cell], key=lambda state: state.kind)
        for i in range(0, len(states), per_cell)
    ], per_cell


def describe_block(
    block: int,
    step: int,
    block_size: int,
    running: Iterable[Sequence],
    cached: tuple[int, ...],
    contents: Mapping[int, BlockContent],
) -> dict[str, Any]:
    """Everything about one block after `step`, as JSON data: its kind, holders, hash and tokens.
    `cached` are the blocks that nobody holds, `contents` all that the prefix cache remembers."""
    content = contents.get(block)
    holders, tokens, index = [], [], None
    for seq in running:
        if block in seq.block_table:
            holders.append(seq.seq_id)
            index = seq.block_table.index(block)
            start = index * block_size
            tokens = list(seq.tokens[start : min(start + block_size, seq.num_computed_tokens)])
    if content is not None:
        tokens = list(content.token_ids)
    is_cached = not holders and block in cached
    kind = BlockKind.CACHED if is_cached else BlockKind.FREE
    if holders:
        kind = BlockKind.SHARED if len(holders) > 1 else BlockKind.HELD
    return {
        "block": block,
        "step": step,
        "kind": kind.name.lower(),
        "holders": holders,
        "index": index,
        "hash": content.digest.hex() if content is not None else None,
        "salted": content is not None and content.salt is not None,
        "to_be_evicted_after": cached.index(block) if is_cached else None,
        "token_ids": tokens,
    }


# ------------------------------------------------------------------ text


def block_map_text(snapshot: Snapshot) -> str:
    """One character a block, in rows: a letter is the sequence that holds it, `+` is shared, `=`
    cached, `.` free."""
    cells, per_cell = _cells(snapshot)
    letters: dict[str, str] = {}
    for seq in snapshot.running:
        letters[seq.seq_id] = _LETTERS[len(letters) % len(_LETTERS)]
    chars = "".join(
        letters[cell.owner] if cell.owner and cell.kind is BlockKind.HELD else _CHARS[cell.kind]
        for cell in cells
    )
    width = len(str(snapshot.num_blocks))
    lines = [counts_line(snapshot)]
    if per_cell > 1:
        lines.append(f"(one character stands for {per_cell} blocks)")
    lines += [
        f"{start * per_cell:>{width}}  {chars[start : start + _COLUMNS]}"
        for start in range(0, len(chars), _COLUMNS)
    ]
    key = [f"{letter} {seq_id}" for seq_id, letter in letters.items()]
    lines.append(" ".join([" " * width, *key[:16], *(["..."] if len(key) > 16 else [])]))
    lines.append(" " * width + "  + shared   = cached   . free")
    return "\n".join(lines)


# ------------------------------------------------------------------ picture


def block_map_svg(snapshot: Snapshot) -> str:
    """The map as one SVG element. Neutral lines are of a grey that fits a light and a dark page."""
    cells, _ = _cells(snapshot)
    size = 18 if len(cells) <= 256 else 10 if len(cells) <= 1024 else 7
    columns = 32 if len(cells) <= 256 else _COLUMNS
    rows = -(-len(cells) // columns)
    inner = size - 2
    solid: dict[str, list[str]] = {}  # one path a colour keeps the picture small
    shared, cached, free, labels = [], [], [], []
    for index, cell in enumerate(cells):
        x, y = index % columns * size + 1, index // columns * size + 1
        square = f"M{x} {y}h{inner}v{inner}h-{inner}z"
        if cell.kind is BlockKind.FREE:
            free.append(square)
        elif cell.kind is BlockKind.CACHED:
            cached.append(square)
            half = inner // 2
            cached.append(f"M{x} {y + half}l{half} -{half}M{x} {y + inner}l{inner} -{inner}")
            cached.append(f"M{x + half} {y + inner}l{inner - half} -{inner - half}")
        else:
            assert cell.owner is not None
            solid.setdefault(PALETTE[colour_index(cell.owner)], []).append(square)
            if cell.kind is BlockKind.SHARED:
                shared.append(f"M{x} {y + inner}l{inner} -{inner}")
            elif size >= 18 and len(short_name(cell.owner)) <= 3:
                labels.append(
                    f'<text x="{x + inner / 2:g}" y="{y + inner / 2 + 3:g}">'
                    f"{escape(short_name(cell.owner))}</text>"
                )
    parts = [
        f'<path d="{"".join(free)}" fill="none" stroke="{_GREY}" stroke-opacity=".45"/>',
        f'<path d="{"".join(cached)}" fill="none" stroke="{_GREY}"/>',
        *(f'<path d="{"".join(d)}" fill="{colour}"/>' for colour, d in sorted(solid.items())),
        f'<path d="{"".join(shared)}" stroke="#fff" stroke-width="{max(2, size // 6)}"/>',
        f'<g fill="#fff" font-size="9" text-anchor="middle" font-family="sans-serif">'
        f"{''.join(labels)}</g>",
    ]
    width, height = columns * size + 2, rows * size + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="KV blocks: {escape(counts_line(snapshot))}" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'style="max-width:100%;height:auto">{"".join(parts)}</svg>'
    )


def block_map_html(snapshot: Snapshot) -> str:
    """The picture with its counts and legend."""
    _, per_cell = _cells(snapshot)
    note = f" One cell stands for {per_cell} blocks." if per_cell > 1 else ""
    return (
        f"<div><b>KV blocks</b> {escape(counts_line(snapshot))}.{note}</div>"
        f"{image(block_map_svg(snapshot), counts_line(snapshot))}"
        f"<div>{swatches(seq.seq_id for seq in snapshot.running)}"
        "<span style='opacity:.75'>white diagonal: shared; hatched: cached; outline: free</span>"
        "</div>"
    )


def swatch(seq_id: str) -> str:
    """A small square in the sequence's colour, for tables and legends."""
    return (
        "<span aria-hidden='true' style='display:inline-block;width:.75em;height:.75em;"
        f"border-radius:2px;background:{PALETTE[colour_index(seq_id)]}'></span>"
    )


def swatches(seq_ids: Iterable[str], limit: int = 16) -> str:
    """A legend of sequences."""
    names = list(seq_ids)
    shown = "".join(
        f"<span style='margin-right:.9em;white-space:nowrap'>{swatch(name)} {escape(name)}</span>"
        for name in names[:limit]
    )
    more = f"<span style='margin-right:.9em'>and {len(names) - limit} more</span>"
    return shown + (more if len(names) > limit else "")


@dataclass(frozen=True, slots=True, repr=False)
class BlockMap:
    """A snapshot that shows itself as its block map."""

    snapshot: Snapshot

    def __repr__(self) -> str:
        return block_map_text(self.snapshot)

    def _repr_html_(self) -> str:
        return block_map_html(self.snapshot)
