"""`Engine`: a model, a scheduler and a paged KV cache, and the step that ties them together.

A step (`Engine._step`) is: schedule, prepare, execute, commit. All of it happens on the engine's
own thread (see `engine_thread`); the public methods may be called from any thread, hand their work
to that thread between two steps, and return its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import queue
import random
import time
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nbengine.config import EngineConfig
from nbengine.core.history import History
from nbengine.core.logprobs import Logprob
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.policies import Policy
from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    validate_for_model,
    validate_prompt_token_ids,
)
from nbengine.core.scheduler import Scheduler
from nbengine.core.snapshot import Snapshot, take_snapshot
from nbengine.core.why import Explanation, explain
from nbengine.engine_kernels import EngineKernels
from nbengine.engine_thread import EngineThread
from nbengine.errors import (
    DeviceLost,
    EngineBusy,
    EngineClosed,
    InvalidField,
    InvalidRequest,
    UnknownRequest,
)
from nbengine.outputs import RequestMetrics, RequestOutput, RequestState, Subscriber

if TYPE_CHECKING:
    from nbengine.execution.kv_cache import KVCache
    from nbengine.execution.memory import MemoryBudget
    from nbengine.execution.runner import ModelRunner
    from nbengine.jupyter.dashboard import Dashboard
    from nbengine.kernels.op import Arguments
    from nbengine.models.decoder import Decoder
    from nbengine.tokenizer import Tokenizer

T = TypeVar("T")

Prompt = str | Seq[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; a mapping may carry a
`cache_salt`."""

Params = SamplingParams | BeamSearchParams

QueueRequest = Callable[[Subscriber | None], str]
"""A request that was checked: queues it, on the engine's thread, and returns its id."""

MAX_SALT_LENGTH = 128
MAX_ID_LENGTH = 256
MAX_FINISHED_KEPT = 1000
"""Finished requests whose outputs can still be asked for."""
MAX_FINISHED_SIZE = 2_000_000
"""And their tokens and logprobs together: some 100 MB."""

_log = logging.getLogger("nbengine")


class Engine:
    """An inference engine that can be stepped, inspected and explained.

    `Engine(EngineConfig(model=...))` or `Engine(model=..., **fields)`. It begins paused: `step`
    takes one step, `run` all that are needed, `start` steps in the background. Use it as a context
    manager, or `close` it, to give its memory back at once.

    Raises:
        ModelNotFound, UnsupportedModel, WeightsError, NotEnoughMemory, InvalidField: see
            `nbengine.errors`.
    """

    def __init__(self, config: EngineConfig | None = None, **fields: Any) -> None:
        if config is None:
            known = EngineConfig.__dataclass_fields__
            for name in fields:
                if name not in known:
                    raise InvalidField(name, fields[name], "EngineConfig has no such field")
            config = EngineConfig(**fields)
        elif fields:
            raise InvalidField("config", config, "give a config or its fields, not both")
        elif not isinstance(config, EngineConfig):
            raise InvalidField(
                "config", config, "must be an EngineConfig: a model goes in by name, model=..."
            )
        self.clock: Callable[[], float] = time.monotonic
        self.history = History()
        self.error: BaseException | None = None
        """What ended the last background run, if it failed."""
        self._failure: BaseException | None = None
        """Of the last step; a notebook keeps it too, with the frames that it went through."""
        self._device_lost: DeviceLost | None = None
        self._runner: ModelRunner | None = None
        self._is_started = False
        self._driven: set[str] = set()
        """Unfinished requests whose callers wait for them: while there are any, steps are taken in
        the background even if the engine is paused."""
        self._is_closed = False
        self._is_stepping = False
        self._states: dict[str, RequestState] = {}
        """Unfinished requests by id."""
        self._finished: OrderedDict[str, RequestState] = OrderedDict()
        """The last ones that finished, oldest first."""
        self._finished_size = 0
        self._num_arrivals = 0
        self._seeds = random.Random(config.seed)
        self._on_step: list[Callable[[StepRecord], None]] = []
        self._thread = EngineThread(self, name="nbengine")
        try:
            self._thread.call(lambda: self._load(config))
            print(self.memory)
        except BaseException as error:
            self.close()
            _release_frames(error)  # or what was loaded would stay as long as the error
            raise

    def _load(self, config: EngineConfig) -> None:
        from nbengine.execution.runner import ModelRunner
        from nbengine.models.registry import resolve_model

        path = resolve_model(config.model)
        found = "gguf" if path.suffix == ".gguf" else "safetensors"
        if config.load_format not in ("auto", found):
            raise InvalidField("load_format", config.load_format, f"but {path} holds {found}")
        self.tokenizer: Tokenizer | None = None
        if not config.skip_tokenizer_init:
            from nbengine.tokenizer import load_tokenizer

            self.tokenizer = load_tokenizer(path, config.tokenizer)
        runner, memory = ModelRunner.load(path, config)
        self._runner = runner
        self.memory: MemoryBudget = memory
        self.config: EngineConfig = config.resolve(memory.max_model_len, memory.num_blocks)
        """The configuration, with what was decided at start-up filled in."""
        self.vocab_size = runner.decoder.config.vocab_size
        self._eos_token_ids = frozenset(runner.decoder.config.eos_token_ids) | (
            self.tokenizer.eos_token_ids if self.tokenizer else frozenset()
        )
        self.scheduler = Scheduler(
            self.config.for_scheduler(memory.num_host_blocks),
            self.config.scheduling_policy,
            self.clock,
        )

    # ------------------------------------------------------------------ the step

    def step(self, n: int = 1) -> StepRecord:
        """Take `n` steps (fewer if the work ends) and return the last one's record.

        Raises:
            whatever the model raised. The step is then taken back: nothing is lost, and what it
            touched is computed again in the next one.
        """
        _check_positive("n", n)
        record = self._call(self._step)
        for _ in range(n - 1):
            if not self.has_work:
                break
            record = self._call(self._step)
        return record

    def _step(self) -> StepRecord:
        self._failure = None
        try:
            record = self._take_step()
        except BaseException as error:
            self._failure = error
            self._publish(self.scheduler.take_back(error))
            if self._runner is not None and self._runner.has_lost_device:
                self._device_lost = DeviceLost(
                    f"{self._runner.decoder.device} was lost to {type(error).__name__}: {error}\n"
                    "Nothing on it can be used again in this process: restart the notebook's kernel "
                    "(or the process). CUDA_LAUNCH_BLOCKING=1 in the environment and "
                    "enforce_eager=True make the error appear at the launch that caused it"
                )
                raise self._device_lost from error
            raise
        self._publish(record)
        return record

    def _take_step(self) -> StepRecord:
        scheduler, clock = self.scheduler, self.clock
        assert self._runner is not None
        self._is_stepping = True
        try:
            began = clock()
            plan = scheduler.schedule()
            scheduled = clock()
            batch = self._runner.prepare(plan)
            prepared = clock()
            output = self._runner.compute(batch)
            executed = clock()
            advanced = scheduler.commit(output)
            self._update_outputs(plan, output, advanced)
            return scheduler.seal(
                Phases(
                    schedule=scheduled - began,
                    prepare=prepared - scheduled,
                    execute=executed - prepared,
                    commit=clock() - executed,
                )
            )
        finally:
            self._is_stepping = False

    def _update_outputs(self, plan: StepPlan, output: StepOutput, advanced: list[Sequence]) -> None:
        """Text, stop strings and logprobs of the sequences that got a token."""
        if output.prompt_logprobs:
            for seq, _ in plan.scheduled:
                if rows := output.prompt_logprobs.get(seq.seq_id):
                    end = min(seq.num_computed_tokens + 1, seq.num_prompt_tokens)
                    state = self._states[seq.request.request_id]
                    state.take_prompt_logprobs(end - len(rows), rows)
        for seq in advanced:
            state = self._states[seq.request.request_id]
            try:
                stop = state.update(seq, _logprobs_of(seq, output))
            except Exception as error:  # one sequence's text must not end the others
                self.scheduler.finish(seq, "error", f"{type(error).__name__}: {error}")
                continue
            if stop is not None:
                self.scheduler.finish(seq, "stop", stop)

    def _publish(self, record: StepRecord) -> None:
        """Tell everybody who is interested in a step that is over."""
        self.history.append(record)
        self._deliver(record)
        for listener in tuple(self._on_step):
            try:
                listener(record)
            except Exception:
                _log.exception("a listener of the engine's steps failed, and is not called again")
                self._remove_listener(listener)

    def _deliver(self, record: StepRecord) -> None:
        """Times and outputs of the requests that this step moved on."""
        now = self.clock()
        moved: dict[str, RequestState] = {}
        for admission in record.admitted:
            state = self._state_of(admission.seq_id)
            if state is not None and state.metrics.first_scheduled_time is None:
                state.metrics.first_scheduled_time = record.time
        for seq_id in record.sampled:
            state = self._state_of(seq_id)
            if state is not None:
                moved[state.request_id] = state
                if state.metrics.first_token_time is None:
                    state.metrics.first_token_time = now
                state.metrics.last_token_time = now
        for finish in record.finished:
            state = self._state_of(finish.seq_id)
            if state is not None and state.finished:  # it may be an aborted one's successor
                moved[state.request_id] = state
        for state in moved.values():
            if state.finished:
                self._retire(state, now)
            elif state.subscriber is not None and state.wants_every_output:
                self._send(state, state.next_output())

    def _state_of(self, seq_id: str) -> RequestState | None:
        """The request of a sequence, unless it has been aborted since."""
        return self._states.get(seq_id.partition("#")[0])

    def _send(self, state: RequestState, output: RequestOutput | BaseException) -> None:
        """A subscriber that fails harms nobody else."""
        assert state.subscriber is not None
        try:
            state.subscriber(output)
        except Exception:
            _log.exception("the subscriber of %s failed, and is not called again", state.request_id)
            state.subscriber = None

    def _retire(self, state: RequestState, now: float) -> None:
        """Move a finished request to the finished ones, with its last output sent."""
        name = state.request_id
        if self._states.get(name) is not state:
            return  # a subscriber of this step has aborted it
        del self._states[name]
        self._driven.discard(name)
        state.metrics.finished_time = now
        if state.subscriber is not None:
            self._send(state, state.next_output())
        state.retire()
        self._finished[name] = state
        self._finished_size += state.size
        while len(self._finished) > MAX_FINISHED_KEPT or (
            self._finished_size > MAX_FINISHED_SIZE and len(self._finished) > 1
        ):
            self._forget(next(iter(self._finished)))

    def _forget(self, name: str) -> None:
        state = self._finished.pop(name, None)
        if state is not None:
            self._finished_size -= state.size

    # ------------------------------------------------------------------ requests

    def add_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        subscriber: Subscriber | None = None,
    ) -> str:
        """Queue a request; returns its id. Nothing is computed before the next step.

        Raises:
            InvalidRequest: an empty prompt, ids beyond the vocabulary, a prompt as long as
                `max_model_len`, ...
            InvalidField: a parameter that this model or engine can't serve.
            RequestTooLarge: it could never run here, with the numbers.
        """
        if subscriber is not None and not callable(subscriber):
            raise InvalidField("subscriber", subscriber, "must be callable")
        queue_request = self.check_request(
            prompt, params, request_id=request_id, priority=priority, cache_salt=cache_salt
        )
        return self._call(lambda: queue_request(subscriber))

    def check_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> QueueRequest:
        """All of `add_request` but the queueing, which is what it returns. The checks and the
        tokenising are done here, on the caller's thread: a bad prompt delays nobody."""
        self._check_open()
        text, ids, salt = self._parse_prompt(prompt)
        salt = _checked_salt(cache_salt if cache_salt is not None else salt)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidField("params", params, "must be SamplingParams or BeamSearchParams")
        longest = self.config.max_model_len
        assert longest is not None
        validate_for_model(
            params,
            vocab_size=self.vocab_size,
            max_model_len=longest,
            num_prompt_tokens=len(ids),
            max_logprobs=self.config.max_logprobs,
        )
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**63:
            raise InvalidField("priority", priority, "must be a 64-bit integer")
        if request_id is not None and (
            not isinstance(request_id, str)
            or not 1 <= len(request_id) <= MAX_ID_LENGTH
            or "#" in request_id
        ):
            raise InvalidField(
                "request_id",
                request_id,
                f'must be a string of 1 to {MAX_ID_LENGTH} characters without "#"',
            )
        stops: frozenset[int] = frozenset()
        bad_words: tuple[tuple[int, ...], ...] = ()
        if isinstance(params, SamplingParams):
            stops = frozenset(params.stop_token_ids or ())
            if not params.ignore_eos:
                stops |= self._eos_token_ids
            if self.tokenizer is None:
                for name in ("stop", "bad_words"):
                    if value := getattr(params, name):
                        raise InvalidField(name, value, "needs a tokenizer (skip_tokenizer_init)")
            elif params.bad_words:
                bad_words = self.tokenizer.bad_words_token_ids(params.bad_words)
        max_tokens = params.max_tokens
        request = Request(
            request_id if request_id is not None else self._next_id(),
            ids,
            params,
            priority=priority,
            cache_salt=salt,
            eos_token_ids=self._eos_token_ids,
            stop_token_ids=stops,
            bad_words_token_ids=bad_words,
            max_total_tokens=longest if max_tokens is None else min(longest, len(ids) + max_tokens),
        )
        self.scheduler.check_fits(request)
        return partial(self._queue, request, request_id is not None, text)

    def _next_id(self) -> str:
        """The id of the next request that is given none."""
        names = (f"req-{number}" for number in itertools.count(self._num_arrivals))
        return next(name for name in names if name not in self._states)

    def _queue(
        self, request: Request, is_named: bool, text: str | None, subscriber: Subscriber | None
    ) -> str:
        name = request.request_id if is_named else self._next_id()
        if name in self._states:
            raise InvalidRequest(f"request id {name!r} is in use: choose another, or none")
        seed = request.params.seed if isinstance(request.params, SamplingParams) else None
        request = dataclasses.replace(
            request,
            request_id=name,
            arrival=self._num_arrivals,
            arrival_time=self.clock(),
            seed=self._seeds.getrandbits(63) if seed is None else seed,
        )
        live = self.scheduler.add(request)
        self._num_arrivals += 1
        self._forget(name)  # an earlier one of this id
        metrics = RequestMetrics(request.arrival_time)
        self._states[name] = RequestState(live, text, self.tokenizer, metrics, subscriber)
        return name

    def _parse_prompt(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...], str | None]:
        """Text (if given as text), token ids and salt of a prompt in any of its forms."""
        salt = None
        text: str | None = None
        ids: Any = None
        if isinstance(prompt, Mapping):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown:
                raise InvalidRequest(
                    f"a prompt has no {sorted(map(str, unknown))}: its keys are prompt or "
                    "prompt_token_ids, and cache_salt"
                )
            salt, text, ids = (prompt.get(k) for k in ("cache_salt", "prompt", "prompt_token_ids"))
            if text is not None and not isinstance(text, str):
                raise InvalidRequest(f"a prompt's text is a str, not {type(text).__name__}")
        elif isinstance(prompt, str):
            text = prompt
        else:
            ids = prompt
        if ids is None:
            if text is None:
                raise InvalidRequest("a prompt needs a text or prompt_token_ids")
            if self.tokenizer is None:
                raise InvalidRequest(
                    "this engine has no tokenizer (skip_tokenizer_init): give prompt_token_ids"
                )
            self._check_text_length(text)
            ids = self.tokenizer.encode(text)
        assert self.config.max_model_len is not None
        return (
            text,
            validate_prompt_token_ids(ids, self.vocab_size, self.config.max_model_len),
            salt,
        )

    def _check_text_length(self, text: str) -> None:
        """Refuse a text that can't fit before it is tokenised: that takes seconds a megabyte, in
        which no other Python thread runs, the engine's neither."""
        assert self.tokenizer is not None and self.config.max_model_len is not None
        longest = self.tokenizer.max_token_length * self.config.max_model_len
        if len(text) > longest:
            raise InvalidRequest(
                f"the prompt has {len(text):,} characters, and max_model_len="
                f"{self.config.max_model_len} tokens hold at most {longest:,}: shorten it"
            )

    def abort(self, *request_ids: str) -> None:
        """End requests now and free all they hold; ids that have finished are passed over.

        Raises:
            UnknownRequest: for an id that was never given, after the others were aborted.
        """

        def abort() -> None:
            known = self._states.keys() | self._finished.keys()
            unknown = [name for name in request_ids if name not in known]
            self._abort_now(request_ids)
            if unknown:
                raise UnknownRequest(f"no request {', '.join(map(repr, unknown))}")

        self._call(abort)

    def output(self, request_id: str) -> RequestOutput:
        """All of a request's output so far, or in the end. The last thousand finished ones are
        kept, fewer if they are long.

        Raises:
            UnknownRequest: it was never added, or finished long ago.
        """

        def output() -> RequestOutput:
            state = self._states.get(request_id) or self._finished.get(request_id)
            if state is None:
                raise UnknownRequest(f"no request {request_id!r}")
            return state.output()

        return self._call(output)

    # ------------------------------------------------------------------ running

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    @property
    def is_running(self) -> bool:
        """Whether steps are being taken in the background."""
        return self._is_started

    def start(self) -> None:
        """Take steps in the background whenever there is work, until `pause`. Returns at once."""

        def start() -> None:
            self.error = None
            self._is_started = True

        self._call(start)

    def pause(self) -> None:
        """Stop stepping in the background; what is queued stays. Returns after the current step."""

        def pause() -> None:
            self._is_started = False

        self._call(pause)

    def run(
        self, max_steps: int | None = None, until: Callable[[StepRecord], bool] | None = None
    ) -> StepRecord | None:
        """Step until no work is left, `max_steps` were taken, or `until(record)` is true; returns
        the last record. Interrupting it leaves the engine as it is after the current step."""
        if max_steps is not None:
            _check_positive("max_steps", max_steps)
        record = None
        for _ in itertools.count() if max_steps is None else range(max_steps):
            if not self.has_work:
                break
            record = self.step()
            if until is not None and until(record):
                break
        return record

    @contextlib.contextmanager
    def driving(
        self, requests: Iterable[QueueRequest], subscriber: Subscriber
    ) -> Iterator[list[str]]:
        """Queue `requests` together and take steps in the background, even if the engine is paused,
        until they have finished; those that have not when the block is left are aborted. However it
        is interrupted, none of them stays behind.

        Raises:
            EngineBusy: on the engine's own thread, which would wait for itself.
        """
        if self._thread.is_current:
            raise EngineBusy(
                "this would wait, on the engine's own thread, for steps that only this thread "
                "takes: in a listener or subscriber, use add_request with a subscriber"
            )
        names: list[str] = []
        try:
            self._call(lambda: self._drive(requests, subscriber, names))
            yield names
        finally:
            self._abort_unfinished(names)

    def _drive(
        self, requests: Iterable[QueueRequest], subscriber: Subscriber, names: list[str]
    ) -> None:
        """Each name is noted as soon as its request is queued, for the clean-up of an interrupted
        caller that never got an answer."""
        for queue_request in requests:
            names.append(queue_request(subscriber))
            self._driven.add(names[-1])

    def _wants_step(self) -> bool:
        return (
            (self._is_started or bool(self._driven))
            and not self._is_closed
            and self.scheduler.has_work
        )

    def _background_step(self) -> None:
        try:
            self._step()
        except BaseException as error:  # it reaches whoever waits for a result
            self.error = error
            self._is_started = False
            self._driven.clear()
            for state in list(self._states.values()):
                if state.subscriber is not None:
                    self._send(state, error)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[RequestOutput, None, None]:
        """Yield a request's outputs as they come; leaving the loop early aborts it. It is checked
        at once, and queued when the first output is asked for. `options` are those of
        `check_request`, which says what is raised."""
        return self._stream(self.check_request(prompt, params, **options))

    def _stream(self, request: QueueRequest) -> Generator[RequestOutput, None, None]:
        outputs: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()
        with self.driving([request], outputs.put):
            while True:
                output = outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """`stream`, for asyncio: the event loop is never blocked for a step."""
        return self._astream(self.check_request(prompt, params, **options))

    async def _astream(self, request: QueueRequest) -> AsyncIterator[RequestOutput]:
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        names: list[str] = []

        def deliver(output: RequestOutput | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(outputs.put_nowait, output)
            except RuntimeError:  # the loop has closed: nobody will listen, or clean up
                self._abort_unfinished(names)

        begun = self.submit(lambda: self._drive([request], deliver, names))
        try:
            await asyncio.wrap_future(begun)
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
        finally:  # without waiting, because the task may have been cancelled
            begun.cancel()
            with contextlib.suppress(EngineClosed):
                self.submit(lambda: self._abort_now(names))

    def _abort_unfinished(self, names: Seq[str]) -> None:
        """`abort`, for clean-up: a closed engine is no error, an interrupt does not prevent it, and
        it may be called anywhere (the garbage collector closes a forgotten stream in the middle of
        a step)."""
        with contextlib.suppress(EngineClosed):
            if self._thread.is_current:
                self.submit(lambda: self._abort_now(names))
            else:
                self._call(lambda: self._abort_now(names), must_run=True)

    def _abort_now(self, names: Seq[str]) -> None:
        for name in names:
            state = self._states.get(name)
            if state is not None:
                if not state.finished:
                    self.scheduler.abort(name)
                self._retire(state, self.clock())

    # ------------------------------------------------------------------ looking in

    def snapshot(self) -> Snapshot:
        """Queues and blocks as they stand between two steps."""
        return self._call(lambda: take_snapshot(self.scheduler, self._text_of))

    @property
    def model(self) -> Decoder:
        """The model: its config, weights and forward pass. To be read, by a lesson or a debugger.

        Raises:
            EngineClosed
        """
        self._check_open()
        assert self._runner is not None
        return self._runner.decoder

    @property
    def kv_cache(self) -> KVCache:
        """The keys and values themselves: `kv_cache.k[layer][block]` is `[num_kv_heads, block_size,
        head_dim]`. A step writes to them, so read them while the engine is paused.

        Raises:
            EngineClosed
        """
        self._check_open()
        assert self._runner is not None
        return self._runner.kv_cache

    @property
    def kernels(self) -> EngineKernels:
        """The ops that run the model, to look at and to swap.

        Raises:
            EngineClosed
            InvalidField: torch's operations, or the CPU's own compiled kernels, run it.
        """
        self._check_open()
        assert self._runner is not None
        table = self._runner.kernels
        if table is None:
            raise InvalidField(
                "kernels",
                self.config.kernels,
                "this engine has no ops to look at or to swap. Start it with kernels='cuda' on a GPU, "
                "or kernels='emulated' to have the same run on this machine's CPU, slowly",
            )
        return EngineKernels(self, table)

    def _live_calls(self, *ops: str) -> dict[str, list[Arguments]]:
        assert self._runner is not None
        return self._runner.live_calls(ops, self.scheduler.running)

    def _text_of(self, seq: Sequence) -> str:
        return self._states[seq.request.request_id].text_of(seq)

    def why(self, name: str) -> Explanation:
        """Why a request (or one of its sequences) waits, was preempted, got fewer tokens than it
        wanted, or missed the prefix cache: in words, and as data.

        Raises:
            UnknownRequest: nothing of that name is known (any more).
        """
        return self._call(lambda: explain(self.scheduler, self.history, name))

    def on_step(self, listener: Callable[[StepRecord], None]) -> Callable[[], None]:
        """Have `listener(record)` called after every step (a failed one too), on the engine's
        thread: it must return at once; if it raises, that is logged, and it is not called again.
        Returns a function that ends it."""
        if not callable(listener):
            raise InvalidField("listener", listener, "must be callable")
        self._call(lambda: self._on_step.append(listener))

        def remove() -> None:
            if not self._is_closed:
                self._call(lambda: self._remove_listener(listener))

        return remove

    def _remove_listener(self, listener: Callable[[StepRecord], None]) -> None:
        if listener in self._on_step:
            self._on_step.remove(listener)

    def set_policy(self, policy: str | Policy | type) -> None:
        """Replace the scheduling policy from the next step on."""
        self._call(lambda: self.scheduler.set_policy(policy))

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix; returns how many blocks that freed.

        Raises:
            CacheBusy: while sequences hold blocks.
        """
        return self._call(self.scheduler.reset_prefix_cache)

    def dashboard(self) -> Dashboard:
        """The engine's dashboard: controls, queues, block map and step log, live while it runs (a
        still picture where the notebook extras are not installed). An engine has one; showing it
        twice shows it twice."""
        from nbengine.jupyter.dashboard import dashboard_of

        return dashboard_of(self)

    # ------------------------------------------------------------------ its life

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def submit(self, command: Callable[[], T]) -> Future[T]:
        """Have `command` run on the engine's thread between two steps, and return at once: for
        callbacks, which must not wait for a step. The engine's methods may be called inside."""
        self._check_open()
        return self._thread.submit(lambda: self._if_open(command))

    def _call(self, command: Callable[[], T], *, must_run: bool = False) -> T:
        """The result of `command`, run on the engine's thread between two steps."""
        self._check_open()
        self._check_not_stepping()
        return self._thread.call(lambda: self._if_open(command), must_run=must_run)

    def _check_not_stepping(self) -> None:
        if self._is_stepping and self._thread.is_current:
            raise EngineBusy(
                "the engine is in the middle of a step: a policy looks at the sequence that it is "
                "given; to do more, have it done after the step with engine.submit(command)"
            )

    def _if_open(self, command: Callable[[], T]) -> T:
        self._check_open()
        return command()

    def _check_open(self) -> None:
        if self._device_lost is not None:
            raise DeviceLost(str(self._device_lost)) from self._device_lost
        if self._is_closed:
            raise EngineClosed("this engine was closed; make a new one")

    def close(self) -> None:
        """Abort every request and give all memory back. Closing twice does nothing."""
        if self._is_closed or self._thread.is_elsewhere:  # a fork's memory is its parent's
            return
        self._check_not_stepping()
        self._thread.stop(self._close)

    def _close(self) -> None:
        self._is_closed = True
        _release_frames(self.error)
        _release_frames(self._failure)
        self._abort_now(list(self._states))
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import engine_html

        return engine_html(self)

    def __repr__(self) -> str:
        if self._is_closed:
            return "Engine(closed)"
        if self._runner is None:
            return "Engine(loading)"
        s = self.scheduler
        return (
            f"Engine({self.config.model}, step {s.step_count}, {len(s.running)} running, "
            f"{len(s.waiting)} waiting, {s.pool.num_held}/{s.pool.num_blocks} blocks held)"
        )


def _logprobs_of(seq: Sequence, output: StepOutput) -> dict[int, Logprob] | None:
    """Of the token that `seq` just got. Samples that have just been forked were all drawn from
    the row of the first, whose id is the request's."""
    rows = output.logprobs.get(seq.seq_id)
    if rows is None:
        rows = output.logprobs.get(seq.request.request_id)
    if rows is None:
        return None
    return rows[seq.index if len(rows) > 1 else 0]


def _release_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error, and of those behind it, hold: tensors and all."""
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            waiting += (each.__cause__, each.__context__)


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidField(name, value, "must be a positive integer")


def _checked_salt(salt: object) -> str | None:
    if salt is None:
        return None
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise InvalidField(
            "cache_salt", salt, f"must be a string of 1 to {MAX_SALT_LENGTH} characters"
        )
    return salt
