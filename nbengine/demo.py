"""`python -m nbengine.demo`: eight conversations with a small chat model, batched live.

What is shown was chosen for what the scheduler must do: A, C and G share a long system prompt
(prefix hits), D brings a long text (chunked prefill), and the blocks are too few for everybody
(preemption, eviction). On a terminal the picture of `terminal_view` follows every step; elsewhere
the steps in which something was decided are printed as lines. All figures come from the engine's
step records.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from nbengine.core.records import StepRecord
from nbengine.core.sampling_params import SamplingParams
from nbengine.core.snapshot import Snapshot
from nbengine.errors import NbengineError
from nbengine.terminal_view import COLOURS, Conversation, decisions, follow, picture

if TYPE_CHECKING:
    from nbengine.llm import LLM

MODEL = "smollm2-135m"
ENGINE: dict[str, Any] = {
    "quantization": "int4",
    "num_gpu_blocks_override": 52,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 6,
}
SECONDS_A_STEP = 0.06
"""At least, on a terminal: so that the eye can follow. Times in the summary leave waits out."""

TEACHER = (
    "You are a patient science teacher at a village school. Your pupils are ten years old, curious "
    "about everything, and quickly bored. Answer every question in two or three short sentences, "
    "with words that a child knows, and with one example from daily life: the kitchen, the garden, "
    "the playground or the weather. Never use a formula. Never say that a question is too hard. "
    "If a pupil is wrong, say first what is right about the idea, and then what really happens. "
    "Be friendly, be precise, and do not repeat the question before you answer it."
)
STORY = (
    "The lighthouse on the north cape had been dark for eleven years when Mara bought it. The "
    "harbour office sold it for the price of a used car, because the road had slipped into the sea "
    "and nobody wanted to carry bricks up a goat path. She carried them herself, forty at a time, "
    "from May to September. In October a storm took the roof off the boat house and left a whale's "
    "rib on the doorstep, and she made it into the arch above the door. In winter she taught "
    "herself to grind lenses. The first ones were cloudy, the next ones cracked, and the ninth threw "
    "a clean white circle onto the kitchen wall. In spring the fishermen saw a light on the cape and "
    "thought that it was a star. When they understood what it was, they came up the path one after "
    "the other with paint, glass, copper wire and smoked fish, and nobody spoke about the years in "
    "which they had steered by memory. The harbour office sent a letter that asked for the lamp's "
    "permit. Mara framed it and hung it next to the rib. On the first night of the herring season "
    "fog came in, thick as wool, and eleven boats were still outside. She burned the lamp until the "
    "oil was gone, and then the chairs, and then the kitchen table. All eleven came home. The next "
    "morning a new table stood at the foot of the goat path, and around it twelve chairs."
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A conversation and the step at which it arrives."""

    name: str
    arrives_at: int
    question: str
    max_tokens: int
    system: str | None = None
    text: str = ""
    """What the question is about; follows it in the prompt."""

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        content = f"{self.question}\n\n{self.text}" if self.text else self.question
        return [*system, {"role": "user", "content": content}]


PLAN = (
    Planned("A", 0, "Why is the sky blue?", 72, system=TEACHER),
    Planned("B", 0, "Suggest three names for a ginger cat.", 48),
    Planned("C", 8, "Why do leaves turn red in autumn?", 72, system=TEACHER),
    Planned("D", 12, "What did Mara burn in the night of the fog, and why?", 72, text=STORY),
    Planned("E", 20, "Write a poem of four lines about the rain.", 80),
    Planned("F", 28, "What should I pack for three days in the mountains?", 96),
    Planned("G", 36, "Why does ice float on water?", 72, system=TEACHER),
    Planned("H", 44, "Explain what an operating system does.", 80),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What there is to show after a step."""

    conversations: list[Conversation]
    snapshot: Snapshot
    records: list[StepRecord]
    """All so far, oldest first."""


def main() -> int:
    console = Console()
    try:
        with console.status("Loading SmolLM2-135M-Instruct ..."):
            from nbengine.llm import LLM

            llm = LLM(MODEL, **ENGINE)
        with llm:
            frame = watch(console, play(llm, PLAN))
    except NbengineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if frame is not None:
        tell(console, frame)
    return 0


def play(llm: LLM, plan: Sequence[Planned]) -> Iterator[Frame]:
    """Submit each conversation when its step has come, and step until all have ended."""
    engine = llm.engine
    coming = deque(plan)
    shown = {p.name: Conversation(p.name, p.question, "later") for p in plan}
    records: list[StepRecord] = []
    while coming or engine.has_work:
        while coming and (coming[0].arrives_at <= len(records) or not engine.has_work):
            submit(llm, coming.popleft())
        records.append(engine.step())
        snapshot = engine.snapshot()
        for seq in (*snapshot.running, *snapshot.waiting):
            shown[seq.request_id] = follow(shown[seq.request_id], seq)
        for name, reason, _ in records[-1].finished:
            answer = engine.output(name).outputs[0]
            shown[name] = replace(
                shown[name],
                state=reason,
                text=answer.text,
                num_output_tokens=len(answer.token_ids),
            )
        yield Frame(list(shown.values()), snapshot, records)


def submit(llm: LLM, planned: Planned) -> None:
    from nbengine.llm import chat_prompt

    llm.engine.add_request(
        chat_prompt(llm.get_tokenizer(), planned.messages),
        SamplingParams(
            temperature=0.2,
            top_p=0.9,
            repetition_penalty=1.1,
            seed=0,
            max_tokens=planned.max_tokens,
        ),
        request_id=planned.name,
    )


# --- While it runs --------------------------------------------------------------------------------


def watch(console: Console, frames: Iterator[Frame]) -> Frame | None:
    """Show each frame, and return the last one; an interrupt ends the show, not the program."""
    last = None
    try:
        if not console.is_terminal:
            for last in frames:
                print_decisions(console, last)
            return last
        with Live(console=console, screen=True, auto_refresh=False) as live:
            title = "nbengine: SmolLM2-135M-Instruct"
            due = time.monotonic()
            for last in frames:
                live.update(
                    picture(
                        title,
                        last.conversations,
                        last.snapshot,
                        last.records,
                        (console.size.width, console.size.height),
                    ),
                    refresh=True,
                )
                due = max(due + SECONDS_A_STEP, time.monotonic())
                time.sleep(due - time.monotonic() if due > time.monotonic() else 0)
    except KeyboardInterrupt:
        console.print("Interrupted.")
    return last


def print_decisions(console: Console, frame: Frame) -> None:
    """One line for a step in which something new was decided."""
    record = frame.records[-1]
    words = decisions(record)
    known = decisions(frame.records[-2]) if len(frame.records) > 1 else []
    if any(word not in known and not word.startswith("evicts") for word in words):
        console.print(
            f"step {record.step:4}  {record.num_tokens:4} tokens, "
            f"{len(record.scheduled)} sequences  {', '.join(words)}",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


# --- Afterwards -----------------------------------------------------------------------------------


def tell(console: Console, frame: Frame) -> None:
    """The answers, what the scheduler did, and where to go next."""
    for i, c in enumerate(frame.conversations):
        console.print(Text(f"{c.name}  {c.question}", style=f"bold {COLOURS[i % len(COLOURS)]}"))
        ending = " [...]" if c.state == "length" else ""
        console.print(Text(c.text.strip() + ending), soft_wrap=False)
        console.print()
    console.print(
        Text("(135 million parameters: fluent, and seldom to be believed.)\n", style="dim")
    )
    console.print(Text("What the scheduler did", style="bold"))
    for line in summary(frame.records):
        console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))
    console.print()
    console.print(Text("Where to go next", style="bold"))
    for command, what in NEXT:
        console.print(Text(f"  {command:12}", style="bold").append(what, style="not bold"))


NEXT = (
    ("make lab", "the notebooks: step the engine by hand, watch its blocks, ask it why"),
    ("README.md", "the same from Python, in a few lines"),
    ("make test", "everything that must hold, on this machine"),
)


def summary(records: Sequence[StepRecord]) -> list[str]:
    """What `records` say about a run, as sentences with numbers. Times are sums of the steps' own
    phases, so that pauses between steps do not count."""
    records = [record for record in records if record.scheduled]
    if not records:
        return ["No step was taken."]
    seconds = sum(record.phases.total for record in records)
    computed = sum(record.num_tokens for record in records)
    sampled = sum(len(record.sampled) for record in records)
    batches = [len(record.scheduled) for record in records]
    lines = [
        f"{len(records)} steps in {seconds:.1f} s: {computed} tokens computed, {sampled} sampled "
        f"({sampled / max(seconds, 1e-9):.0f} a second)",
        f"up to {max(batches)} sequences in a step, {statistics.mean(batches):.1f} on average; at "
        f"most {max(r.num_tokens for r in records)} tokens (budget: {records[0].token_budget})",
    ]
    hits = [a for r in records for a in r.admitted if a.prefix.num_hit_tokens and not a.resumed]
    if hits:
        found = sum(a.prefix.num_hit_tokens for a in hits)
        lines.append(
            f"prefix cache: {found} prompt tokens of {_names(a.seq_id for a in hits)} were there "
            "already and not computed again"
        )
    for name, chunks in prompt_chunks(records).items():
        if len(chunks) > 1:
            sizes = " + ".join(map(str, chunks))
            lines.append(f"chunked prefill: {name}'s prompt was computed in pieces of {sizes}")
    lines += [
        f"preemption: {p.seq_id} gave up its {p.num_blocks} blocks {p.occasion}; no text lost, "
        f"at most {p.num_lost_tokens} tokens to compute again"
        for record in records
        for p in record.preempted
    ]
    evicted = sum(len(r.evicted) for r in records)
    if evicted:
        lines.append(f"eviction: {evicted} cached blocks made room, least recently used first")
    firsts = sorted(times_to_first_token(records).values())
    if firsts:
        lines.append(
            f"time to first token: {1000 * statistics.median(firsts):.0f} ms (median), "
            f"{1000 * firsts[-1]:.0f} ms at most, waiting included"
        )
    return lines


def prompt_chunks(records: Sequence[StepRecord]) -> dict[str, list[int]]:
    """The tokens computed for each sequence, step by step, until it got its first token."""
    chunks: dict[str, list[int]] = {}
    done: set[str] = set()
    for record in records:
        for seq_id, num_tokens in record.scheduled.items():
            if seq_id not in done:
                chunks.setdefault(seq_id, []).append(num_tokens)
        done |= record.sampled.keys()
    return chunks


def times_to_first_token(records: Sequence[StepRecord]) -> dict[str, float]:
    """Seconds that the engine worked from a request's arrival to the end of the step that gave its
    first token."""
    waited: dict[str, float] = {}
    first: dict[str, float] = {}
    for record in records:
        waited |= {request.request_id: 0.0 for request in record.added}
        for name in waited:
            waited[name] += record.phases.total
        for name in record.sampled:
            first.setdefault(name, waited.get(name, 0.0))
    return first


def _names(names: Iterator[str]) -> str:
    *rest, last = dict.fromkeys(names)
    return f"{', '.join(rest)} and {last}" if rest else last


if __name__ == "__main__":
    sys.exit(main())
