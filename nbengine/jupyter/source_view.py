"""`SourceView`: source code that shows itself with line numbers, coloured in a notebook and plain in
a terminal. The colours are those of the notebook's own editor, so they follow its theme."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Any

_COLOURS = {  # the most particular first; JupyterLab's variable, and what to do without it
    "Token.Comment.Preproc": ("--jp-mirror-editor-meta-color", "#7a6a2f"),
    "Token.Comment": ("--jp-mirror-editor-comment-color", "#718096"),
    "Token.Keyword": ("--jp-mirror-editor-keyword-color", "#2f8a3c"),
    "Token.Literal.String": ("--jp-mirror-editor-string-color", "#ba4444"),
    "Token.Literal.Number": ("--jp-mirror-editor-number-color", "#0f8a5f"),
    "Token.Name.Function": ("--jp-mirror-editor-def-color", "#3b73d9"),
}


@dataclass(frozen=True, slots=True, repr=False)
class SourceView:
    """`str()` is the text itself."""

    title: str
    text: str
    language: str
    """A name that Pygments knows (cpp), or "text"."""

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = self._coloured().split("\n")
        width = len(str(len(lines)))
        numbered = "\n".join(
            f"<span style='opacity:.45;user-select:none'>{number:>{width}}  </span>{line}"
            for number, line in zip(count(1), lines, strict=False)
        )
        return (
            f"<div><b>{escape(self.title)}</b></div>"
            f"<pre style='max-height:32em;overflow:auto;margin:.3em 0'>{numbered}</pre>"
        )

    def _coloured(self) -> str:
        """HTML; a token of several lines is coloured line by line."""
        text = self.text.rstrip("\n")
        try:
            from pygments import lex
            from pygments.lexers import get_lexer_by_name
        except ImportError:
            return escape(text)
        lexer = get_lexer_by_name(self.language, stripnl=False, ensurenl=False)
        return "".join(
            "\n".join(_span(kind, part) for part in value.split("\n"))
            for kind, value in lex(text, lexer)
        )


def _span(kind: Any, text: str) -> str:
    name = str(kind)
    found = next((colour for prefix, colour in _COLOURS.items() if name.startswith(prefix)), None)
    if found is None or not text.strip():
        return escape(text)
    variable, fallback = found
    return f"<span style='color:var({variable}, {fallback})'>{escape(text)}</span>"
