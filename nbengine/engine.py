"""`Engine`: a model, a scheduler and a paged KV cache, and the step that ties them together.

A step (`Engine._step`) is: schedule, prepare, execute, commit. All of it happens on the engine's
own thread (see `engine_thread`); the public methods may be called from any thread, hand their work
to that thread between two steps, and return its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import random
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
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
from nbengine.engine_thread import EngineThread
from nbengine.errors import EngineClosed, InvalidField, InvalidRequest, UnknownRequest
from nbengine.outputs import RequestMetrics, RequestOutput, RequestState, Subscriber

if TYPE_CHECKING:
    from nbengine.execution.kv_cache import KVCache
    from nbengine.execution.memory import MemoryBudget
    from nbengine.execution.runner import ModelRunner
    from nbengine.jupyter.dashboard import Dashboard
    from nbengine.models.decoder import Decoder
    from nbengine.tokenizer import Tokenizer

T = TypeVar("T")

Prompt = str | Seq[int] | Mapping[str, Any]
"""A text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; a mapping may carry a
`cache_salt`."""

Params = SamplingParams | BeamSearchParams

MAX_SALT_LENGTH = 128
MAX_FINISHED_KEPT = 1000
"""Finished requests whose outputs can still be asked for."""


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
        self.clock: Callable[[], float] = time.monotonic
        self.history = History()
        self.error: BaseException | None = None
        """What ended the last background run, if it failed."""
        self._is_started = False
        self._num_drivers = 0
        self._is_closed = False
        self._states: OrderedDict[str, RequestState] = OrderedDict()
        self._arrivals = itertools.count()
        self._seeds = random.Random(config.seed)
        self._on_step: list[Callable[[StepRecord], None]] = []
        self._thread = EngineThread(self, name="nbengine")
        try:
            self._thread.call(lambda: self._load(config))
        except BaseException:
            self.close()
            raise
        print(self.memory)

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
        runner, memory = ModelRunner.load(
            path,
            dtype=config.dtype,
            device=config.device,
            quantization=config.quantization,  # type: ignore[arg-type]  # checked by the config
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            gpu_memory_utilization=config.gpu_memory_utilization,
            num_gpu_blocks_override=config.num_gpu_blocks_override,
            swap_space=config.swap_space if config.preemption_mode == "swap" else 0.0,
        )
        self._runner: ModelRunner | None = runner
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
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InvalidField("n", n, "must be a positive integer")
        record = self._call(self._step)
        for _ in range(n - 1):
            if not self.has_work:
                break
            record = self._call(self._step)
        return record

    def _step(self) -> StepRecord:
        scheduler, clock = self.scheduler, self.clock
        assert self._runner is not None
        began = clock()
        try:
            plan = scheduler.schedule()
            scheduled = clock()
            batch = self._runner.prepare(plan)
            prepared = clock()
            output = self._runner.compute(batch)
            executed = clock()
            advanced = scheduler.commit(output)
            self._update_outputs(plan, output, advanced)
        except BaseException as error:
            self.history.append(scheduler.take_back(error))
            raise
        record = scheduler.seal(
            Phases(
                schedule=scheduled - began,
                prepare=prepared - scheduled,
                execute=executed - prepared,
                commit=clock() - executed,
            )
        )
        self.history.append(record)
        self._deliver(record)
        return record

    def _update_outputs(self, plan: StepPlan, output: StepOutput, advanced: list[Sequence]) -> None:
        """Text, stop strings and logprobs of the sequences that got a token."""
        if output.prompt_logprobs:
            for seq, _ in plan.scheduled:
                if rows := output.prompt_logprobs.get(seq.seq_id):
                    end = min(seq.num_computed_tokens + 1, seq.num_prompt_tokens)
                    self._state_of(seq.seq_id).take_prompt_logprobs(end - len(rows), rows)
        for seq in advanced:
            state = self._states[seq.request.request_id]
            try:
                stop = state.update(seq, _logprobs_of(seq, output))
            except Exception as error:  # one sequence's text must not end the others
                self.scheduler.finish(seq, "error", f"{type(error).__name__}: {error}")
                continue
            if stop is not None:
                self.scheduler.finish(seq, "stop", stop)

    def _deliver(self, record: StepRecord) -> None:
        """Times and outputs of the requests that this step moved on."""
        now = self.clock()
        moved: dict[str, RequestState] = {}
        for admission in record.admitted:
            state = self._state_of(admission.seq_id)
            if state.metrics.first_scheduled_time is None:
                state.metrics.first_scheduled_time = record.time
        for seq_id in (*record.sampled, *(f.seq_id for f in record.finished)):
            state = self._state_of(seq_id)
            moved[state.live.request.request_id] = state
            if seq_id in record.sampled:
                if state.metrics.first_token_time is None:
                    state.metrics.first_token_time = now
                state.metrics.last_token_time = now
        for state in moved.values():
            if state.finished:
                self._retire(state, now)
            elif state.subscriber is not None and state.wants_every_output:
                state.subscriber(state.output())
        for listener in self._on_step:
            listener(record)

    def _state_of(self, seq_id: str) -> RequestState:
        return self._states[seq_id.partition("#")[0]]

    def _retire(self, state: RequestState, now: float) -> None:
        state.metrics.finished_time = now
        self._states.move_to_end(state.live.request.request_id)
        if state.subscriber is not None:
            state.subscriber(state.output())
            state.subscriber = None
        while len(self._states) > MAX_FINISHED_KEPT and next(iter(self._states.values())).finished:
            self._states.popitem(last=False)

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
        return self._call(
            self._checked(prompt, params, request_id, priority, cache_salt, subscriber)
        )

    def _checked(
        self,
        prompt: Prompt,
        params: Params | None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        subscriber: Subscriber | None = None,
    ) -> Callable[[], str]:
        """The command that queues this request. All that can be checked, and the tokenising, is
        done here, on the caller's thread: a bad or huge prompt delays nobody."""
        text, ids, salt = self._parse_prompt(prompt)
        salt = _checked_salt(cache_salt if cache_salt is not None else salt)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidField("params", params, "must be SamplingParams or BeamSearchParams")
        assert self.config.max_model_len is not None
        validate_for_model(
            params,
            vocab_size=self.vocab_size,
            max_model_len=self.config.max_model_len,
            num_prompt_tokens=len(ids),
            max_logprobs=self.config.max_logprobs,
        )
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**63:
            raise InvalidField("priority", priority, "must be a 64-bit integer")
        if request_id is not None and (
            not isinstance(request_id, str) or not request_id or "#" in request_id
        ):
            raise InvalidField("request_id", request_id, 'must be a non-empty string without "#"')

        return lambda: self._add(text, ids, params, request_id, priority, salt, subscriber)

    def _add(
        self,
        text: str | None,
        ids: tuple[int, ...],
        params: Params,
        request_id: str | None,
        priority: int,
        salt: str | None,
        subscriber: Subscriber | None,
    ) -> str:
        assert self.config.max_model_len is not None
        arrival = next(self._arrivals)
        name = request_id if request_id is not None else f"req-{arrival}"
        if name in self._states and not self._states[name].finished:
            raise InvalidRequest(f"request id {name!r} is in use: choose another, or none")
        eos = self._eos_token_ids
        stops: frozenset[int] = frozenset()
        bad_words: tuple[tuple[int, ...], ...] = ()
        seed = None
        max_tokens = params.max_tokens
        if isinstance(params, SamplingParams):
            stops = frozenset(params.stop_token_ids or ())
            if not params.ignore_eos:
                stops |= eos
            seed = params.seed
            if params.bad_words:
                if self.tokenizer is None:
                    raise InvalidField(
                        "bad_words", params.bad_words, "needs a tokenizer (skip_tokenizer_init)"
                    )
                bad_words = self.tokenizer.bad_words_token_ids(params.bad_words)
        longest = self.config.max_model_len
        request = Request(
            name,
            ids,
            params,
            arrival=arrival,
            arrival_time=self.clock(),
            priority=priority,
            cache_salt=salt,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            eos_token_ids=eos,
            stop_token_ids=stops,
            bad_words_token_ids=bad_words,
            max_total_tokens=longest if max_tokens is None else min(longest, len(ids) + max_tokens),
        )
        live = self.scheduler.add(request)
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
            ids = self.tokenizer.encode(text)
        assert self.config.max_model_len is not None
        return (
            text,
            validate_prompt_token_ids(ids, self.vocab_size, self.config.max_model_len),
            salt,
        )

    def abort(self, *request_ids: str) -> None:
        """End requests now and free all they hold; ids that have finished are passed over.

        Raises:
            UnknownRequest: for an id that was never given, after the others were aborted.
        """

        def abort() -> None:
            self._abort_now(request_ids)
            unknown = [name for name in request_ids if name not in self._states]
            if unknown:
                raise UnknownRequest(f"no request {', '.join(map(repr, unknown))}")

        self._call(abort)

    def output(self, request_id: str) -> RequestOutput:
        """A request's output so far, or in the end (the last thousand finished ones are kept).

        Raises:
            UnknownRequest: it was never added, or finished long ago.
        """

        def output() -> RequestOutput:
            if request_id not in self._states:
                raise UnknownRequest(f"no request {request_id!r}")
            return self._states[request_id].output()

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
        record = None
        for _ in itertools.count() if max_steps is None else range(max_steps):
            if not self.has_work:
                break
            record = self.step()
            if until is not None and until(record):
                break
        return record

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """While inside, steps are taken in the background even if the engine is paused."""
        self._call(lambda: self._add_driver(1))
        try:
            yield
        finally:
            if not self._is_closed:
                self._call(lambda: self._add_driver(-1))

    def _add_driver(self, change: int) -> None:
        self._num_drivers += change

    def _wants_step(self) -> bool:
        return (
            (self._is_started or self._num_drivers > 0)
            and not self._is_closed
            and self.scheduler.has_work
        )

    def _background_step(self) -> None:
        try:
            self._step()
        except BaseException as error:  # it reaches whoever waits for a result
            self.error = error
            self._is_started = False
            for state in list(self._states.values()):
                if state.subscriber is not None and not state.finished:
                    state.subscriber(error)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> Generator[RequestOutput, None, None]:
        """Add a request and yield its outputs as they come; leaving the loop early aborts it.
        `options` are those of `add_request`."""
        outputs: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()
        name = self.add_request(prompt, params, subscriber=outputs.put, **options)
        try:
            with self.driving():
                while True:
                    output = outputs.get()
                    if isinstance(output, BaseException):
                        raise output
                    yield output
                    if output.finished:
                        return
        finally:
            self.abort_unfinished([name])

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """`stream`, for asyncio: the event loop is never blocked for a step."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()

        def deliver(output: RequestOutput | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        add = self._checked(prompt, params, subscriber=deliver, **options)

        def begin() -> str:
            name = add()
            self._add_driver(1)
            return name

        def end(begun: Future[str]) -> None:
            if not begun.cancelled() and begun.exception() is None:
                self._thread.submit(lambda: self._end_stream(begun.result()))

        future = self.submit(begin)
        try:
            await asyncio.wrap_future(future)
            while True:
                output = await outputs.get()
                if isinstance(output, BaseException):
                    raise output
                yield output
                if output.finished:
                    return
        finally:  # also when the task is cancelled before the request was queued
            future.add_done_callback(end)

    def _end_stream(self, name: str) -> None:
        self._abort_now([name])
        self._add_driver(-1)

    def abort_unfinished(self, names: Seq[str]) -> None:
        """`abort`, for clean-up: unknown ids and a closed engine are no error."""
        if not self._is_closed:
            self._call(lambda: self._abort_now(names))

    def _abort_now(self, names: Seq[str]) -> None:
        for name in names:
            state = self._states.get(name)
            if state is not None and not state.finished:
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
        """Have `listener(record)` called after every step, on the engine's thread: it must return
        at once and never raise. Returns a function that ends it."""
        self._call(lambda: self._on_step.append(listener))

        def remove() -> None:
            if not self._is_closed:
                self._call(lambda: self._on_step.remove(listener))

        return remove

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

    def _call(self, command: Callable[[], T]) -> T:
        """The result of `command`, run on the engine's thread between two steps."""
        self._check_open()
        return self._thread.call(lambda: self._if_open(command))

    def _if_open(self, command: Callable[[], T]) -> T:
        self._check_open()
        return command()

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineClosed("this engine was closed; make a new one")

    def close(self) -> None:
        """Abort every request and give all memory back. Closing twice does nothing."""
        if self._is_closed:
            return

        def close() -> None:
            self._is_closed = True
            for state in list(self._states.values()):
                if not state.finished:
                    self.scheduler.abort(state.live.request.request_id)
                    self._retire(state, self.clock())
            runner, self._runner = getattr(self, "_runner", None), None
            if runner is not None:
                runner.close()

        self._thread.call(close)
        self._thread.stop()

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


def _checked_salt(salt: object) -> str | None:
    if salt is None:
        return None
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise InvalidField(
            "cache_salt", salt, f"must be a string of 1 to {MAX_SALT_LENGTH} characters"
        )
    return salt
