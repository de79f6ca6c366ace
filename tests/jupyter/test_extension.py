"""The magics, in a plain IPython shell in this process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest

from nbengine import SamplingParams
from nbengine.jupyter import extension
from nbengine.jupyter.dashboard import Dashboard
from nbengine.llm import LLM
from tests.jupyter.conftest import Notebook
from tests.jupyter.scripted import ScriptedEngine
from tests.waiting import eventually

MAGICS = [
    "nb_load",
    "nb_unload",
    "nb_generate",
    "nb_chat",
    "nb_add",
    "nb_step",
    "nb_run",
    "nb_pause",
    "nb_abort",
    "nb_status",
    "nb_blocks",
    "nb_why",
    "nb_history",
    "nb_dashboard",
]


@pytest.fixture
def engine(notebook: Notebook, make_engine: Callable[..., ScriptedEngine]) -> ScriptedEngine:
    """The notebook's `engine`."""
    engine = make_engine()
    notebook.shell.push({"engine": engine})
    return engine


# ---------------------------------------------------------------------- help and completion


@pytest.mark.parametrize("name", MAGICS)
def test_every_magic_has_help_in_both_ways(notebook: Notebook, name: str) -> None:
    for text in (notebook.run(f"%{name} --help"), notebook.run(f"%{name}?")):
        assert f"%{name}" in text
        assert "options:" in text


def test_a_cell_magics_help_needs_no_body(notebook: Notebook) -> None:
    for name in ("nb_generate", "nb_chat", "nb_add"):
        assert "--max-tokens" in notebook.run(f"%{name} --help")
        assert "--max-tokens" in notebook.run(f"%%{name} --help")
        assert "--max-tokens" in notebook.run(f"%%{name} --help\n\n")
        assert "--max-tokens" in notebook.run(f"%%{name} --help\nignored")


def test_options_and_their_values_complete(notebook: Notebook, engine: ScriptedEngine) -> None:
    assert "--max-num-seqs" in notebook.complete("%nb_load --max")
    assert notebook.complete("%nb_load --scheduling-policy s") == ["sjf"]
    assert "smollm2-135m" in notebook.complete("%nb_load smol")
    assert "--temperature" in notebook.complete("%%nb_generate --temp")
    engine.add_request("a b c", request_id="my-request")
    assert notebook.complete("%nb_why my") == ["my-request"]
    assert notebook.complete("%nb_abort my") == ["my-request"]


# ---------------------------------------------------------------------- stepping and looking


def test_requests_are_added_stepped_and_explained(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    assert notebook.value("%nb_add --max-tokens 3 it's a test") == "req-0"
    assert engine.output("req-0").prompt == "it's a test"
    assert notebook.value("%nb_step").step == 1
    assert notebook.shell.user_ns["_"].step == 1
    assert "req-0" in str(notebook.value("%nb_why req-0"))
    assert [record.step for record in notebook.value("%nb_step 5")] == [2, 3]
    assert [record.step for record in notebook.value("%nb_history 2")] == [2, 3]
    assert "nothing to compute" in notebook.run("%nb_step")


def test_status_and_blocks_are_objects_with_a_text_form(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    engine.add_request("a b c")
    engine.step()
    assert notebook.value("%nb_status").running[0].seq_id == "req-0"
    assert "step 1, policy Fcfs" in notebook.run("%nb_status")
    assert notebook.value("%nb_blocks").snapshot.num_held_blocks == 1
    assert "a req-0" in notebook.run("%nb_blocks")


def test_each_line_of_a_body_may_be_a_request(notebook: Notebook, engine: ScriptedEngine) -> None:
    ids = notebook.value("%%nb_add --each-line --chat --max-tokens 5\none\n\ntwo\n")
    assert ids == ["req-0", "req-1"]
    assert engine.output("req-1").prompt == "<user> two <assistant>"


def test_run_returns_at_once_and_pause_stops(notebook: Notebook, engine: ScriptedEngine) -> None:
    notebook.run("%nb_add --max-tokens 1000 a b c")
    engine.runner.gate.clear()
    assert "Running in the background" in notebook.run("%nb_run")
    assert engine.is_running
    engine.runner.gate.set()
    eventually(lambda: engine.scheduler.step_count > 3)
    assert "Paused after step" in notebook.run("%nb_pause")
    assert not engine.is_running
    notebook.run("%nb_abort req-0")
    assert not engine.has_work


def test_status_tells_of_a_background_run_that_failed(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    notebook.run("%nb_add a b c")
    engine.runner.error = RuntimeError("the model broke")
    notebook.run("%nb_run")
    eventually(lambda: engine.error)
    assert "RuntimeError: the model broke" in notebook.run("%nb_status")


def test_the_dashboard_is_an_object_and_prints_in_a_terminal(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    assert isinstance(notebook.value("%nb_dashboard"), Dashboard)
    assert "of 64 blocks" in notebook.run("%nb_dashboard")


# ---------------------------------------------------------------------- generating


def test_generate_prints_the_text_and_leaves_the_output_in_underscore(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    for source in (
        "%%nb_generate --max-tokens 6 --seed 1\nOnce upon a time",
        "%nb_generate --max-tokens 6 --seed 1 Once upon a time",
    ):
        printed = notebook.run(source)
        output = notebook.shell.user_ns["_"]
        assert output.prompt == "Once upon a time"
        assert len(output.outputs[0].token_ids) == 6
        assert output.outputs[0].text in printed
        assert printed.count(output.outputs[0].text) == 1
        assert "6 output tokens, length" in printed


def test_generate_takes_sampling_params_of_the_notebook(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    notebook.shell.push({"mine": SamplingParams(max_tokens=3, n=2)})
    notebook.run("%nb_generate --params mine hello")
    assert [len(o.token_ids) for o in notebook.shell.user_ns["_"].outputs] == [3, 3]
    assert "no SamplingParams of that name" in notebook.run("%nb_generate --params other hello")


def test_a_quoted_stop_string_is_a_python_string(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    notebook.run(r'%nb_add --stop "\n\n" --stop END hello')
    (live,) = engine.scheduler.live.values()
    assert tuple(live.request.params.stop) == ("\n\n", "END")  # type: ignore[union-attr,arg-type]


def test_chat_keeps_the_conversation_until_it_is_reset(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    notebook.run('%%nb_chat --system "Be kind." --max-tokens 4\nHello')
    notebook.run("%%nb_chat --max-tokens 4\nAgain")
    conversation = notebook.shell.user_ns["conversation"]
    assert [m["role"] for m in conversation] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation[0]["content"] == "Be kind."
    prompt = notebook.shell.user_ns["_"].prompt
    assert "Hello" in prompt
    assert conversation[2]["content"] in prompt
    notebook.run("%%nb_chat --reset --max-tokens 4\nNew")
    assert len(notebook.shell.user_ns["conversation"]) == 2
    notebook.run("%nb_chat --reset")
    assert notebook.shell.user_ns["conversation"] == []


def test_interrupting_generate_aborts_that_request_alone(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    engine.add_request("another", SamplingParams(max_tokens=1000), request_id="other")
    engine.runner.seconds_per_step = 0.005
    main = threading.main_thread().ident
    assert main is not None

    def stop() -> None:
        eventually(lambda: engine.scheduler.step_count > 10)
        signal.pthread_kill(main, signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    notebook.run("%nb_chat --max-tokens 1000 hello")
    stopper.join()
    assert isinstance(notebook.result.error_in_exec, KeyboardInterrupt)
    assert list(engine.scheduler.live) == ["other"]
    assert "conversation" not in notebook.shell.user_ns, "an interrupted turn leaves no trace"
    assert engine.step().scheduled


def test_an_interrupt_while_the_text_is_drawn_aborts_too(
    notebook: Notebook, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nbengine.jupyter.stream._TerminalScreen.show", interrupted)
    engine.runner.seconds_per_step = 0.01
    notebook.run("%nb_generate --max-tokens 1000 hello")
    assert not engine.has_work


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("%nb_generate --temperature -1 hello", "InvalidField: temperature=-1.0"),
        ("%nb_generate --temperature warm hello", "argument --temperature"),
        ("%nb_generate --no-such-option 3 hello", "unrecognized arguments"),
        ("%nb_generate", "there is no text"),
        ("%%nb_generate\n   ", "there is no text"),
        ("%nb_add " + "a " * 5000, "InvalidRequest: "),
        ("%nb_why nobody", "UnknownRequest: "),
        ("%nb_abort nobody", "UnknownRequest: no request 'nobody'"),
        ("%nb_load --block-size 7", "InvalidField: block_size=7"),
        ("%nb_load no-such-model", "ModelNotFound: "),
    ],
)
def test_a_users_mistake_is_one_line(
    notebook: Notebook, engine: ScriptedEngine, source: str, said: str
) -> None:
    printed = notebook.run(source)
    assert said in printed
    assert "Traceback" not in printed
    assert not notebook.result.success, "so that Run All stops"


def test_a_failure_of_the_model_keeps_its_traceback(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    engine.runner.error = RuntimeError("the model broke")
    printed = notebook.run("%nb_generate hello")
    assert "Traceback" in printed
    assert "the model broke" in printed
    assert "scripted.py" in printed, "down to the line that raised"
    assert not engine.has_work


@pytest.mark.parametrize("name", ["nb_step", "nb_run", "nb_status", "nb_unload"])
def test_without_an_engine_it_says_how_to_load_one(notebook: Notebook, name: str) -> None:
    assert "no engine is loaded" in notebook.run(f"%{name}")


# ---------------------------------------------------------------------- loading


@pytest.fixture
def scripted_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLM` over a scripted engine."""
    monkeypatch.setattr("nbengine.llm.Engine", ScriptedEngine)
    monkeypatch.setattr(extension, "resolve_model", lambda name: name)


def test_load_and_unload_bring_and_take_the_names(notebook: Notebook, scripted_llm: None) -> None:
    printed = notebook.run(
        "%nb_load any --num-gpu-blocks-override 32 --no-enable-prefix-caching "
        "--max-num-seqs 3 --scheduling-policy sjf"
    )
    names = notebook.shell.user_ns
    assert isinstance(names["llm"], LLM), printed
    first = names["engine"]
    assert names["llm"].engine is first
    assert first.config.num_gpu_blocks_override == 32
    assert first.config.max_num_seqs == 3
    assert not first.config.enable_prefix_caching
    assert first.snapshot().policy == "ShortestJobFirst"

    assert "has been closed" in notebook.run("%nb_load another")
    assert first.is_closed
    second = names["engine"]
    notebook.run("%nb_chat --max-tokens 2 hello")
    dashboard = notebook.value("%nb_dashboard")
    assert "memory given back" in notebook.run("%nb_unload")
    assert second.is_closed
    assert not {"engine", "llm", "conversation"} & set(names)
    eventually(lambda: dashboard.is_closed)


def test_a_policy_written_in_a_cell_is_found_by_its_name(
    notebook: Notebook, scripted_llm: None
) -> None:
    notebook.run("class LongestFirst:\n    def rank(self, s):\n        return -s.num_prompt_tokens")
    notebook.run("%nb_load any --scheduling-policy LongestFirst")
    assert notebook.shell.user_ns["engine"].snapshot().policy == "LongestFirst"
    notebook.run("%nb_unload")


def test_a_mistake_in_the_options_leaves_the_loaded_engine_alone(
    notebook: Notebook, engine: ScriptedEngine
) -> None:
    notebook.run("%nb_load any --dtype float3")
    notebook.run("%nb_load no-such-model")
    assert not engine.is_closed
    assert notebook.shell.user_ns["engine"] is engine


def test_every_engine_option_is_a_field_of_the_config() -> None:
    fields = set(extension.EngineConfig.__dataclass_fields__)
    offered = {*extension._LOAD, *extension._LOAD_SWITCHES, *extension._LOAD_FLAGS, "model"}
    assert {name.replace("-", "_") for name in offered} == fields


def test_breakpoints_rewind_and_probe_have_magics(notebook: Notebook) -> None:
    engine = notebook.shell.user_ns["engine"] = ScriptedEngine(model="scripted")
    for n in (6, 9):
        engine.add_request("a b c", SamplingParams(max_tokens=n))
    (stop,) = notebook.value("%nb_break finish")
    engine.run()
    assert engine.stopped_at.breakpoint is stop and engine.scheduler.step_count == 6
    assert notebook.value("%nb_break --clear") == ()
    assert notebook.value("%nb_status --at 2").step == 2
    assert "rewound to step 3" in str(notebook.value("%nb_rewind 3"))
    assert engine.scheduler.step_count == 3
    notebook.run("%nb_run --until finish")
    eventually(lambda: engine.stopped_at)
    assert engine.scheduler.step_count == 6 and not engine.breakpoints
    assert "no state after step 99" in notebook.run("%nb_rewind 99")
    assert "the names are preemption" in notebook.run("%nb_break nothing")
    engine.close()
