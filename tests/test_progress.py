"""What is told of long work, to whom, and for how long."""

from __future__ import annotations

import threading

from nbengine.progress import doing, progress_to, say


def test_a_part_is_told_with_the_whole_which_goes_on_after_it() -> None:
    told: list[str] = []
    with progress_to(told.append):
        say("baking")
        with doing("heating the oven"):
            pass
    assert told == ["baking", "baking; heating the oven", "baking"]


def test_a_part_of_nothing_is_told_alone() -> None:
    told: list[str] = []
    with progress_to(told.append):
        with doing("heating the oven"):
            pass
        with doing("whipping cream"):
            pass
    assert told == ["heating the oven", "whipping cream"]


def test_nobody_else_is_told() -> None:
    told: list[str] = []
    say("before")
    with progress_to(told.append):
        other = threading.Thread(target=say, args=("on a thread that nobody asked",))
        other.start()
        other.join()
    say("after")
    with doing("after"):
        pass
    assert told == []


def test_the_innermost_listens() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with progress_to(outer.append):
        with progress_to(inner.append):
            say("first")
        say("second")
    assert (outer, inner) == (["second"], ["first"])
