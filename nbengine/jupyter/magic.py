"""What the classes of magics share: the decorator, the notebook's engine, completion.

A magic's method takes parsed arguments and the cell's body. Every magic has `--help`, completes its
options and the names that it asks for, and shows a mistake of the user's as one message.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

from IPython.core.error import TryNext, UsageError
from IPython.core.magic import Magics, line_magic
from IPython.core.magic_arguments import argument, kwds, magic_arguments
from IPython.utils.process import arg_split

from nbengine.engine import Engine
from nbengine.errors import NbengineError
from nbengine.jupyter.progress_line import progress_line
from nbengine.kernels.diagnostics import CompileError
from nbengine.llm import LLM

DEFAULT_MODEL = "smollm2-135m"


def magic(
    kind: Callable[[Any], Any], *options: Any, tells_progress: bool = False
) -> Callable[[Any], Any]:
    """A magic whose method takes parsed arguments and the cell's body. An error of the user's shows
    as its message alone (a compiler's, with its own colours); any other keeps its traceback.
    `tells_progress`: it may take seconds, shows nothing itself, and what is being done is shown
    meanwhile."""

    def decorate(method: Callable[..., Any]) -> Any:
        @functools.wraps(method)
        def run(self: EngineMagics, line: str, cell: str | None = None) -> Any:
            words = arg_split(line, strict=False)
            if words and words[0] in ("-h", "--help"):
                print(parser.format_help())
                return None
            shown = progress_line(self.shell) if tells_progress else nullcontext()
            try:
                arguments = _parsed(parser, words)
                with shown:
                    return method(self, arguments, cell)
            except CompileError:
                raise
            except KeyboardInterrupt:
                raise Interrupted(f"{escape}{method.__name__} was interrupted") from None
            except NbengineError as error:
                raise UsageError(f"{type(error).__name__}: {error}") from error

        for option in reversed((*options, _HELP)):
            option(run)
        kwds(formatter_class=_HelpFormatter, description=inspect.getdoc(method))(run)
        escape = "%" if kind is line_magic else "%%"
        magic_arguments(f"{escape}{method.__name__}")(run)
        parser = run.parser  # type: ignore[attr-defined]  # set by magic_arguments
        return kind(run)

    return decorate


class Interrupted(KeyboardInterrupt):
    """A user's interrupt, shown in a line: where it came to is nobody's business, and a traceback
    would quote the whole cell."""

    def _render_traceback_(self) -> list[str]:
        return [f"\033[31mKeyboardInterrupt\033[39m: {self}"]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Text as it is read. IPython's own formatter writes for a converter to reStructuredText."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = "") -> None:
        super().add_usage(usage, actions, groups, prefix)


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Raises `UsageError`; of an option that there is not, with the one that was meant."""
    arguments, unknown = parser.parse_known_args(words)
    if not unknown:
        return arguments
    options = [option for action in parser._actions for option in action.option_strings]
    said = [
        f"{word} (did you mean {close[0]}?)"
        if word.startswith("-")
        and (close := difflib.get_close_matches(word.partition("=")[0], options, n=1))
        else word
        for word in unknown
    ]
    raise UsageError(f"unrecognized arguments: {' '.join(said)}")


_HELP = argument("-h", "--help", action="store_true", help="show this")


def quotable(value: str) -> str:
    r"""An option's text; in quotes it is read as a Python string, so that "\n" is a new line."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        try:
            return str(ast.literal_eval(value))
        except (ValueError, SyntaxError) as error:
            raise argparse.ArgumentTypeError(f"{value} is no Python string") from error
    return value


def without_body_as_line(lines: list[str]) -> list[str]:
    """A cell magic of ours with nothing below it is the line magic of the same name: IPython refuses
    an empty body, and `%%nb_kernel --help` should say what it does."""
    if lines and lines[0].startswith("%%nb_") and not "".join(lines[1:]).strip():
        return [lines[0][1:]]
    return lines


class EngineMagics(Magics):
    """Magics that work on the `engine` (or `llm`) of the user's namespace."""

    option_values: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What an option's value may be, for completion."""

    @property
    def _names(self) -> dict[str, Any]:
        return self.shell.user_ns

    @property
    def _engine(self) -> Engine:
        """The notebook's engine. Raises `UsageError` without one."""
        engine = self._engine_or_none
        if engine is None:
            raise UsageError(f"no engine is loaded: run %nb_load {DEFAULT_MODEL} first")
        if engine.is_closed:
            raise UsageError(f"the engine was closed: run %nb_load {DEFAULT_MODEL} again")
        return engine

    @property
    def _engine_or_none(self) -> Engine | None:
        """It may be closed."""
        engine = self._names.get("engine")
        if not isinstance(engine, Engine):
            llm = self._names.get("llm")
            engine = llm.engine if isinstance(llm, LLM) else None
        return engine

    def complete(self, shell: Any, event: Any) -> list[str]:
        """What may follow on a magic's line: its options, and names that it asks for."""
        words = event.line.split()
        name = words[0].lstrip("%")
        method = self.shell.find_line_magic(name)
        if method is None:
            raise TryNext
        before = words[: -1 if event.symbol else None]  # without the word that is being typed
        if before[-1] in self.option_values:
            return list(self.option_values[before[-1]])
        parser = method.__func__.parser
        options = [option for action in parser._actions for option in action.option_strings]
        return [*options, *self._values(name)]

    def _values(self, name: str) -> Iterable[str]:
        """What a magic's arguments may be."""
        return ()
