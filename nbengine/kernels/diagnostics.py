"""What compilers say, as data, and shown at the source lines they speak of.

NVRTC (and ptxas behind it) and g++ each have their own log; `parse_nvrtc` and `parse_gcc` read them
into the same `Diagnostic`s. `CompileError` is the one exception of both backends: its message, and
its display in a notebook, hold the user's own lines with the compiler's words at the caret.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nbengine.errors import NbengineError

SHOWN = 3
"""At most so many errors are drawn, in the compiler's order and each message once: the first ones
matter, and of a long output JupyterLab shows the end."""


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One remark of a compiler. Lines and columns count from 1; None where it named none. A column
    counts bytes, as compilers do."""

    file: str
    line: int | None
    column: int | None
    severity: str
    """error, warning or note."""
    message: str
    notes: tuple[str, ...] = ()
    """How the compiler got there: the template instantiations, the includes."""

    @property
    def place(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part)


class CompileError(NbengineError, ValueError):
    """A source does not compile. `diagnostics` are the compiler's remarks, `log` is all it said.

    `texts` are the sources that the remarks speak of, by the name that the compiler has for them;
    other files are read from the disk.
    """

    def __init__(
        self,
        title: str,
        diagnostics: Iterable[Diagnostic],
        texts: Mapping[str, str],
        log: str = "",
    ) -> None:
        self.title, self.diagnostics, self.log = title, tuple(diagnostics), log
        self._texts = dict(texts)
        super().__init__(self._shown(colour=False))

    def _shown(self, colour: bool) -> str:
        drawn = [draw(d, self._texts, colour) for d in self._first]
        return "\n\n".join([self.title, *(drawn or [self.log.strip()]), *self._more()])

    @property
    def _errors(self) -> list[Diagnostic]:
        return [d for d in self.diagnostics if d.severity == "error"]

    @property
    def _first(self) -> list[Diagnostic]:
        """Those that are drawn."""
        by_message: dict[str, Diagnostic] = {}
        for error in self._errors:
            by_message.setdefault(error.message, error)
        return list(by_message.values())[:SHOWN]

    def _more(self) -> list[str]:
        """A line on the errors that are not."""
        num = len(self._errors) - len(self._first)
        if not num:
            return []
        return [
            f"... and {num} more error{'s' * (num > 1)}, which may follow from these (all: .log)"
        ]

    def _render_traceback_(self) -> list[str]:
        """IPython shows this in place of a traceback: the fault is in the source, not in Python."""
        return [*f"{_RED}CompileError{_PLAIN}: {self._shown(colour=True)}".splitlines()]

    def _repr_html_(self) -> str:
        drawn = [draw_html(d, self._texts) for d in self._first]
        body = "\n\n".join([*(drawn or [html.escape(self.log.strip())]), *self._more()])
        return f"<div><b>{html.escape(self.title)}</b><pre>{body}</pre></div>"


def draw(diagnostic: Diagnostic, texts: Mapping[str, str], colour: bool = False) -> str:
    """The remark, the line it speaks of between its neighbours, and a caret."""
    red, bold, plain = (_RED, _BOLD, _PLAIN) if colour else ("", "", "")
    tint = red if diagnostic.severity == "error" else bold
    drawn = [f"{bold}{diagnostic.place}:{plain} {tint}{diagnostic.severity}:{plain} "
             f"{diagnostic.message}"]  # fmt: skip
    for number, line in _excerpt(diagnostic, texts):
        gutter = f"{number:>5} | " if number else "      | "
        drawn.append(f"{gutter}{line}" if number else f"{gutter}{tint}{line}{plain}")
    drawn += [f"        {note}" for note in diagnostic.notes]
    return "\n".join(drawn)


def draw_html(diagnostic: Diagnostic, texts: Mapping[str, str]) -> str:
    """The same, for inside a <pre>."""
    colour = "#c62828" if diagnostic.severity == "error" else "#b26a00"
    drawn = [
        f"<b>{html.escape(diagnostic.place)}:</b> <b style='color:{colour}'>"
        f"{diagnostic.severity}:</b> {html.escape(diagnostic.message)}"
    ]
    for number, line in _excerpt(diagnostic, texts):
        shown = (
            html.escape(line) if number else f"<b style='color:{colour}'>{html.escape(line)}</b>"
        )
        drawn.append(f"<span style='opacity:.5'>{number or '':>5} | </span>{shown}")
    drawn += [f"        {html.escape(note)}" for note in diagnostic.notes]
    return "\n".join(drawn)


def parse_nvrtc(log: str) -> tuple[Diagnostic, ...]:
    """NVRTC's log: `file(line): error: words`, the line, a caret, and how it got there."""
    found: list[Diagnostic] = []
    lines = lines_of(log)
    for at, line in enumerate(lines):
        if match := _NVRTC.match(line):
            column = None
            following = lines[at + 2 : at + 3]
            if following and re.fullmatch(r"\s*\^\s*", following[0]):
                column = following[0].index("^") - len(_NVRTC_INDENT) + 1  # a blank for each byte
            found.append(
                Diagnostic(
                    match["file"],
                    int(match["line"]),
                    column,
                    _severity(match["severity"]),
                    match["message"],
                )
            )
        elif match := _NVRTC_END.match(line):
            found.append(Diagnostic("end of source", None, None, "error", match["message"]))
        elif match := _PTXAS.match(line):
            number = int(match["line"]) if match["line"] else None
            severity = _severity(match["severity"])
            if not (match["message"].startswith("Ptx assembly aborted") and found):
                found.append(Diagnostic("ptxas", number, None, severity, match["message"]))
        elif found and _CONTEXT.match(line):
            note = line.strip().removeprefix("detected during:").strip()
            if note:
                found[-1] = replace(found[-1], notes=(*found[-1].notes, note))
    return _with_notes(found)


def parse_gcc(log: str) -> tuple[Diagnostic, ...]:
    """g++'s and clang's log: `file:line:column: error: words`; `In instantiation of` and `required
    from` lines come before the remark that they explain. Give g++ (11 and later) the option
    `-fdiagnostics-column-unit=byte`: its own columns take a tab for eight."""
    found: list[Diagnostic] = []
    context: list[str] = []
    for line in lines_of(log):
        if match := _GCC.match(line):
            found.append(
                Diagnostic(
                    match["file"],
                    int(match["line"]),
                    int(match["column"]) if match["column"] else None,
                    _severity(match["severity"]),
                    match["message"],
                    tuple(context),
                )
            )
            context = []
        elif match := _GCC_CONTEXT.match(line):
            at = f" at {match['place']}" if match["place"][-1].isdigit() else ""
            context.append(match["message"].rstrip(":") + at)
    return _with_notes(found)


def lines_of(text: str) -> list[str]:
    """As compilers count them: `splitlines` also ends one at a form feed, or at U+2028."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


_RED, _BOLD, _PLAIN = "\x1b[31;1m", "\x1b[1m", "\x1b[0m"
_NVRTC_INDENT = "  "
_SEVERITY = r"(?P<severity>(?:catastrophic |fatal |internal )?error|warning|note|remark)"
_NVRTC = re.compile(rf"(?P<file>\S.*?)\((?P<line>\d+)\): {_SEVERITY}(?: #[\w-]+)?: (?P<message>.*)")
_NVRTC_END = re.compile(r"At end of source: error(?: #[\w-]+)?: (?P<message>.*)")
_PTXAS = re.compile(
    r"\s*ptxas (?:application ptx input, line (?P<line>\d+); )?"
    r"(?P<severity>error|fatal|warning)\s*: (?P<message>.*)"
)
_CONTEXT = re.compile(r"\s{8,}(?:detected during|instantiation of|processing of|\S.* at line \d+)")
_GCC = re.compile(
    rf"(?P<file>[^\s:][^:\n]*):(?P<line>\d+):(?:(?P<column>\d+):)? {_SEVERITY}: (?P<message>.*)"
)
_GCC_CONTEXT = re.compile(
    r"(?P<place>[^:\n]+(?::\d+)*):\s+(?P<message>(?:In instantiation|required from|in ).*)"
)


def _severity(word: str) -> str:
    if word.endswith("error") or word == "fatal":
        return "error"
    return "note" if word == "remark" else word


def _with_notes(found: list[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Notes are put to the remark before them."""
    kept: list[Diagnostic] = []
    for diagnostic in found:
        if diagnostic.severity == "note" and kept:
            note = f"{diagnostic.place}: {diagnostic.message}"
            kept[-1] = replace(kept[-1], notes=(*kept[-1].notes, note, *diagnostic.notes))
        else:
            kept.append(diagnostic)
    return tuple(kept)


def _excerpt(diagnostic: Diagnostic, texts: Mapping[str, str]) -> list[tuple[int | None, str]]:
    """(line number, line); the caret's line has no number."""
    text = texts.get(diagnostic.file)
    if text is None:
        try:
            text = Path(diagnostic.file).read_text(errors="replace")
        except (OSError, ValueError):
            return []
    lines = lines_of(text)
    if diagnostic.line is None or not 0 < diagnostic.line <= len(lines):
        return []
    at = diagnostic.line - 1
    drawn: list[tuple[int | None, str]] = [
        (number + 1, lines[number].expandtabs(4)) for number in range(max(0, at - 1), at + 1)
    ]
    if diagnostic.column is not None:
        before = lines[at].encode()[: diagnostic.column - 1].decode(errors="ignore")
        drawn.append((None, " " * len(before.expandtabs(4)) + "^"))
    if at + 1 < len(lines):
        drawn.append((at + 2, lines[at + 1].expandtabs(4)))
    return drawn
