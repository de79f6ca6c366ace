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
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from nbengine.admission import Admission, Params, Prompt
from nbengine.config import EngineConfig
from nbengine.core.breakpoints import Breakpoint, Condition, Stop, condition
from nbengine.core.history import History
from nbengine.core.policies import Policy
from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.core.scheduler import Fit, Scheduler
from nbengine.core.snapshot import Snapshot
from nbengine.core.state import Keyframe, State
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
from nbengine.requests import Requests
from nbengine.rewind import Rewind
from nbengine.startup import StartupTimes

if TYPE_CHECKING:
    from nbengine.core.simulate import Simulated
    from nbengine.execution.kv_cache import KVCache
    from nbengine.execution.memory import MemoryBudget
    from nbengine.execution.probe import Probe
    from nbengine.execution.runner import ModelRunner
    from nbengine.jupyter.dashboard import Dashboard
    from nbengine.kernels.op import Arguments
    from nbengine.models.decoder import Decoder
    from nbengine.tokenizer import Tokenizer

T = TypeVar("T")

QueueRequest = Callable[[Subscriber | None], str]
"""A request that was checked: queues it, on the engine's thread, and returns its id."""

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
        self.startup = StartupTimes()
        """Seconds that each phase of the start took."""
        self.history = History()
        self.error: BaseException | None = None
        """What ended the last background run, if it failed."""
        self._failure: BaseException | None = None
        """Of the last step; a notebook keeps it too, with the frames that it went through."""
        self._device_lost: DeviceLost | None = None
        self._runner: ModelRunner | None = None
        self._is_started = False
        self._is_closed = False
        self._is_stepping = False
        self.is_computing = threading.Event()
        """Set while the model computes a step: the time for other threads to do their own work, for
        before and after it they would take Python from the step."""
        self.requests = Requests()
        """What callers know of, with texts and times; to be read on the engine's thread."""
        self._num_arrivals = 0
        self._seeds = random.Random(config.seed)
        self._on_step: list[Callable[[StepRecord], None]] = []
        self._breakpoints: list[Breakpoint] = []
        self.stopped_at: Stop | None = None
        """The breakpoint that the last run ended at, if it ended at one."""
        self._rewound: weakref.ref[Rewind] | None = None
        """The last one, as long as anybody can read it: it holds all records that were dropped."""
        self._thread = EngineThread(self, name="nbengine")
        try:
            self._thread.call(lambda: self._load(config))
            print(self.memory)
        except BaseException as error:
            self.close()
            _release_frames(error)  # or what was loaded would stay as long as the error
            raise

    def _load(self, config: EngineConfig) -> None:
        startup = self.startup
        with startup.phase("import torch and the model's code"):
            from nbengine.execution.runner import ModelRunner
            from nbengine.models.registry import resolve_model

        with startup.phase("find the model"):
            path = resolve_model(config.model)
        found = "gguf" if path.suffix == ".gguf" else "safetensors"
        if config.load_format not in ("auto", found):
            raise InvalidField("load_format", config.load_format, f"but {path} holds {found}")
        self.tokenizer: Tokenizer | None = None
        if not config.skip_tokenizer_init:
            with startup.phase("tokenizer"):
                from nbengine.tokenizer import load_tokenizer

                self.tokenizer = load_tokenizer(path, config.tokenizer)
        runner, memory = ModelRunner.load(path, config, startup)
        self._runner = runner
        self.memory: MemoryBudget = memory
        self.config: EngineConfig = config.resolve(memory.max_model_len, memory.num_blocks)
        """The configuration, with what was decided at start-up filled in."""
        self.vocab_size = runner.decoder.config.vocab_size
        self._begin(
            frozenset(runner.decoder.config.eos_token_ids)
            | (self.tokenizer.eos_token_ids if self.tokenizer else frozenset()),
            memory.num_host_blocks,
        )

    def _begin(self, eos_token_ids: frozenset[int], num_host_blocks: int) -> None:
        """Queues and history, once the model's and the memory's numbers are known."""
        self._admission = Admission(self.config, self.tokenizer, self.vocab_size, eos_token_ids)
        self.scheduler = Scheduler(
            self.config.for_scheduler(num_host_blocks),
            self.config.scheduling_policy,
            self.clock,
        )
        self.history.keep(Keyframe(self.scheduler))

    # ------------------------------------------------------------------ the step

    def step(self, n: int = 1) -> StepRecord:
        """Take `n` steps (fewer if the work ends, a breakpoint is met, or the engine is rewound) and
        return the last one's record.

        Raises:
            whatever the model raised. The step is then taken back: nothing is lost, and what it
            touched is computed again in the next one.
        """
        _check_positive("n", n)
        num_cuts = self.history.num_cuts
        record = self._call(self._asked_step)
        for _ in range(n - 1):
            if not self.has_work or self._is_stopped(num_cuts):
                break
            record = self._call(self._asked_step)
        return record

    def _is_stopped(self, num_cuts: int) -> bool:
        """Whether a breakpoint was met, or the engine rewound since there were `num_cuts`."""
        return self.stopped_at is not None or self.history.num_cuts != num_cuts

    def _asked_step(self) -> StepRecord:
        self.stopped_at = None  # steps for those who wait for an answer go on behind it
        return self._step()

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
            rewound = self._rewound() if self._rewound is not None else None
            plan.keeps_logits = rewound is not None and rewound.watches(plan)
            scheduled = clock()
            batch = self._runner.prepare(plan)
            prepared = clock()
            self.is_computing.set()
            output = self._runner.compute(batch)
            self.is_computing.clear()
            executed = clock()
            advanced = scheduler.commit(output)
            if rewound is not None and plan.keeps_logits:
                for seq in advanced:
                    logits = output.logits.get(
                        seq.seq_id, output.logits.get(seq.request.request_id)
                    )
                    rewound.compare(seq, scheduler.step_count + 1, logits)
            self.requests.take(plan, output, advanced, scheduler.finish)
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
            self.is_computing.clear()

    def _publish(self, record: StepRecord) -> None:
        """Tell everybody who is interested in a step that is over, until one of them rewinds."""
        num_cuts = self.history.num_cuts
        self.history.append(record)
        if self.history.wants_keyframe:
            self.history.keep(Keyframe(self.scheduler))
        self._stop_at_breakpoints(record)
        if self.history.num_cuts == num_cuts:
            self.requests.deliver(record, self.clock())
        for listener in tuple(self._on_step):
            if self.history.num_cuts != num_cuts:
                return
            try:
                listener(record)
            except Exception:
                _log.exception("a listener of the engine's steps failed, and is not called again")
                self._remove_listener(listener)

    def _stop_at_breakpoints(self, record: StepRecord) -> None:
        num_cuts = self.history.num_cuts
        self._breakpoints = [b for b in self._breakpoints if b.is_enabled]
        for each in self._breakpoints:
            error = None
            try:
                holds = bool(each.holds(record))
            except Exception as raised:
                error, holds = raised, True
            if self.history.num_cuts != num_cuts:
                return  # the condition has rewound: what it looked at is no more
            if holds:
                each.num_hits += 1
                if each.is_for_once or error is not None:
                    each.remove()
                self.stopped_at = self.stopped_at or Stop(each, record, error)
                self._is_started = False

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
        request, text = self._admission.check(
            prompt,
            params,
            request_id=request_id if request_id is not None else self._next_id(),
            priority=priority,
            cache_salt=cache_salt,
        )
        self.scheduler.check_fits(request)
        return partial(self._queue, request, request_id is not None, text)

    def fit(self, prompt: Prompt, params: Params | None = None) -> Fit:
        """Whether a request could ever run here, with the numbers: blocks, seats and, without chunked
        prefill, the token budget. Nothing is queued.

        Raises:
            InvalidRequest, InvalidField: as `add_request`.
        """
        self._check_open()
        request, _ = self._admission.check(
            prompt, params, request_id="fit", priority=0, cache_salt=None
        )
        return self.scheduler.fit(request)

    def _next_id(self) -> str:
        """The id of the next request that is given none."""
        names = (f"req-{number}" for number in itertools.count(self._num_arrivals))
        return next(name for name in names if name not in self.requests.unfinished)

    def _queue(
        self, request: Request, is_named: bool, text: str | None, subscriber: Subscriber | None
    ) -> str:
        name = request.request_id if is_named else self._next_id()
        if name in self.requests.unfinished:
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
        metrics = RequestMetrics(request.arrival_time)
        self.requests.add(RequestState(live, text, self.tokenizer, metrics, subscriber))
        return name

    def abort(self, *request_ids: str) -> None:
        """End requests now and free all they hold; ids that have finished are passed over.

        Raises:
            UnknownRequest: for an id that was never given, after the others were aborted.
        """

        def abort() -> None:
            unknown = [name for name in request_ids if name not in self.requests]
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

        return self._call(lambda: self.requests[request_id].output())

    def metrics(self, request_id: str) -> RequestMetrics:
        """When a request came, was first worked on, and got each of its tokens.

        Raises:
            UnknownRequest: as `output`.
        """
        return self._call(lambda: self.requests[request_id].metrics_now())

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
            self.error = self.stopped_at = None
            self._is_started = True

        self._call(start)

    def pause(self) -> None:
        """Stop stepping in the background; what is queued stays. Returns after the current step."""

        def pause() -> None:
            self._is_started = False

        self._call(pause)

    def run(
        self, max_steps: int | None = None, until: str | Condition | None = None
    ) -> StepRecord | None:
        """Step until no work is left, `max_steps` were taken, a breakpoint is met, the engine is
        rewound, or `until` is met: the name of a condition (see `break_on`) or a function of the
        `StepRecord`. Returns the last record. Interrupting it leaves the engine as it is after the
        current step."""
        if max_steps is not None:
            _check_positive("max_steps", max_steps)
        is_reached = None if until is None else condition(until)
        record, num_cuts = None, self.history.num_cuts
        for _ in itertools.count() if max_steps is None else range(max_steps):
            if not self.has_work:
                break
            record = self.step()
            if self._is_stopped(num_cuts) or (is_reached is not None and is_reached(record)):
                break
        return record

    def break_on(self, on: str | Condition, *, once: bool = False) -> Breakpoint:
        """Pause after every step (or the first, `once`) that meets a condition: "preemption", "finish", "prefix_miss",
        "out_of_blocks", "eviction", "copy_on_write", or a function of the `StepRecord`, which is
        called on the engine's thread and must return at once. It ends `run` and `step(n)`, and pauses
        what runs in the background; `stopped_at` says where. Whoever waits for an answer
        (`generate`, `stream`) still gets it. `remove()` what it returns to go on unhindered.

        Raises:
            InvalidField: not a name of a condition, nor callable.
        """
        added = Breakpoint.on(on, once=once)
        self._call(lambda: self._breakpoints.append(added))
        return added

    @property
    def breakpoints(self) -> tuple[Breakpoint, ...]:
        """Those that were set and not removed."""
        return tuple(b for b in self._breakpoints if b.is_enabled)

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
            self._abort_unfinished(names, subscriber)

    def _drive(
        self, requests: Iterable[QueueRequest], subscriber: Subscriber, names: list[str]
    ) -> None:
        """Each name is noted as soon as its request is queued, for the clean-up of an interrupted
        caller that never got an answer."""
        for queue_request in requests:
            names.append(queue_request(subscriber))
            self.requests.driven.add(names[-1])

    def _wants_step(self) -> bool:
        return (
            (self._is_started or bool(self.requests.driven))
            and not self._is_closed
            and self.scheduler.has_work
        )

    def _background_step(self) -> None:
        try:
            self._step()
        except BaseException as error:  # it reaches whoever waits for a result
            self.error = error
            self._is_started = False
            self.requests.tell_all(error)

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
                self._abort_unfinished(names, deliver)

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
                self.submit(lambda: self._abort_now(self.requests.of(deliver, names)))

    def _abort_unfinished(self, names: Seq[str], subscriber: Subscriber) -> None:
        """`abort`, for clean-up: a closed engine is no error, an interrupt does not prevent it, and
        it may be called anywhere (the garbage collector closes a forgotten stream in the middle of
        a step)."""

        def abort() -> None:
            self._abort_now(self.requests.of(subscriber, names))

        with contextlib.suppress(EngineClosed):
            if self._thread.is_current:
                self.submit(abort)
            else:
                self._call(abort, must_run=True)

    def _abort_now(self, names: Seq[str]) -> None:
        for name in names:
            state = self.requests.unfinished.get(name)
            if state is not None:
                if not state.finished:
                    self.scheduler.abort(name)
                self.requests.retire(state, self.clock())

    # ------------------------------------------------------------------ time travel

    def state_at(self, step: int) -> Snapshot:
        """Queues, block tables, reference counts, free list and prefix cache exactly as after step
        `step`, rebuilt from the history; 0 is before the first. The engine is not touched.

        Raises:
            UnknownStep: the step has not been taken, or the history no longer reaches it.
        """
        return self.history.state_at(step).snapshot(self._decoded_output)

    def _decoded_output(self, seq: Sequence) -> str:
        return "" if self.tokenizer is None else self.tokenizer.decode(seq.output_token_ids)

    def rewind(self, step: int) -> Rewind:
        """Go back to how things stood after step `step`, and pause. Every sequence is cut back to the
        tokens that it had, and its keys and values are computed again when it runs; requests that
        came later are gone, those that ended later live again. Policy and budgets stay as they are
        now, and what the prefix cache holds stays in it.

        With greedy or seeded sampling the same tokens come again on the same device, which is
        guaranteed with `batch_invariant=True`. Otherwise a sum in another order may tip a near tie:
        what this returns reports the first token of each sequence that differs, with the logits of
        both.

        Raises:
            UnknownStep: the step has not been taken, or the history no longer reaches it.
        """
        return self._call(lambda: self._rewind(step))

    def _rewind(self, step: int) -> Rewind:
        state = self.history.state_at(step)
        alive = dict(state.live)
        self.scheduler.rewind(state)
        dropped = self.history.cut(step)
        self.history.keep(Keyframe(self.scheduler))
        self._is_started, self.error, self.stopped_at = False, None, None
        expected, gone = self.requests.rewind(alive, dropped, self.tokenizer)
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        rewound = Rewind(step, dropped, expected, lambda token: decode([token]) if decode else "")
        self._rewound = weakref.ref(rewound)
        self.requests.tell_gone(gone, self.clock())  # last: a subscriber may go on from here
        return rewound

    def fork(
        self, step: int, policy: str | Policy | type | None = None, **changes: Any
    ) -> Simulated:
        """What would have happened after step `step` under another policy or other numbers
        (`max_num_batched_tokens`, `num_blocks`, `max_num_seqs`, ...: fields of `SchedulerConfig`): the
        scheduler alone, with the requests and the tokens that came in truth. The engine is not
        touched; only its policy is asked where no other is named, so name anew one that keeps a state. Compare what it returns with `engine.history` (`nbengine.compare`); see
        `nbengine.core.simulate.fork`.

        Raises:
            UnknownStep, InvalidField: as that.
        """
        from nbengine.core.simulate import fork

        policy = self.scheduler.policy if policy is None else policy
        return fork(self.history, step, self.scheduler.config, policy, **changes)

    # ------------------------------------------------------------------ looking in

    def snapshot(self) -> Snapshot:
        """Queues and blocks as they stand between two steps."""
        return self._call(lambda: State.of(self.scheduler).snapshot(self.requests.text_of))

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
    def ops_version(self) -> int:
        """Grows when an op is swapped or restored."""
        table = None if self._runner is None else self._runner.kernels
        return 0 if table is None else table.version

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
                "this engine has no ops to look at or to swap. One on a GPU has, with kernels='cuda'; "
                "on this machine's CPU, slowly, Engine(..., kernels='emulated'), which in a notebook is "
                f"%nb_load {self.config.model} --kernels emulated",
            )
        return EngineKernels(self, table)

    def _live_calls(self, *ops: str, step: int | None = None) -> dict[str, list[Arguments]]:
        assert self._runner is not None
        if step is None:
            return self._runner.live_calls(ops, self.scheduler.running)
        return self._runner.calls_of(ops, self.history.batch_at(step))

    def why(self, name: str) -> Explanation:
        """Why a request (or one of its sequences) waits, was preempted, got fewer tokens than it
        wanted, or missed the prefix cache: in words, and as data.

        Raises:
            UnknownRequest: nothing of that name is known (any more).
        """
        return self._call(lambda: explain(self.scheduler, self.history, name))

    def probe(self, name: str, step: int | None = None) -> Probe:
        """What the model sees at the last token that was computed of a sequence after step `step` (or
        now): logits, top candidates, hidden states and attention weights. Its tokens up to there are
        computed again, alone and over blocks of their own, between two steps.

        Raises:
            UnknownRequest: no sequence of that name was unfinished then.
            UnknownStep: the history does not reach that step.
            InvalidRequest: nothing of it was computed yet.
        """
        return self._call(lambda: self._probe(name, step))

    def _probe(self, name: str, step: int | None) -> Probe:
        from nbengine.execution.probe import Probe

        assert self._runner is not None
        state = State.of(self.scheduler) if step is None else self.history.state_at(step)
        seq = state.sequences.get(name)
        if seq is None:
            raise UnknownRequest(f"no unfinished sequence {name!r} after step {state.step}")
        tokens = seq.tokens[: seq.num_computed_tokens]
        if not tokens:
            raise InvalidRequest(
                f"of {name!r} nothing is computed after step {state.step} ({seq.status}): there is "
                "nothing to look at yet"
            )
        inside = self._runner.probe(tokens, self.config.max_num_batched_tokens)
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        return Probe(
            name,
            state.step,
            tuple(tokens),
            tuple(seq.block_table),
            state.block_size,
            *inside,
            lambda token: decode([token], skip_special_tokens=False) if decode else "",
        )

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

    def set_max_num_batched_tokens(self, num_tokens: int) -> None:
        """Replace the token budget from the next step on.

        Raises:
            InvalidField: more than the engine was started with, for which its buffers were made; or,
                without chunked prefill, less than `max_model_len`.
        """
        _check_positive("max_num_batched_tokens", num_tokens)
        most, longest = self.config.max_num_batched_tokens, self.config.max_model_len
        if num_tokens > most:
            raise InvalidField(
                "max_num_batched_tokens",
                num_tokens,
                f"the engine was started with {most}, and its buffers hold no more",
            )
        assert longest is not None
        if not self.config.enable_chunked_prefill and num_tokens < longest:
            raise InvalidField(
                "max_num_batched_tokens",
                num_tokens,
                f"is less than max_model_len={longest}, which must fit one step because "
                "enable_chunked_prefill is off",
            )
        self._call(lambda: self.scheduler.set_max_num_batched_tokens(num_tokens))

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
        self._abort_now(list(self.requests.unfinished))
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
