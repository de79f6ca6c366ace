"""`LLM`: the front that a vLLM user can switch to by changing the import.

Each call adds its requests to the engine, waits for them while the engine's thread steps, and takes
them back out if it is interrupted; whatever else runs in the engine goes on meanwhile.
"""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from nbengine.admission import Params, Prompt
from nbengine.core.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nbengine.engine import Engine
from nbengine.errors import InvalidField, InvalidRequest
from nbengine.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput

if TYPE_CHECKING:
    from nbengine.tokenizer import Tokenizer

Message = dict[str, Any]
"""`{"role": ..., "content": ...}`"""


class LLM:
    """A model that generates. Keyword arguments are the fields of `EngineConfig`.

    `llm.engine` is the engine underneath: step it, inspect it, draw it.

    Raises:
        ModelNotFound, UnsupportedModel, WeightsError, NotEnoughMemory, InvalidField
    """

    def __init__(self, model: str, **fields: Any) -> None:
        self.engine = Engine(model=model, **fields)

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            InvalidRequest: the engine was made with `skip_tokenizer_init`.
        """
        if self.engine.tokenizer is None:
            raise InvalidRequest("this engine has no tokenizer (skip_tokenizer_init)")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Seq[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or a batch; outputs are in the order of the prompts.

        A prompt is a text, a list of token ids, or a mapping (see `nbengine.engine.Prompt`).
        `sampling_params` are one for all or one per prompt. If any prompt or parameter is invalid,
        none is run. Interrupting the call aborts its requests and no others.

        Raises:
            InvalidRequest, InvalidField, RequestTooLarge: before anything runs.
            whatever a step raised: this call's requests are then aborted.
        """
        batch = _as_batch(prompts)
        params = _one_each(sampling_params, len(batch), "sampling_params") or [
            SamplingParams() for _ in batch
        ]
        priorities = _one_each(priority, len(batch), "priority") or [0] * len(batch)
        for p in params:
            if not isinstance(p, SamplingParams):
                raise InvalidField("sampling_params", p, "must be SamplingParams")
        final = [p.clone(output_kind=RequestOutputKind.FINAL_ONLY) for p in params]
        return self._run(batch, final, priorities, use_tqdm)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a batch of them, through the model's own chat template
        (rendered in a sandbox).

        Raises:
            InvalidRequest: the model has no template, or the messages don't fit it.
            and what `generate` raises.
        """
        if not isinstance(messages, list | tuple):
            raise InvalidRequest(
                "messages are a list of dicts with role and content, or a list of such lists, not "
                f"{type(messages).__name__}"
            )
        if not messages:
            raise InvalidRequest("there are no messages")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        options = _template_options(chat_template_kwargs)
        tokenizer = self.get_tokenizer()
        prompts = [
            chat_prompt(
                tokenizer,
                conversation,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Seq[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, best first. Beams share the KV blocks of
        their common past. Raises what `generate` raises."""
        batch = _as_batch(prompts)
        if not isinstance(params, BeamSearchParams):
            raise InvalidField("params", params, "must be BeamSearchParams")
        outputs = self._run(batch, [params] * len(batch), [0] * len(batch), use_tqdm)
        return [self._beams(output) for output in outputs]

    def _beams(self, output: RequestOutput) -> BeamSearchOutput:
        tokenizer = self.engine.tokenizer
        sequences = []
        for beam in output.outputs:
            tokens = output.prompt_token_ids + beam.token_ids
            text = None if tokenizer is None else tokenizer.decode(tokens)
            assert beam.cumulative_logprob is not None
            sequences.append(
                BeamSearchSequence(
                    tokens, text, beam.cumulative_logprob, beam.finish_reason, beam.stop_reason
                )
            )
        return BeamSearchOutput(sequences)

    def stream(
        self,
        prompt: Prompt | Seq[Message],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[RequestOutput]:
        """Yield one prompt's (or conversation's) outputs as they come: the text so far, or only
        what is new with `output_kind=RequestOutputKind.DELTA`. Leaving the loop aborts it."""
        return self.engine.stream(self._prompt_or_chat(prompt), sampling_params, **options)

    def astream(
        self,
        prompt: Prompt | Seq[Message],
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """`stream`, for `async for`."""
        return self.engine.astream(self._prompt_or_chat(prompt), sampling_params, **options)

    def _prompt_or_chat(self, prompt: Any) -> Prompt:
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], Mapping):
            return chat_prompt(self.get_tokenizer(), prompt)
        return prompt

    def _run(
        self, prompts: list[Prompt], params: Seq[Params], priorities: Seq[int], use_tqdm: bool
    ) -> list[RequestOutput]:
        engine = self.engine
        requests = [
            engine.check_request(prompt, p, priority=rank)
            for prompt, p, rank in zip(prompts, params, priorities, strict=True)
        ]
        outputs: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()
        finished: dict[str, RequestOutput] = {}
        with (
            engine.driving(requests, outputs.put) as names,
            _ProgressBar(len(names), use_tqdm) as bar,
        ):
            while len(finished) < len(names):
                output = outputs.get()
                if isinstance(output, BaseException):
                    raise output
                finished[output.request_id] = output
                bar.update(output)
            return [finished[name] for name in names]

    def close(self) -> None:
        """Abort what runs and give all memory back."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.engine!r})"


def chat_prompt(tokenizer: Tokenizer, messages: Seq[Message], **template_options: Any) -> Prompt:
    """A conversation as a prompt, through the model's own chat template.

    Raises:
        InvalidRequest: the model has no template, or the messages don't fit it.
    """
    text = tokenizer.apply_chat_template(messages, **template_options)
    # The template has written the special tokens itself.
    ids = tokenizer.encode(text, add_special_tokens=False)
    return {"prompt": text, "prompt_token_ids": ids}


def _template_options(options: object) -> dict[str, Any]:
    """`chat_template_kwargs`, which must not take the place of an argument."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise InvalidField("chat_template_kwargs", options, "must be a dict with names as keys")
    taken = options.keys() & {"messages", "tokenizer", "add_generation_prompt"}
    if taken:
        raise InvalidField(
            "chat_template_kwargs", options, f"{', '.join(sorted(taken))} is an argument of its own"
        )
    return dict(options)


def _as_batch(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A batch of prompts; one prompt is a batch of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            f"prompts are texts, token ids or mappings, not {type(prompts).__name__}"
        )
    batch: list[Any] = list(prompts)
    if not batch:
        raise InvalidRequest("there is no prompt: the batch is empty")
    if isinstance(batch[0], str | Mapping | Iterable):
        return batch
    return [batch]  # one prompt as token ids


def _one_each(values: Any, n: int, name: str) -> list[Any] | None:
    """One value per prompt from one for all or a list."""
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        return [values] * n
    if len(values) != n:
        raise InvalidRequest(f"{len(values)} {name} for {n} prompts: give one for all, or one each")
    return list(values)


class _ProgressBar:
    """A tqdm bar over finished requests, with tokens per second; nothing when switched off."""

    def __init__(self, total: int, enabled: bool) -> None:
        self.bar: Any = None
        self.num_tokens = 0
        if enabled:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, desc="Processed prompts", dynamic_ncols=True)

    def update(self, output: RequestOutput) -> None:
        self.num_tokens += sum(len(o.token_ids) for o in output.outputs)
        if self.bar is not None:
            elapsed = self.bar.format_dict["elapsed"] or 1e-9
            self.bar.set_postfix_str(f"{self.num_tokens / elapsed:.1f} output tok/s", refresh=False)
            self.bar.update()

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
