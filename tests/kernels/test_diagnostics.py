"""Compilers' logs as data, and drawn at the source's lines."""

from __future__ import annotations

import pytest

from nbengine.kernels import CompileError, Diagnostic
from nbengine.kernels.diagnostics import SHOWN, draw, parse_gcc, parse_nvrtc

GCC = """In file included from /tmp/g.cpp:1:
/tmp/g.h: In function 'int h()':
/tmp/g.h:1:32: error: 'zz' was not declared in this scope
    1 | inline int h() { int q; return zz; }
      |                                ^~
/tmp/g.cpp:7:13: warning: unused variable 'unused' [-Wunused-variable]
    7 |         int unused = 5;
/tmp/g.cpp: In instantiation of 'T twice(T) [with T = float]':
/tmp/g.cpp:8:15:   required from here
/tmp/g.cpp:4:12: error: request for member 'foo' in 'x', which is of non-class type 'float'
/tmp/g.cpp:2:3: note: declared here
/tmp/g.cpp:1:10: fatal error: nope.h: No such file or directory
"""


def test_the_log_of_gcc_becomes_data() -> None:
    undeclared, unused, member, missing = parse_gcc(GCC)
    assert undeclared == Diagnostic(
        "/tmp/g.h", 1, 32, "error", "'zz' was not declared in this scope"
    )
    assert (unused.severity, unused.line, unused.column) == ("warning", 7, 13)
    assert member.notes == (
        "In instantiation of 'T twice(T) [with T = float]'",
        "required from here at /tmp/g.cpp:8:15",
        "/tmp/g.cpp:2:3: declared here",
    )
    assert (missing.severity, missing.place) == ("error", "/tmp/g.cpp:1:10")


def test_the_log_of_nvrtc_becomes_data_and_ptxass_account_is_no_remark() -> None:
    log = """my.cu(7): warning #177-D: variable "unused" was declared but never referenced
    int unused = 5;
        ^

Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"

my.cu(3): error: expression must have class type but it has type "float"
  \treturn x.foo();
  \t       ^
          detected during:
            instantiation of "T twice(T) [with T=float]" at line 9
            instantiation of "void scale(T *) [with T=float]"

At end of source: error: expected a ";"

ptxas info    : Compiling entry function 'f' for 'sm_90'
ptxas warning : Registers are spilled to local memory in function 'f'
"""
    unused, member, end, spilled = parse_nvrtc(log)
    assert (unused.line, unused.column, unused.severity) == (7, 7, "warning")
    assert (member.line, member.column) == (3, 9)
    assert [note.partition(" [")[0] for note in member.notes] == [
        'instantiation of "T twice(T)',
        'instantiation of "void scale(T *)',
    ]
    assert (end.file, end.message) == ("end of source", 'expected a ";"')
    assert (spilled.file, spilled.severity) == ("ptxas", "warning")


def test_a_caret_stands_under_its_column_also_after_tabs() -> None:
    texts = {"t.cu": "first\n\tint x = y;\nlast\n"}
    drawn = draw(Diagnostic("t.cu", 2, 10, "error", "no y"), texts).splitlines()
    assert drawn[0] == "t.cu:2:10: error: no y"
    assert drawn[1] == "    1 | first"
    assert drawn[3].index("^") == drawn[2].index("y")
    assert drawn[4] == "    3 | last"


def test_a_caret_stands_under_its_column_also_after_characters_of_several_bytes() -> None:
    texts = {"t.cu": "\t/* äöü€ */\tint x = y;\n"}
    column = texts["t.cu"].encode().index(b"y;") + 1
    drawn = draw(Diagnostic("t.cu", 1, column, "error", "no y"), texts).splitlines()
    assert drawn[2].index("^") == drawn[1].index("y;")


def test_lines_end_where_a_compiler_ends_them() -> None:
    texts = {"t.cu": "one\f// \u2028 still\r\nint x = y;\n"}
    _, before, line, caret = draw(Diagnostic("t.cu", 2, 9, "error", "no y"), texts).split("\n")
    assert before == "    1 | one\f// \u2028 still"
    assert line == "    2 | int x = y;"
    assert caret.index("^") == line.index("y")
    log = "t.cu(2): error: no y\n  int /*\u2028*/ x = y;\n                  ^\n"
    assert parse_nvrtc(log)[0].column == 17


@pytest.mark.parametrize("line", [None, 0, 99])
def test_a_place_that_does_not_exist_is_named_without_lines(line: int | None) -> None:
    assert "\n" not in draw(Diagnostic("t.cu", line, 1, "error", "odd"), {"t.cu": "one\n"})
    assert "\n" not in draw(Diagnostic("/no/such/file", 1, 1, "error", "odd"), {})


def test_of_many_errors_the_first_are_drawn_and_the_rest_counted() -> None:
    errors = [Diagnostic("t.cu", 1, 1, "error", f"error {n}") for n in range(SHOWN + 5)]
    shown = str(CompileError("t.cu does not compile", errors, {"t.cu": "x\n"}))
    assert f"error {SHOWN - 1}" in shown
    assert f"error {SHOWN}\n" not in shown
    assert shown.endswith("... and 5 more errors, which may follow from these (all: .log)")
    assert shown.index("error 0") < shown.index("error 1") < shown.index("error 2")


def test_a_message_is_drawn_once_where_it_stands_first() -> None:
    places = [("no n", 1), ("no n", 2), ("no n", 3), ("no n", 4), ("no f", 5)]
    errors = [Diagnostic("t.cu", line, 1, "error", message) for message, line in places]
    shown = str(CompileError("t.cu does not compile", errors, {}))
    assert shown.splitlines()[2::2] == [
        "t.cu:1:1: error: no n",
        "t.cu:5:1: error: no f",
        "... and 3 more errors, which may follow from these (all: .log)",
    ]


def test_html_too_shows_the_first_errors_and_no_warnings_in_their_place() -> None:
    warnings = [Diagnostic("t.cu", 1, 1, "warning", f"odd {n}") for n in range(SHOWN)]
    errors = [Diagnostic("t.cu", 1, 1, "error", f"wrong {n}") for n in range(SHOWN + 1)]
    html = CompileError("t.cu", [*warnings, *errors], {"t.cu": "x\n"})._repr_html_()
    assert "wrong 0" in html and f"wrong {SHOWN - 1}" in html
    assert "odd" not in html and f"wrong {SHOWN}" not in html
    assert "and 1 more error, which" in html


def test_a_log_that_nobody_understands_is_shown_as_it_is() -> None:
    assert "the compiler crashed" in str(CompileError("title", [], {}, "the compiler crashed"))


def test_html_is_escaped() -> None:
    error = CompileError(
        "f<float>", [Diagnostic("t.cu", 1, 3, "error", "no <x>")], {"t.cu": "a<b> & c"}
    )
    html = error._repr_html_()
    assert "<b> & c" not in html
    assert "a&lt;b&gt; &amp; c" in html
    assert "no &lt;x&gt;" in html


def test_ipython_shows_the_source_in_place_of_a_traceback() -> None:
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    error = CompileError("f", [Diagnostic("t.cu", 1, 1, "error", "no")], {"t.cu": "text\n"})
    shown: list[str] = []
    shell._showtraceback = lambda kind, value, lines: shown.extend(lines)
    try:
        raise error
    except CompileError:
        shell.showtraceback()
    assert any("1 | text" in line for line in shown)
    assert not any("raise error" in line for line in shown)
