"""The documentation's settings, and what is written anew at every build so that it has one source:
the tables of settings, magics and errors (from the code) and the lessons (from `notebooks/`).

Built by `make docs`: Sphinx reads Markdown through MyST, and notebooks with the outputs they ship.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import nbengine  # noqa: E402
from nbengine import errors  # noqa: E402
from nbengine.config import EngineConfig  # noqa: E402

project = "nbengine"
author = "the nbengine authors"
release = version = nbengine.__version__
copyright = author

# A lesson shows errors of compilers, which are no Python tracebacks.
suppress_warnings = ["misc.highlighting_failure"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["generated/*"]
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["wide.css"]
html_title = "nbengine"
html_show_copyright = html_show_sphinx = html_copy_source = False
pygments_style, pygments_dark_style = "friendly", "monokai"

nb_execution_mode = "off"
myst_heading_anchors = 3

default_role = "code"  # the docstrings' single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
# Long unions of prompt types are aliases in the code, and so they are here.
autodoc_type_aliases = {"Prompt": "Prompt", "Params": "Params", "Seq": "Sequence"}


def setup(app: Any) -> None:
    app.connect("config-inited", lambda *_: write_generated())
    app.connect("autodoc-process-signature", without_fields)


def without_fields(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """A record that only the engine makes is shown without its long constructor."""
    made_by_engine = (
        *("records", "snapshot", "why", "outputs", "history", "logprobs", "compare"),
        *("probe", "rewind", "breakpoints", "startup"),
    )
    module = getattr(obj, "__module__", "").rpartition(".")[2]
    return ("", "") if what == "class" and module in made_by_engine else None


def write_generated() -> None:
    generated, lessons = DOCS / "generated", DOCS / "lessons"
    for folder in (generated, lessons):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for notebook in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        # One folder deeper than in the repository: links into docs/ become shorter.
        text = notebook.read_text().replace("](../docs/", "](../")
        (lessons / notebook.name).write_text(text)
    (generated / "settings.md").write_text(table(("Field", "Default", "Meaning"), settings()))
    (generated / "magics.md").write_text(table(("Magic", "What it does"), magics()))
    (generated / "errors.md").write_text(table(("Error", "Also a", "Raised for"), error_classes()))


def table(headers: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [headers, tuple("---" for _ in headers), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines
    )


def settings() -> Iterator[tuple[str, ...]]:
    """The fields of `EngineConfig`, each with the string below it."""
    (definition,) = ast.parse(inspect.getsource(EngineConfig)).body
    assert isinstance(definition, ast.ClassDef)
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign):
            continue
        assert isinstance(field.target, ast.Name)
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        assert documented, f"EngineConfig.{field.target.id} has no docstring"
        default = f"`{ast.unparse(field.value)}`" if field.value else "required"
        yield f"`{field.target.id}`", default, one_line(after.value.value)


def magics() -> Iterator[tuple[str, ...]]:
    from nbengine.jupyter.extension import NbengineMagics
    from nbengine.jupyter.kernel_bench import KernelMagics

    for group in (NbengineMagics, KernelMagics):
        for name, method in vars(group).items():
            if name in group.magics["line"]:
                called = f"`%{name}`" + (f", `%%{name}`" if name in group.magics["cell"] else "")
                # The docstring begins with the parser's usage, set off by an empty line.
                yield called, first_paragraph(inspect.getdoc(method.__wrapped__) or "")


def error_classes() -> Iterator[tuple[str, ...]]:
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            others = [b.__name__ for b in value.__bases__ if b not in (Exception,)]
            also = ", ".join(f"`{other}`" for other in others)
            yield f"`{name}`", also, one_line(inspect.getdoc(value) or "")


def first_paragraph(text: str) -> str:
    return one_line(text.split("\n\n", 1)[0])


def one_line(text: str) -> str:
    return " ".join(text.split())
