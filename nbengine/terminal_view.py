"""The engine's state drawn for a terminal: conversations, block map and step table.

Pure functions from plain data (a `Snapshot`, `StepRecord`s, texts) to `rich` renderables; the demo
calls them once a step. A sequence is told by its letter as well as by its colour, a shared block by
its number of holders, so that nothing is lost without colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nbengine.core.records import StepRecord
from nbengine.core.snapshot import SequenceView, Snapshot

COLOURS = ("#5fafff", "#ffaf5f", "#5fd787", "#ff87d7", "#d7d75f", "#5fd7d7", "#d787ff", "#ff8787")
SHARED, CACHED, FREE = "bold black on #e4e4e4", "#a8a8a8", "#6c6c6c"
SMALLEST = (72, 20)
"""Columns and rows below which the picture would not fit."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the picture shows of one request."""

    name: str
    """The request's id; its first letter marks its blocks."""
    question: str
    state: str
    """`later`, `waiting`, `running`, `preempted`, or how it finished."""
    text: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0
    num_output_tokens: int = 0


def follow(conversation: Conversation, sequence: SequenceView) -> Conversation:
    """`conversation` as it stands now that `sequence` is its live sequence."""
    return Conversation(
        conversation.name,
        conversation.question,
        str(sequence.status),
        sequence.text,
        sequence.num_prompt_tokens,
        sequence.num_cached_tokens,
        sequence.num_computed_tokens,
        sequence.num_output_tokens,
    )


def picture(
    title: str,
    conversations: Sequence[Conversation],
    snapshot: Snapshot,
    records: Sequence[StepRecord],
    size: tuple[int, int],
) -> RenderableType:
    """Everything, for a terminal of `size` columns and rows. `records` are oldest first."""
    columns, rows = size
    if columns < SMALLEST[0] or rows < SMALLEST[1]:
        lines = (str(record) for record in records[-max(1, rows - 1) :])
        return Text("\n".join(line[: columns - 1] for line in lines))
    colours = colours_of(conversations)
    left = columns // 2
    right = columns - left
    map_text = block_map(snapshot, colours, right - 4)
    map_height = min(len(map_text.split("\n")) + 2, rows // 2)
    layout = Layout()
    layout.split_row(Layout(name="left", size=left), Layout(name="right"))
    layout["left"].update(
        Panel(conversation_list(conversations, colours, left - 4, rows - 2), title=title)
    )
    held = f"KV blocks: {snapshot.num_held_blocks} of {snapshot.num_blocks} held"
    layout["right"].split_column(Layout(name="map", size=map_height), Layout(name="steps"))
    layout["map"].update(Panel(map_text, title=held))
    layout["steps"].update(
        Panel(step_table(records, colours, rows - map_height - 3, right - 4), title="steps")
    )
    return layout


def colours_of(conversations: Sequence[Conversation]) -> dict[str, str]:
    return {c.name: COLOURS[i % len(COLOURS)] for i, c in enumerate(conversations)}


# --- Conversations --------------------------------------------------------------------------------


def conversation_list(
    conversations: Sequence[Conversation], colours: Mapping[str, str], width: int, height: int
) -> Text:
    """Each conversation in an equal share of `height` lines: its question and state, then as many
    of the last lines of its answer as fit."""
    share, spare = divmod(height, max(1, len(conversations)))
    result = Text(no_wrap=True, overflow="crop")
    for i, conversation in enumerate(conversations):
        lines = _conversation_lines(
            conversation, colours[conversation.name], width, share + (i < spare)
        )
        for line in lines:
            result.append_text(line).append("\n")
    result.rstrip()
    return result


def _conversation_lines(
    conversation: Conversation, colour: str, width: int, height: int
) -> list[Text]:
    facts = state_in_words(conversation)
    room = width - len(facts) - 4
    question = conversation.question
    if len(question) > room:
        question = question[: max(0, room - 1)] + "…"
    head = Text(f" {conversation.name[0]} ", style=f"black on {colour}")
    head.append(f" {question.ljust(room)}", style="default on default bold")
    head.append(facts, style="default on default dim")
    if height <= 1:
        return [head]
    answer = wrapped(conversation.text, width - 2)[-(height - 1) :]
    lines = [head, *(Text(f"  {line}", style=colour) for line in answer)]
    return lines + [Text()] * (height - len(lines))


def state_in_words(conversation: Conversation) -> str:
    """How far a conversation is, in a few characters."""
    c = conversation
    match c.state:
        case "later":
            return ""
        case "waiting":
            return "waiting"
        case "preempted":
            return f"preempted, {c.num_output_tokens} tokens kept"
        case "running" if c.num_computed_tokens < c.num_prompt_tokens:
            return f"prompt {c.num_computed_tokens}/{c.num_prompt_tokens}"
        case "running":
            return f"{c.num_output_tokens} tokens"
        case _:
            return f"{c.num_output_tokens} tokens, {c.state}"


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` terminal cells, broken between words where possible."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            while cell_len(word) > width:  # A word that no line holds
                cut = next(n for n in range(len(word), 0, -1) if cell_len(word[:n]) <= width)
                lines += [line] if line else []
                lines.append(word[:cut])
                line, word = "", word[cut:]
            if not line:
                line = word
            elif cell_len(line) + 1 + cell_len(word) <= width:
                line += " " + word
            else:
                lines.append(line)
                line = word
        if line:
            lines.append(line)
    return lines


# --- Blocks ---------------------------------------------------------------------------------------


def block_map(snapshot: Snapshot, colours: Mapping[str, str], width: int) -> Text:
    """One cell of two columns a block, in the order of block ids, and a legend."""
    holders = snapshot.holders()
    cached = set(snapshot.cached_blocks)
    per_row = max(1, width // 2)
    result = Text(no_wrap=True, overflow="crop")
    for block in range(snapshot.num_blocks):
        if block and block % per_row == 0:
            result.append("\n")
        names = holders.get(block, [])
        if len(names) > 1:
            result.append(f"{min(len(names), 9)} ", style=SHARED)
        elif names:
            name = names[0].partition("#")[0]
            result.append(f"{name[0]} ", style=f"black on {colours.get(name, 'white')}")
        elif block in cached:
            result.append("+ ", style=CACHED)
        else:
            result.append(". ", style=FREE)
    result.append("\n\n")
    result.append("A", style="reverse").append(" held  ")
    result.append("2", style=SHARED).append(" shared by 2  ")
    result.append("+", style=CACHED).append(" cached prefix  ")
    result.append(".", style=FREE).append(" free")
    return result


# --- Steps ----------------------------------------------------------------------------------------


def step_table(
    records: Sequence[StepRecord], colours: Mapping[str, str], rows: int, width: int
) -> RenderableType:
    """The last steps, newest at the bottom: tokens computed, by whom, and what was decided."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, width=width)
    table.add_column("step", justify="right", width=4)
    table.add_column("tok", justify="right", width=4)
    table.add_column("who", no_wrap=True, width=13)
    table.add_column("decisions", no_wrap=True, ratio=1, overflow="ellipsis")
    for record in records[-max(1, rows - 1) :]:
        who = Text()
        for seq_id, num_tokens in record.scheduled.items():
            name = seq_id.partition("#")[0]
            label = seq_id if num_tokens == 1 else f"{seq_id}:{num_tokens} "
            who.append(label, style=colours.get(name, "default"))
        table.add_row(
            str(record.step), str(record.num_tokens), who, Text(", ".join(decisions(record)))
        )
    return table


def decisions(record: StepRecord) -> list[str]:
    """What the scheduler decided in a step besides going on as before, most telling first."""
    words = [f"{p.seq_id} preempted {p.occasion}" for p in record.preempted]
    for admission in record.admitted:
        verb = "resumes" if admission.resumed else "enters"
        hit = admission.prefix.num_hit_tokens
        words.append(f"{admission.seq_id} {verb}" + (f" ({hit} cached)" if hit else ""))
    words += [f"{f.seq_id} done ({f.reason})" for f in record.finished]
    if record.evicted:
        words.append(f"evicts {len(record.evicted)}")
    words += [f"{copy.seq_id} copies a block" for copy in record.copied]
    gone = {p.seq_id for p in record.preempted}
    words += [
        f"{w.seq_id} waits: {w.cause}" for w in record.waits if not w.got and w.seq_id not in gone
    ]
    return words
