"""The line that tells what a magic does: in a real kernel, and in a terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbengine.jupyter.progress_line import progress_line
from nbengine.progress import say
from tests.jupyter.kernels import real_kernel
from tests.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
RMS_NORM = (REPOSITORY / "cuda" / "rms_norm.cu").read_text()


class Kernel:
    """A real one. `run` gives what a front end does with the messages of a cell."""

    def __init__(self, client: Any, interrupt: Callable[[], None]) -> None:
        self.client, self.interrupt = client, interrupt

    def run(self, source: str, on: Callable[[Any], None] = lambda message: None) -> list[Any]:
        """The messages of a cell but for its beginning and end, as (type, content)."""
        heard: list[Any] = []

        def hear(message: Any) -> None:
            if message["msg_type"] not in ("status", "execute_input"):
                heard.append((message["msg_type"], message["content"]))
                on(heard[-1])

        self.client.execute_interactive(source, timeout=60, output_hook=hear)
        return heard


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with real_kernel() as (manager, client):
        kernel = Kernel(client, manager.interrupt_kernel)
        said = kernel.run(
            f"import sys, threading, time; sys.path.insert(0, {str(REPOSITORY)!r})\n"
            "%load_ext nbengine\n"
            "from nbengine.jupyter.progress_line import progress_line\n"
            "from nbengine.progress import say"
        )
        assert not said
        yield kernel


def saved(messages: list[Any]) -> list[Any]:
    """What a notebook keeps of them."""
    outputs: dict[Any, Any] = {}
    for kind, content in messages:
        shown = content.get("transient", {}).get("display_id")
        if kind == "clear_output":
            outputs.clear()
        elif kind == "update_display_data":
            assert shown in outputs
            outputs[shown] = content["data"]
        else:
            outputs[shown or len(outputs)] = content.get("data", content.get("text", content))
    return list(outputs.values())


def test_the_line_is_shown_updated_and_taken_away(kernel: Kernel) -> None:
    kernel.run(
        "def two():\n"
        "    with progress_line(get_ipython()):\n"
        "        say('counting <sheep>'); time.sleep(.6)\n"
        "        say('asleep'); time.sleep(.6)\n"
        "    print('morning')"
    )
    messages = kernel.run("two()")
    kinds = [kind for kind, _ in messages]
    assert kinds[0] == "display_data" and "update_display_data" in kinds
    assert messages[0][1]["data"]["text/plain"] == "counting <sheep> ..."
    assert "counting &lt;sheep&gt; ..." in messages[0][1]["data"]["text/html"]
    assert any("asleep" in content.get("data", {}).get("text/plain", "") for _, content in messages)
    assert saved(messages) == ["morning\n"]


def test_what_the_cell_has_shown_besides_stays(kernel: Kernel) -> None:
    kernel.run(
        "def one(text=''):\n"
        "    with progress_line(get_ipython()):\n"
        "        say('counting'); time.sleep(.6); print(text, end='')"
    )
    assert saved(kernel.run("print('before')\none()")) == ["before\n", {}]
    assert saved(kernel.run("one('printed inside')")) == [{}, "printed inside"]
    assert saved(kernel.run("one()")) == []


def test_a_trial_in_a_notebook_is_not_silent_and_leaves_itself_alone(kernel: Kernel) -> None:
    fresh = f"{RMS_NORM}// {time.time()}\n"  # which no cache knows
    messages = kernel.run(f"%%nb_kernel rms_norm --case float32-1x64\n{fresh}")
    assert messages[0][0] == "display_data"
    told = [heard[1]["data"]["text/plain"] for heard in messages if "display_data" in heard[0]]
    assert any("compiling rms_norm<float, 64, 16, 8, " in text for text in told)
    (trial,) = saved(messages)
    assert "agrees with the reference on 2 calls" in trial["text/plain"]


def test_an_interrupt_ends_the_trial_and_its_line(kernel: Kernel) -> None:
    fresh = f"{RMS_NORM}// {time.time()}\n"

    def interrupt(heard: Any) -> None:
        if heard[0] == "display_data":
            kernel.interrupt()

    messages = kernel.run(f"%%nb_kernel rms_norm\n{fresh}", on=interrupt)
    (error,) = saved(messages)
    assert error["ename"] == "Interrupted"
    (line,) = error["traceback"]
    assert line.endswith(": %%nb_kernel was interrupted")
    (alive,) = kernel.run("[t.name for t in threading.enumerate() if 'progress' in t.name]")
    assert alive[1]["data"]["text/plain"] == "[]"


class Terminal(io.StringIO):
    def __init__(self, is_one: bool) -> None:
        super().__init__()
        self.is_one, self.was_asked = is_one, False

    def isatty(self) -> bool:
        self.was_asked = True
        return self.is_one


def test_a_terminals_line_is_overwritten_and_cut_to_its_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "9")
    terminal = Terminal(is_one=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    with progress_line(object()):
        say("counting sheep")
        eventually(terminal.getvalue)
    assert terminal.getvalue() == "\r\x1b[Kcounting\r\x1b[K"


def test_where_nobody_sees_a_line_none_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Terminal(is_one=False)
    monkeypatch.setattr(sys, "stdout", log)
    with progress_line(object()):
        say("counting sheep")
        eventually(lambda: log.was_asked)
    assert log.getvalue() == ""
