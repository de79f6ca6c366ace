"""`Dashboard`: an engine's controls, queues, block map and step log, live in a notebook.

The page's messages become commands in the engine's queue and are never waited for; what comes of
them shows in the next frame. A `Publisher` thread alone writes to the widget. Without ipywidgets
and anywidget, or where a notebook is read without a kernel, the same picture stands still.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from nbengine.core.breakpoints import condition
from nbengine.core.request import Sequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.engine import Engine
from nbengine.errors import (
    EngineClosed,
    InvalidField,
    InvalidRequest,
    NbengineError,
    UnknownRequest,
    UnknownStep,
)
from nbengine.jupyter.block_map import describe_block
from nbengine.jupyter.frame import TEXT_TAIL, Feed, Moment, Notice, gather
from nbengine.jupyter.live_output import LiveOutput
from nbengine.jupyter.publisher import Publisher
from nbengine.jupyter.views import snapshot_html, snapshot_text, steps_html, steps_text
from nbengine.llm import chat_prompt
from nbengine.outputs import RequestMetrics
from nbengine.rewind import Rewind

INSTALL_HINT = 'For the live dashboard: pip install "nbengine[notebook]"'

_dashboards: weakref.WeakKeyDictionary[Engine, Dashboard] = weakref.WeakKeyDictionary()
_dashboards_lock = threading.Lock()


def dashboard_of(engine: Engine) -> Dashboard:
    """The engine's one dashboard; a new one if the last was closed.

    Raises:
        EngineClosed
    """
    if engine.is_closed:
        raise EngineClosed("this engine was closed; make a new one")
    with _dashboards_lock:
        dashboard = _dashboards.get(engine)
        if dashboard is None or dashboard.is_closed:
            dashboard = _dashboards[engine] = Dashboard(engine)
        return dashboard


def close_dashboard_of(engine: Engine) -> None:
    """Have the engine's dashboard, if it has one, leave its last picture before this returns."""
    with _dashboards_lock:
        dashboard = _dashboards.get(engine)
    if dashboard is not None:
        dashboard.close()


class Dashboard:
    """What `engine.dashboard()` returns: display it, or print it. It does not keep its engine
    alive; when the engine is closed, the dashboard closes too and leaves its last picture."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._history, self._tokenizer = engine.history, engine.tokenizer
        self._feed = Feed()
        self._notice: Notice | None = None
        self._explanation: str | None = None
        self._kernels: dict[str, Any] | None = None
        """What each op cost in a step, once it was asked for, until another takes an op's place."""
        self._ops_version = 0
        self._rewound: Rewind | None = None
        """The last one that was asked for here, while it has something to tell."""
        self._cursor: int | None = None
        self._selected: str | None = None
        self._block: int | None = None
        self._block_then: tuple[object, dict[str, Any]] | None = None
        self._asked: tuple[int, int] | None = None
        self._past_told: object = None
        self._num_answered = 0
        self._output = LiveOutput(self.close)
        self._is_closed = False
        self._widget = _make_widget()
        self._publisher: Publisher | None = None
        if self._widget is not None:
            self._widget.on_msg(lambda widget, content, buffers: self.receive(content))
            self._publisher = Publisher(engine, self._show, self._end)
            self._publisher.start()

    # ------------------------------------------------------------------ to the page

    def _show(self, engine: Engine, seq: int, is_whole: bool) -> float:
        """On the publisher's thread. Returns the seconds for which the engine's was held."""
        feed, history = self._feed, self._history
        assert self._publisher is not None and self._widget is not None
        if self._widget.comm is None:
            self._publisher.stop()
            return 0.0
        if is_whole:
            feed.forget()
            self._past_told = None
        number, selected = self._block, self._selected
        moment = gather(engine, feed, selected, number)
        live, buffers = feed.message(moment)
        if self._cursor is not None and not moment.first_step - 1 <= self._cursor < moment.step:
            self._cursor = None  # the engine went back, or the history has moved on
        if self._ops_version != engine.ops_version:
            self._kernels = None
        notice = self._notice or moment.failure or self._of_rewind(moment.step)
        cursor = self._cursor
        content = {
            "type": "frame",
            "seq": seq,
            "live": live,
            "cursor": cursor,
            "selected": selected,
            "block": self._described(number, cursor, moment),
            "notice": notice and asdict(notice),
            "explanation": self._explanation,
            "kernels": self._kernels,
            "num_answered": self._num_answered,
        }
        asked, self._asked = self._asked, None
        if asked is not None:
            content["steps"], more = feed.steps(history, *asked)
            buffers += more
        wanted = cursor, selected, moment.num_cuts  # a step that was cut off may be another now
        if cursor is not None and wanted != self._past_told:
            with contextlib.suppress(UnknownStep):
                content["past"], more = feed.past(
                    history, cursor, selected, self._text_then, self._metrics_then
                )
                buffers += more
        self._past_told = wanted
        # As a buffer, the first: the kernel walks nested lists item by item, and quotes a string anew.
        self._widget.send({"type": "frame", "seq": seq}, [json.dumps(content).encode(), *buffers])
        return moment.cost

    def _of_rewind(self, step: int) -> Notice | None:
        """Why nothing runs right after it, then which tokens came out otherwise."""
        rewound = self._rewound
        if rewound is None:
            return None
        if step == rewound.step:
            return Notice(
                f"Back after step {step}. What ran then waits, and holds no blocks: its keys and values "
                "are computed again when it runs."
            )
        if rewound.divergences:
            return Notice("\n".join(["Since the rewind:", *map(str, rewound.divergences)]))
        if not rewound.is_watching:
            self._rewound = None
        return None

    def _described(
        self, number: int | None, cursor: int | None, moment: Moment
    ) -> dict[str, Any] | None:
        """The block that the page asked about, at the moment that it looks at."""
        if number is None:
            return None
        if cursor is None:
            assert moment.block is not None and self._feed.cells is not None
            block = moment.block | {"since": self._feed.cells.since[number]}
        else:
            wanted = number, cursor, moment.num_cuts
            if self._block_then is None or self._block_then[0] != wanted:
                try:
                    state = self._history.state_at(cursor)
                except UnknownStep:
                    return None
                told = describe_block(
                    number,
                    cursor,
                    state.block_size,
                    state.running,
                    tuple(state.cached),
                    state.contents,
                )
                self._block_then = wanted, told
            block = self._block_then[1]
        decode = None if self._tokenizer is None else self._tokenizer.decode
        ids = block["token_ids"]
        texts = [decode([t], skip_special_tokens=False) for t in ids] if decode else []
        return block | {"texts": texts}

    def _text_then(self, seq: Sequence) -> str:
        """The end of a sequence's text at an earlier step."""
        last = seq.output_token_ids[-TEXT_TAIL:]
        return "" if self._tokenizer is None else self._tokenizer.decode(last)

    def _metrics_then(self, seq: Sequence) -> RequestMetrics | None:
        engine = self._engine()
        if engine is None or engine.is_closed:
            return None
        try:
            metrics = engine.metrics(seq.request.request_id)
        except (UnknownRequest, EngineClosed):
            return None
        return dataclasses.replace(
            metrics, token_times=metrics.token_times[: len(seq.output_token_ids)]
        )

    def _end(self) -> None:
        """On the publisher's thread, as its last act: the comm goes, the last picture stays."""
        self._is_closed = True
        if self._widget is not None:
            with contextlib.suppress(Exception):  # the kernel may be shutting down
                self._output.leave(self._still("closed"))
            self._widget.layout.close()  # a widget of its own, with a comm of its own
            self._widget.close()

    @property
    def is_closed(self) -> bool:
        """Also when the page, or `Widget.close_all()`, has closed the widget."""
        return self._is_closed or (self._widget is not None and self._widget.comm is None)

    def close(self) -> None:
        """End the dashboard's thread and connection; its last picture stays in the notebook. The
        engine goes on. Closing twice does nothing."""
        self._is_closed = True
        if self._publisher is not None:
            self._publisher.stop()

    # ------------------------------------------------------------------ from the page

    def receive(self, message: Any) -> None:
        """A message from the page, on whichever thread the kernel handles it. Never waits."""
        publisher = self._publisher
        if publisher is None or not isinstance(message, dict):
            return
        kind = message.get("type")
        if not isinstance(kind, str):
            return
        if kind == "ready":
            publisher.heard(None)
            return
        if kind == "drawn":
            seq = message.get("seq")
            publisher.heard(seq if isinstance(seq, int) else 0)
            return
        if kind in _LOOKS:
            _LOOKS[kind](self, message)
            publisher.wake(stale=True)
            return
        engine = self._engine()
        command = _COMMANDS.get(kind)
        if engine is None or engine.is_closed or command is None:
            return
        self._notice = None
        try:
            self._submit(engine, command(self, engine, message))
        except NbengineError as error:  # a bad field: nothing was queued
            self._answer(error)

    def _submit(self, engine: Engine, command: Callable[[], Any]) -> None:
        engine.submit(command).add_done_callback(lambda done: self._answer(done.exception()))

    def _answer(self, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, EngineClosed):
            self._notice = Notice.of(error)
        self._num_answered += 1
        if self._publisher is not None:
            self._publisher.wake(stale=True)

    def _step(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        n = message.get("n", 1)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= 1000:
            raise InvalidField("n", n, "must be an integer from 1 to 1000")
        if not engine.has_work:
            raise InvalidRequest("there is nothing to compute: add a request first")
        return lambda: self._take_steps(engine, n)

    def _take_steps(self, engine: Engine, n: int) -> None:
        """One step, and the rest as a new command: what others ask for gets its turn between."""
        if engine.has_work and not engine.is_closed:
            engine.step()
            if n > 1 and engine.stopped_at is None:
                self._submit(engine, lambda: self._take_steps(engine, n - 1))

    def _run(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        until = message.get("until")
        if until is None:
            return engine.start
        condition(until)  # a mistake shows now

        def run() -> None:
            engine.break_on(until, once=True)
            engine.start()

        return run

    def _pause(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        return engine.pause

    def _add(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        prompt = message.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidField("prompt", prompt, "type a prompt first")
        params = SamplingParams(
            max_tokens=message.get("max_tokens"), temperature=message.get("temperature", 1.0)
        )
        as_chat = message.get("chat") is True and engine.tokenizer is not None

        def add() -> str:
            if not as_chat:
                return engine.add_request(prompt, params)
            assert engine.tokenizer is not None
            turn = [{"role": "user", "content": prompt}]
            return engine.add_request(chat_prompt(engine.tokenizer, turn), params)

        return add

    def _abort(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        name = str(message.get("id"))
        return lambda: engine.abort(name)

    def _why(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        name = message.get("id")

        def explain() -> None:
            self._explanation = None if name is None else str(engine.why(str(name)))

        return explain

    def _rewind(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        step = _step_number(message.get("step"))

        def rewind() -> None:
            self._rewound = engine.rewind(step)
            self._cursor = None

        return rewind

    def _policy(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        name = message.get("name")
        if not isinstance(name, str):
            raise InvalidField("scheduling_policy", name, "must be a name")
        return lambda: engine.set_policy(name)

    def _budget(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        num_tokens = message.get("tokens")
        return lambda: engine.set_max_num_batched_tokens(num_tokens)  # type: ignore[arg-type]

    def _ask_kernels(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        if message.get("shown") is False:
            return lambda: setattr(self, "_kernels", None)
        kernels = engine.kernels  # or a notice that there are none
        wanted = message.get("step")
        if wanted is not None:
            wanted = _step_number(wanted)

        def survey() -> None:
            step = engine.scheduler.step_count if wanted is None else wanted
            self._ops_version = engine.ops_version
            self._kernels = {"step": step, "html": kernels.survey(step=step)._repr_html_()}

        return survey

    def _ask_block(self, engine: Engine, message: dict[str, Any]) -> Callable[[], Any]:
        block = message.get("block")
        if block is not None:
            if isinstance(block, bool) or not isinstance(block, int):
                raise InvalidField("block", block, "must be an integer")
            num_blocks = engine.scheduler.pool.num_blocks
            if not 0 <= block < num_blocks:
                raise InvalidField("block", block, f"there are blocks 0 to {num_blocks - 1}")

        def look() -> None:
            self._block = block

        return look

    # ------------------------------------------------------------------ what the page looks at

    def _set_cursor(self, message: dict[str, Any]) -> None:
        step = message.get("step")
        self._cursor = step if isinstance(step, int) and not isinstance(step, bool) else None

    def _select(self, message: dict[str, Any]) -> None:
        name = message.get("id")
        self._selected = name if isinstance(name, str) else None

    def _ask_steps(self, message: dict[str, Any]) -> None:
        first, last = message.get("first"), message.get("last")
        if isinstance(first, int) and isinstance(last, int):
            self._asked = first, last

    # ------------------------------------------------------------------ still forms

    def _still(self, note: str = "") -> dict[str, str]:
        """The picture in HTML and in text: as it is now, or after the last step of an engine that was
        closed."""
        engine = self._engine()
        snapshot = None
        if engine is not None and not self._is_closed:
            with contextlib.suppress(EngineClosed):
                snapshot = engine.snapshot()
        if snapshot is None:
            last = self._history[-1].step if len(self._history) else 0
            snapshot = self._history.state_at(last).snapshot(self._text_then)
        title = f"nbengine dashboard ({note})" if note else "nbengine dashboard"
        records = tuple(self._history)[-10:]
        text = f"{title}\n{snapshot_text(snapshot)}\n{steps_text(records)}"
        html = f"<b>{title}</b>{snapshot_html(snapshot)}{steps_html(records)}"
        return {"text/plain": text, "text/html": html}

    def __repr__(self) -> str:
        still = self._still("closed" if self._is_closed else "")["text/plain"]
        return still if self._widget is not None else f"{still}\n{INSTALL_HINT}"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget, and beside it the picture for readers without a kernel."""
        bundle: dict[str, Any] = dict(self._still("closed" if self._is_closed else ""))
        if self._widget is None:
            bundle["text/html"] += f"<div>{INSTALL_HINT}</div>"
        elif not self._is_closed:
            bundle["application/vnd.jupyter.widget-view+json"] = {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self._widget.model_id,
            }
        return bundle

    def _ipython_display_(self) -> None:
        is_live = self._widget is not None and not self._is_closed
        self._output.show(self._repr_mimebundle_(), is_live=is_live)


_COMMANDS: dict[str, Callable[[Dashboard, Engine, dict[str, Any]], Callable[[], Any]]] = {
    "step": Dashboard._step,
    "run": Dashboard._run,
    "pause": Dashboard._pause,
    "add": Dashboard._add,
    "abort": Dashboard._abort,
    "why": Dashboard._why,
    "rewind": Dashboard._rewind,
    "policy": Dashboard._policy,
    "budget": Dashboard._budget,
    "block": Dashboard._ask_block,
    "kernels": Dashboard._ask_kernels,
}
_LOOKS: dict[str, Callable[[Dashboard, dict[str, Any]], None]] = {
    "cursor": Dashboard._set_cursor,
    "select": Dashboard._select,
    "steps": Dashboard._ask_steps,
}
"""What asks nothing of the engine."""


def _step_number(step: object) -> int:
    if isinstance(step, bool) or not isinstance(step, int):
        raise InvalidField("step", step, "must be an integer")
    return step


def _make_widget() -> Any:
    """A widget, or None without the notebook extras."""
    try:
        from nbengine.jupyter.widget import DashboardWidget
    except ImportError:
        return None
    return DashboardWidget()
