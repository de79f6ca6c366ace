"""`%load_ext nbengine`: the magics.

Each is a thin way to say in a cell what one or two lines of Python say: they work on the `engine`
(or `llm`) of the user's namespace, return the engine's own objects, and never hold a cell but for
`%nb_step`, `%%nb_generate` and `%%nb_chat`, which the stop button interrupts. `%nb_step?` and
`%nb_step --help` show a magic's help.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from IPython.core.error import UsageError
from IPython.core.magic import line_cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument

from nbengine.config import BLOCK_SIZES, EngineConfig
from nbengine.core.breakpoints import CONDITIONS, Breakpoint
from nbengine.core.policies import POLICIES
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.snapshot import Snapshot
from nbengine.core.why import Explanation
from nbengine.engine import Engine
from nbengine.jupyter import debugger
from nbengine.jupyter.attention_view import AttentionView
from nbengine.jupyter.block_map import BlockMap
from nbengine.jupyter.dashboard import Dashboard, close_dashboard_of
from nbengine.jupyter.kernel_bench import KernelMagics
from nbengine.jupyter.magic import (
    DEFAULT_MODEL,
    EngineMagics,
    magic,
    quotable,
    without_body_as_line,
)
from nbengine.jupyter.stream import show_stream
from nbengine.jupyter.views import Steps
from nbengine.llm import LLM, chat_prompt
from nbengine.models.registry import resolve_model
from nbengine.progress import say
from nbengine.rewind import Rewind

if TYPE_CHECKING:
    from nbengine.execution.probe import Probe

DEFAULT_MAX_TOKENS = 128
"""More than `SamplingParams`' 16: who asks in a cell wants to read an answer."""


def load_ipython_extension(shell: Any) -> None:
    """Register the magics and what completes them."""
    debugger.install()
    for magics in (NbengineMagics(shell), KernelMagics(shell)):
        shell.register_magics(magics)
        for name in magics.magics["line"]:
            for key in (f"%{name}", f"%%{name}"):
                shell.set_hook("complete_command", magics.complete, str_key=key)
    if without_body_as_line not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.append(without_body_as_line)


# ---------------------------------------------------------------------- arguments


_PROMPT = argument("prompt", nargs=argparse.REMAINDER, help="the text, to the end of the line")

_SAMPLING = {
    "n": (int, "output sequences"),
    "max-tokens": (int, f"output tokens at most (default {DEFAULT_MAX_TOKENS})"),
    "min-tokens": (int, "no end before this many output tokens"),
    "temperature": (float, "0 is greedy (default 1.0)"),
    "top-p": (float, "keep the likeliest tokens that add up to this probability"),
    "top-k": (int, "keep this many likeliest tokens"),
    "min-p": (float, "keep tokens at least this fraction as likely as the likeliest"),
    "presence-penalty": (float, "-2 to 2"),
    "frequency-penalty": (float, "-2 to 2"),
    "repetition-penalty": (float, "1.0 is none"),
    "seed": (int, "for the same text again"),
    "logprobs": (int, "log-probabilities of this many likeliest tokens"),
}


def _sampling_options() -> list[Any]:
    return [
        *(argument(f"--{name}", type=kind, help=text) for name, (kind, text) in _SAMPLING.items()),
        argument("--stop", type=quotable, action="append", help="a text that ends the output"),
        argument("--ignore-eos", action="store_true", help="go on past the end-of-sequence token"),
        argument("--params", metavar="NAME", help="a SamplingParams of the notebook, instead"),
        argument("--priority", type=int, default=0, help="smaller runs sooner (priority policy)"),
        argument(
            "--request-id", type=quotable, help="a name of your own (default req-0, req-1, ...)"
        ),
    ]


_LOAD = {
    "tokenizer": (quotable, "where the tokenizer is, if not with the model"),
    "dtype": (quotable, "auto, float32, bfloat16 or float16"),
    "device": (quotable, "auto, cpu or cuda"),
    "quantization": (quotable, "int8 or int4"),
    "load-format": (quotable, "auto, safetensors or gguf"),
    "max-model-len": (int, "most tokens of prompt and output together"),
    "block-size": (int, f"tokens in a KV block: {', '.join(map(str, BLOCK_SIZES))}"),
    "num-gpu-blocks-override": (int, "KV blocks, instead of as many as fit"),
    "gpu-memory-utilization": (float, "part of the memory that the engine may fill"),
    "swap-space": (float, "GiB of host memory for swapped sequences"),
    "preemption-mode": (quotable, "recompute or swap"),
    "max-num-batched-tokens": (int, "the token budget of a step"),
    "max-num-seqs": (int, "most sequences that run at once"),
    "long-prefill-token-threshold": (int, "most tokens of one prompt in a step"),
    "scheduling-policy": (quotable, f"{', '.join(POLICIES)}, or a policy of the notebook"),
    "kernels": (quotable, "auto, cuda, emulated or torch: what runs the model"),
    "max-logprobs": (int, "most logprobs that a request may ask for"),
    "seed": (int, "of requests without one"),
}
_LOAD_SWITCHES = ("enable-prefix-caching", "enable-chunked-prefill")
_LOAD_FLAGS = ("skip-tokenizer-init", "enforce-eager", "batch-invariant")


def _load_options() -> list[Any]:
    return [
        argument("model", nargs="?", default=DEFAULT_MODEL, help=f"default {DEFAULT_MODEL}"),
        *(argument(f"--{name}", type=kind, help=text) for name, (kind, text) in _LOAD.items()),
        *(
            argument(f"--{name}", action=argparse.BooleanOptionalAction, help="(default: on)")
            for name in _LOAD_SWITCHES
        ),
        *(argument(f"--{name}", action="store_true", default=None) for name in _LOAD_FLAGS),
    ]


# ---------------------------------------------------------------------- magics


@magics_class
class NbengineMagics(EngineMagics):
    """The engine's life, generating, stepping, looking in."""

    option_values: ClassVar = {
        "--scheduling-policy": tuple(POLICIES),
        "--until": tuple(CONDITIONS),
        "--dtype": ("auto", "float32", "bfloat16", "float16"),
        "--device": ("auto", "cpu", "cuda"),
        "--quantization": ("int8", "int4"),
        "--load-format": ("auto", "safetensors", "gguf"),
        "--preemption-mode": ("recompute", "swap"),
        "--block-size": tuple(map(str, BLOCK_SIZES)),
    }

    # ------------------------------------------------------------------ the engine's life

    @magic(line_magic, *_load_options(), tells_progress=True)
    def nb_load(self, args: argparse.Namespace, _: str | None) -> LLM:
        """Load a model. The notebook gets `llm` and `engine`; one loaded before is closed first.

        Options are the fields of EngineConfig.
        """
        fields = {
            name: value
            for name, value in vars(args).items()
            if name in EngineConfig.__dataclass_fields__ and value is not None
        }
        policy = fields.get("scheduling_policy")
        if policy is not None and policy not in POLICIES and policy in self._names:
            fields["scheduling_policy"] = self._names[policy]
        config = EngineConfig(**fields)  # a mistake here or in the name leaves the old engine alone
        resolve_model(config.model)
        if self._close_engine():
            print("The engine that was loaded before has been closed.")
        say(f"loading {config.model}")
        llm = LLM(**{name: getattr(config, name) for name in fields})
        self.shell.push({"llm": llm, "engine": llm.engine})
        return llm

    @magic(line_magic)
    def nb_unload(self, args: argparse.Namespace, _: str | None) -> None:
        """Close the engine: requests are aborted, its memory is given back, and the names `llm`,
        `engine` and `conversation` are removed."""
        if not self._close_engine():
            raise UsageError("no engine is loaded")
        print("The engine is closed, and its memory given back.")

    def _close_engine(self) -> bool:
        """Close what `engine` and `llm` name and remove the names; False if there was nothing."""
        found = False
        for name in ("engine", "llm"):
            value = self._names.get(name)
            engine = value.engine if isinstance(value, LLM) else value
            if isinstance(engine, Engine):
                found = found or not engine.is_closed
                engine.close()
                close_dashboard_of(engine)  # the notebook may end with this cell
                self.shell.drop_by_id({name: value})
        self._names.pop("conversation", None)
        return found

    # ------------------------------------------------------------------ generating

    @magic(line_cell_magic, *_sampling_options(), _PROMPT)
    def nb_generate(self, args: argparse.Namespace, cell: str | None) -> None:
        """Complete a prompt, showing the text while it comes. The RequestOutput is then in `_`.

        The prompt is the cell's body, or the rest of the line. The stop button aborts this request
        and no other.
        """
        self._stream(self._prompt(args, cell, "nb_generate"), args)

    @magic(
        line_cell_magic,
        argument("--reset", action="store_true", help="begin a new conversation"),
        argument("--system", type=quotable, help="the system message of a new conversation"),
        *_sampling_options(),
        _PROMPT,
    )
    def nb_chat(self, args: argparse.Namespace, cell: str | None) -> None:
        """Say the next thing in a conversation, and show the answer while it comes.

        The conversation is the list `conversation` in the notebook: read it, edit it, or begin
        again with --reset. An interrupted turn is left out of it. The RequestOutput is in `_`.
        """
        engine = self._engine
        if engine.tokenizer is None:
            raise UsageError("this engine has no tokenizer (skip_tokenizer_init)")
        kept = self._names.get("conversation")
        is_new = args.reset or args.system is not None or not isinstance(kept, list)
        conversation: list[Any] = [] if is_new else list(kept or ())
        if args.system is not None:
            conversation.append({"role": "system", "content": args.system})
        said = " ".join(args.prompt) if cell is None else cell.strip()
        if not said and is_new and (args.reset or args.system is not None):
            self.shell.push({"conversation": conversation})
            return
        conversation.append({"role": "user", "content": self._said(said, "nb_chat")})
        prompt = chat_prompt(engine.tokenizer, conversation, add_generation_prompt=True)
        output = self._stream(prompt, args, show_prompt=False)
        conversation.append({"role": "assistant", "content": output.outputs[0].text.strip()})
        self.shell.push({"conversation": conversation})

    @magic(
        line_cell_magic,
        argument("--chat", action="store_true", help="through the model's chat template"),
        argument("--each-line", action="store_true", help="every line of the body is a request"),
        *_sampling_options(),
        _PROMPT,
    )
    def nb_add(self, args: argparse.Namespace, cell: str | None) -> str | list[str]:
        """Queue a request and return its id. Nothing is computed before the next step."""
        engine = self._engine
        text = self._prompt(args, cell, "nb_add")
        texts = [line for line in text.splitlines() if line.strip()] if args.each_line else [text]
        params = self._params(args)
        prompts: list[Any] = list(texts)
        if args.chat:
            if engine.tokenizer is None:
                raise UsageError("this engine has no tokenizer (skip_tokenizer_init)")
            prompts = [
                chat_prompt(
                    engine.tokenizer,
                    [{"role": "user", "content": text}],
                    add_generation_prompt=True,
                )
                for text in texts
            ]
        ids = [
            engine.add_request(prompt, params, priority=args.priority, request_id=args.request_id)
            for prompt in prompts
        ]
        return ids if args.each_line else ids[0]

    def _prompt(self, args: argparse.Namespace, cell: str | None, name: str) -> str:
        return self._said(" ".join(args.prompt) if cell is None else cell.rstrip("\n"), name)

    @staticmethod
    def _said(text: str, name: str) -> str:
        if not text.strip():
            raise UsageError(f"there is no text: write it below %%{name}, or behind %{name}")
        return text

    def _params(self, args: argparse.Namespace) -> SamplingParams | BeamSearchParams:
        if args.params is not None:
            params = self._names.get(args.params)
            if not isinstance(params, SamplingParams | BeamSearchParams):
                raise UsageError(
                    f"--params {args.params}: the notebook has no SamplingParams of that name"
                )
            return params
        given = {name.replace("-", "_"): None for name in _SAMPLING}
        fields = {name: value for name in given if (value := getattr(args, name)) is not None}
        if args.stop:
            fields["stop"] = args.stop
        return SamplingParams(
            **{"max_tokens": DEFAULT_MAX_TOKENS, "ignore_eos": args.ignore_eos} | fields
        )

    def _stream(self, prompt: Any, args: argparse.Namespace, show_prompt: bool = True) -> Any:
        """Generate, show, and leave the output in `_`."""
        params = self._params(args)
        if not isinstance(params, SamplingParams):
            raise UsageError("beam search has nothing to stream: use llm.beam_search(...)")
        outputs = self._engine.stream(
            prompt, params, priority=args.priority, request_id=args.request_id
        )
        in_notebook = hasattr(self.shell, "kernel")
        output = show_stream(outputs, in_notebook=in_notebook, show_prompt=show_prompt)
        self.shell.displayhook.update_user_ns(output)
        return output

    # ------------------------------------------------------------------ stepping

    @magic(
        line_magic,
        argument("n", nargs="?", type=int, default=1, help="how many (default 1)"),
        tells_progress=True,
    )
    def nb_step(self, args: argparse.Namespace, _: str | None) -> Any:
        """Take steps, and return the StepRecord (or several of them)."""
        engine = self._engine
        if not engine.has_work:
            raise UsageError("there is nothing to compute: add a request with %nb_add")
        say("computing")
        record = engine.step()
        records = [record]
        while len(records) < args.n and engine.has_work:
            records.append(engine.step())
        return record if args.n == 1 else Steps(tuple(records))

    @magic(
        line_magic,
        argument("--until", metavar="CONDITION", help=f"stop there once: {', '.join(CONDITIONS)}"),
    )
    def nb_run(self, args: argparse.Namespace, _: str | None) -> None:
        """Let the engine step in the background until %nb_pause (or until something happens). Returns
        at once."""
        engine = self._engine
        if args.until is not None:
            engine.break_on(args.until, once=True)
        engine.start()
        waiting = "" if engine.has_work else " It has no requests yet: %nb_add queues one."
        print(f"Running in the background; %nb_pause stops it, %nb_dashboard shows it.{waiting}")

    @magic(line_magic)
    def nb_pause(self, args: argparse.Namespace, _: str | None) -> None:
        """Stop stepping in the background, after the current step. What is queued stays."""
        engine = self._engine
        engine.pause()
        print(f"Paused after step {engine.scheduler.step_count}.")

    @magic(
        line_magic,
        argument("condition", nargs="?", help=", ".join(CONDITIONS)),
        argument("--clear", action="store_true", help="remove all breakpoints"),
    )
    def nb_break(self, args: argparse.Namespace, _: str | None) -> tuple[Breakpoint, ...]:
        """Pause after every step in which something happens; returns the breakpoints that are set."""
        engine = self._engine
        if args.clear:
            for each in engine.breakpoints:
                each.remove()
        if args.condition is not None:
            engine.break_on(args.condition)
        return engine.breakpoints

    @magic(line_magic, argument("step", type=int, help="the step to go back to"))
    def nb_rewind(self, args: argparse.Namespace, _: str | None) -> Rewind:
        """Go back to how things stood after a step, and pause there. The Rewind that is returned tells
        whether the same tokens come again."""
        return self._engine.rewind(args.step)

    @magic(line_magic, argument("request_id", nargs="+", help="which"))
    def nb_abort(self, args: argparse.Namespace, _: str | None) -> None:
        """End requests now, and free all they hold."""
        self._engine.abort(*args.request_id)

    # ------------------------------------------------------------------ looking in

    @magic(line_magic, argument("--at", type=int, metavar="STEP", help="as they were after a step"))
    def nb_status(self, args: argparse.Namespace, _: str | None) -> Snapshot:
        """The queues and the block map: a Snapshot."""
        engine = self._engine
        if args.at is not None:
            return engine.state_at(args.at)
        if engine.error is not None:
            print(f"The last background run failed: {type(engine.error).__name__}: {engine.error}")
        return engine.snapshot()

    @magic(line_magic)
    def nb_blocks(self, args: argparse.Namespace, _: str | None) -> BlockMap:
        """The block map: which KV blocks are held (and by whom), shared, cached and free."""
        return BlockMap(self._engine.snapshot())

    @magic(line_magic, argument("request_id", help="a request, or one of its samples (req-3#1)"))
    def nb_why(self, args: argparse.Namespace, _: str | None) -> Explanation:
        """Why a request waits, was preempted, got fewer tokens than it wanted, or missed the prefix
        cache."""
        return self._engine.why(args.request_id)

    @magic(
        line_magic,
        argument("request_id", help="a request, or one of its samples (req-3#1)"),
        argument("--at", type=int, metavar="STEP", help="as it was after a step (default: now)"),
        argument("--layer", type=int, help="the attention of this layer's heads alone"),
    )
    def nb_probe(self, args: argparse.Namespace, _: str | None) -> Probe | AttentionView:
        """What the model sees at a sequence's last computed token: what may come next, and how its
        attention spreads over the KV blocks. The Probe that is returned holds logits, hidden states
        and attention weights."""
        probe = self._engine.probe(args.request_id, args.at)
        return probe if args.layer is None else AttentionView(probe, args.layer)

    @magic(line_magic, argument("n", nargs="?", type=int, default=10, help="how many (default 10)"))
    def nb_history(self, args: argparse.Namespace, _: str | None) -> Steps:
        """The latest steps: StepRecords, oldest first."""
        return Steps(tuple(self._engine.history)[-max(args.n, 1) :])

    @magic(line_magic)
    def nb_dashboard(self, args: argparse.Namespace, _: str | None) -> Dashboard:
        """The live dashboard: controls, queues, block map and step log."""
        return self._engine.dashboard()

    # ------------------------------------------------------------------ completion

    def _values(self, name: str) -> list[str]:
        if name == "nb_load":
            models = [DEFAULT_MODEL]
            models += [str(path) for path in sorted(Path().glob("*.gguf"))]
            models += [str(path.parent) for path in sorted(Path().glob("*/config.json"))]
            return models
        if name == "nb_break":
            return list(CONDITIONS)
        if name in ("nb_why", "nb_abort", "nb_probe"):
            engine = self._engine_or_none
            if engine is not None and not engine.is_closed:
                return list(engine.scheduler.live)
        return []
