"""How the engine's objects look in a notebook (HTML) and in a terminal (text).

The core's classes call these from their `_repr_html_` and `__repr__`, importing this module only
then; nothing here needs IPython. Colours and meanings are those of `block_map`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nbengine.core.records import StepRecord, Wait
from nbengine.core.snapshot import SequenceView, Snapshot
from nbengine.jupyter.block_map import (
    PALETTE,
    block_map_html,
    block_map_text,
    colour_index,
    swatch,
)

if TYPE_CHECKING:
    from nbengine.core.history import History
    from nbengine.engine import Engine
    from nbengine.outputs import CompletionOutput, RequestOutput

TEXT_TAIL = 60
"""Characters of a sequence's text that a row of a table shows."""
MAX_ROWS = 50


def tail(text: str, length: int = TEXT_TAIL) -> str:
    """The end of a text, on one line."""
    line = " ".join(text[-2 * length :].split())
    if len(line) <= length:
        return line
    cut = line[1 - length :]
    partial, space, rest = cut.partition(" ")
    return "…" + (rest if space and len(partial) < length // 2 else cut)  # from a whole word on


def table_html(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    cell = "style='text-align:left;padding:.15em .6em;vertical-align:top'"
    head = "".join(f"<th {cell}>{escape(name)}</th>" for name in headers)
    body = "".join(
        "<tr>" + "".join(f"<td {cell}>{value}</td>" for value in row) + "</tr>" for row in rows
    )
    return (
        "<table style='border-collapse:collapse;margin:.3em 0'>"
        f"{f'<thead><tr>{head}</tr></thead>' if headers else ''}<tbody>{body}</tbody></table>"
    )


def table_text(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in columns of plain text."""
    lines = [list(headers), *([str(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    return "\n".join(
        "  ".join(f"{value:<{width}}" for value, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


# ------------------------------------------------------------------ queues


def why_it_waits(record: StepRecord | None) -> dict[str, Wait]:
    """Sequence id to the reason, from the latest step, why it got less than it wanted."""
    return {} if record is None else {wait.seq_id: wait for wait in record.waits}


def _queue_row(seq: SequenceView) -> tuple[str, ...]:
    return (
        str(seq.status),
        f"{seq.num_computed_tokens}/{seq.num_tokens}",
        f"{seq.num_prompt_tokens}+{seq.num_output_tokens}",
        str(len(seq.block_table)),
        tail(seq.text),
    )


_QUEUE_HEADERS = ("request", "state", "computed", "prompt+output", "blocks", "text")


def snapshot_text(snapshot: Snapshot) -> str:
    """Queues and block map."""
    sequences = (*snapshot.running, *snapshot.waiting)
    lines = [
        f"step {snapshot.step}, policy {snapshot.policy}: {len(snapshot.running)} running, "
        f"{len(snapshot.waiting)} waiting"
    ]
    if sequences:
        rows = [(seq.seq_id, *_queue_row(seq)) for seq in sequences[:MAX_ROWS]]
        lines.append(table_text(_QUEUE_HEADERS, rows))
    if len(sequences) > MAX_ROWS:
        lines.append(f"... and {len(sequences) - MAX_ROWS} more")
    return "\n".join([*lines, block_map_text(snapshot)])


def snapshot_html(snapshot: Snapshot) -> str:
    """Queues and block map."""
    sequences = (*snapshot.running, *snapshot.waiting)
    rows = [
        (
            f"<span style='white-space:nowrap'>{swatch(seq.seq_id)} {escape(seq.seq_id)}</span>",
            *map(escape, _queue_row(seq)),
        )
        for seq in sequences[:MAX_ROWS]
    ]
    queues = table_html(_QUEUE_HEADERS, rows) if rows else "<div>No requests.</div>"
    if len(sequences) > MAX_ROWS:
        queues += f"<div>and {len(sequences) - MAX_ROWS} more</div>"
    return (
        f"<div><b>Step {snapshot.step}</b>, policy {escape(snapshot.policy)}: "
        f"{len(snapshot.running)} running, {len(snapshot.waiting)} waiting</div>"
        f"{queues}{block_map_html(snapshot)}"
    )


# ------------------------------------------------------------------ steps


def events_of(record: StepRecord) -> list[str]:
    """What happened in a step besides computing, a line each."""
    events = [f"error, step taken back: {record.error}"] if record.error else []
    for admission in record.admitted:
        verb = "resumed" if admission.resumed else "admitted"
        hit = admission.prefix.num_hit_tokens
        events.append(f"{verb} {admission.seq_id}" + (f" ({hit} tokens cached)" if hit else ""))
    events += [
        f"preempted {p.seq_id} {p.occasion} ({p.mode}, {p.num_lost_tokens} tokens lost)"
        for p in record.preempted
    ]
    events += [f"forked {f.parent} into {f.child}" for f in record.forked]
    events += [f"copied block {c.source} to {c.destination} for {c.seq_id}" for c in record.copied]
    if record.evicted:
        n = len(record.evicted)
        events.append(f"evicted {n} cached block{'s' if n > 1 else ''}")
    events += [f"finished {f.seq_id} ({f.reason})" for f in record.finished]
    return events


def budget_parts(record: StepRecord, limit: int = 32) -> list[tuple[str, int]]:
    """(sequence id, tokens) of a step, for a bar; beyond `limit`, the rest as one with no id."""
    parts = list(record.scheduled.items())
    rest = sum(n for _, n in parts[limit:])
    return parts[:limit] + ([("", rest)] if rest else [])


def budget_bar(record: StepRecord) -> str:
    """How a step's token budget was shared out, as a bar in the sequences' colours."""
    segments = "".join(
        f"<span title='{escape(name or 'others')}: {n} tokens' style='width:"
        f"{100 * n / record.token_budget:.2f}%;min-width:2px;background:"
        f"{PALETTE[colour_index(name)] if name else 'currentColor'}'></span>"
        for name, n in budget_parts(record)
    )
    return (
        "<span style='display:inline-flex;width:9em;height:.7em;overflow:hidden;"
        "outline:1px solid color-mix(in srgb,currentColor 35%,transparent)'>"
        f"{segments}</span>"
    )


def _step_cells(record: StepRecord) -> tuple[str, ...]:
    blocks = f"{record.num_held_blocks}/{record.num_cached_blocks}/{record.num_free_blocks}"
    return (
        str(record.step),
        f"{record.num_tokens}/{record.token_budget}",
        ", ".join(f"{seq_id} {n}" for seq_id, n in budget_parts(record, 8)) or "nobody",
        blocks,
        f"{1e3 * record.phases.total:.1f}",
        "; ".join(events_of(record)),
    )


_STEP_HEADERS = ("step", "tokens", "computed", "held/cached/free", "ms", "events")


def steps_text(records: Sequence[StepRecord]) -> str:
    """Steps in rows, oldest first."""
    return table_text(_STEP_HEADERS, map(_step_cells, records)) if records else "no steps"


def steps_html(records: Sequence[StepRecord]) -> str:
    """Steps in rows, oldest first."""
    if not records:
        return "<div>No steps.</div>"
    rows = []
    for record in records:
        step, tokens, computed, *rest = map(escape, _step_cells(record))
        rows.append((step, tokens, f"{budget_bar(record)}<br><small>{computed}</small>", *rest))
    return table_html(_STEP_HEADERS, rows)


_MOST_LISTED = 12


def _blocks_shown(blocks: Sequence[int]) -> str:
    """`3-7, 12`; cut after some."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:_MOST_LISTED]]
    return ", ".join(parts) + (", …" if len(runs) > _MOST_LISTED else "")


def _listed(lines: Sequence[str]) -> str:
    shown = [f"<div>{escape(line)}</div>" for line in lines[:_MOST_LISTED]]
    if len(lines) > _MOST_LISTED:
        shown.append(f"<div>and {len(lines) - _MOST_LISTED} more</div>")
    return "".join(shown)


def record_html(record: StepRecord) -> str:
    """One step as a card: the budget and who got it, who did not and why, what became of blocks, and
    where the time went."""
    got = " ".join(
        f"<span style='white-space:nowrap'>{swatch(name) if name else ''} {escape(name or 'others')}"
        f" <b>{n}</b></span>"
        for name, n in budget_parts(record, 24)
    )
    arrivals = [f"{r.request_id} ({r.num_prompt_tokens} prompt tokens)" for r in record.added]
    admitted = [
        f"{a.seq_id} {'resumed' if a.resumed else 'admitted'}: {a.prefix}" for a in record.admitted
    ]
    waits = [f"{wait.seq_id} {wait}" for wait in record.waits]
    ended = [f"{f.seq_id}: {f.reason}" for f in record.finished]
    moves = {
        "taken": record.allocated,
        "shared": record.shared,
        "given back": record.released,
    }
    blocks = [
        f"{verb} by {move.seq_id or 'the prefix cache'}: {_blocks_shown(move.blocks)}"
        for verb, each in moves.items()
        for move in each
    ]
    blocks += [f"copied for {c.seq_id}: {c.source} to {c.destination}" for c in record.copied]
    blocks += [
        f"swapped out of {s.seq_id}: {_blocks_shown(s.device_blocks)}" for s in record.swapped_out
    ]
    blocks += [
        f"swapped in for {s.seq_id}: {_blocks_shown(s.device_blocks)}" for s in record.swapped_in
    ]
    if record.cached:
        blocks.append(
            f"entered the prefix cache: {_blocks_shown([c.block for c in record.cached])}"
        )
    if record.evicted:
        blocks.append(f"evicted: {_blocks_shown(record.evicted)}")
    preempted = [
        f"{p.seq_id} {p.occasion}: {p.mode}, {p.num_lost_tokens} tokens lost, "
        f"{p.num_blocks} blocks given up"
        for p in record.preempted
    ]
    sections = [
        ("error", f"<b>taken back</b>: {escape(record.error)}" if record.error else ""),
        ("arrived", _listed(arrivals)),
        ("computed", got or "nobody ran"),
        ("admitted", _listed(admitted)),
        ("less than wanted", _listed(waits)),
        ("preempted", _listed(preempted)),
        ("finished", _listed(ended)),
        ("blocks", _listed(blocks)),
        ("time", _phases_html(record)),
    ]
    rows = [(f"<small>{name}</small>", value) for name, value in sections if value]
    head = (
        f"<div><b>Step {record.step}</b> &nbsp;{budget_bar(record)} {record.num_tokens} of "
        f"{record.token_budget} tokens, {len(record.sampled)} sampled; policy "
        f"{escape(record.policy)}; blocks: {record.num_held_blocks} held, "
        f"{record.num_cached_blocks} cached, {record.num_free_blocks} free</div>"
    )
    return head + table_html((), rows)


def _phases_html(record: StepRecord) -> str:
    """The four phases as parts of a bar, which differ in lightness, and in milliseconds."""
    total = record.phases.total
    if not total:
        return ""
    parts = record.phases._asdict().items()
    bar = "".join(
        f"<span title='{name}' style='width:{100 * seconds / total:.2f}%;background:currentColor;"
        f"opacity:{0.25 + 0.25 * i}'></span>"
        for i, (name, seconds) in enumerate(parts)
    )
    said = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts)
    return (
        "<span style='display:inline-flex;width:9em;height:.7em;overflow:hidden;vertical-align:-1px'>"
        f"{bar}</span> {1e3 * total:.2f} ms: {said}"
    )


def history_html(history: History, limit: int = 20) -> str:
    """The latest steps."""
    records = list(history)[-limit:]
    return f"<div>{escape(repr(history))}; the last {len(records)}:</div>{steps_html(records)}"


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Steps:
    """Some steps in a row, as `%nb_step 5` and `%nb_history` return them."""

    records: tuple[StepRecord, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> StepRecord:
        return self.records[index]

    def __repr__(self) -> str:
        return steps_text(self.records)

    def _repr_html_(self) -> str:
        return steps_html(self.records)


# ------------------------------------------------------------------ the rest


def output_text(output: RequestOutput) -> str:
    """A request's texts."""
    lines = [_output_head(output)]
    for sample in output.outputs:
        label = f"[{sample.index}] " if len(output.outputs) > 1 else ""
        lines.append(f"{label}{sample.text}")
    return "\n".join(lines)


def _output_head(output: RequestOutput) -> str:
    num_tokens = sum(len(sample.token_ids) for sample in output.outputs)
    reasons = {sample.finish_reason for sample in output.outputs if sample.finish_reason}
    state = ", ".join(sorted(reasons)) if output.finished else "unfinished"
    cached = f" ({output.num_cached_tokens} cached)" if output.num_cached_tokens else ""
    return (
        f"{output.request_id}: {len(output.prompt_token_ids)} prompt tokens{cached}, "
        f"{num_tokens} output tokens, {state}{_speed(output)}"
    )


def _speed(output: RequestOutput) -> str:
    metrics = output.metrics
    if metrics.ttft is None or metrics.first_token_time is None:
        return ""
    parts = f", first after {metrics.ttft:.2f} s"
    num_tokens = max((len(sample.token_ids) for sample in output.outputs), default=0)
    elapsed = (metrics.last_token_time or 0) - metrics.first_token_time
    return parts + (f", then {(num_tokens - 1) / elapsed:.1f} tokens/s" if elapsed > 0 else "")


def output_html(output: RequestOutput, show_prompt: bool = True) -> str:
    """A request's texts, behind its prompt."""
    prompt = ""
    if show_prompt and output.prompt is not None and len(output.outputs) <= 1:
        prompt = f"<span style='opacity:.65'>{escape(output.prompt)}</span>"
    blocks = []
    samples: list[CompletionOutput | None] = [*output.outputs]
    for sample in samples or [None]:  # nothing yet: the prompt alone
        text = prompt + (escape(sample.text) if sample else "")
        label = f"<b>{sample.index}</b> " if sample and len(output.outputs) > 1 else ""
        blocks.append(
            "<div style='white-space:pre-wrap;border-left:3px solid "
            f"{PALETTE[colour_index(output.request_id)]};padding:.1em .8em;margin:.4em 0'>"
            f"{label}{text}</div>"
        )
    head = f"<div style='opacity:.75'><small>{escape(_output_head(output))}</small></div>"
    return "".join(blocks) + head


def fields_html(title: str, values: Any) -> str:
    """A dataclass, field by field."""
    rows = [
        (f"<code>{escape(field.name)}</code>", escape(_shown(getattr(values, field.name))))
        for field in dataclasses.fields(values)
    ]
    return f"<details open><summary>{escape(title)}</summary>{table_html(('', ''), rows)}</details>"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def engine_html(engine: Engine) -> str:
    """The engine in a line, and its state."""
    if engine.is_closed:
        return f"<div>{escape(repr(engine))}</div>"
    return f"<div><code>{escape(repr(engine))}</code></div>{snapshot_html(engine.snapshot())}"
