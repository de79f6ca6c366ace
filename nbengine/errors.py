"""Every exception that nbengine raises on purpose.

Each message says what was wrong, with the numbers, and what to do. A caller who wants to catch
everything catches `NbengineError`; the built-in bases (`ValueError`, `MemoryError`, ...) are there
so that code which knows nothing of nbengine does the right thing too.
"""

from __future__ import annotations

from typing import Any


class NbengineError(Exception):
    """The base of all errors below. They can be pickled, whatever their constructors take: for
    process pools."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[NbengineError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def shown(value: object) -> str:
    """The value as a message shows it: its repr, cut to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits has no repr
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."


class InvalidField(NbengineError, ValueError):
    """A field of a request or of the configuration has a value that is out of range or of the
    wrong type. `field` and `value` say which."""

    def __init__(self, field: str, value: object, problem: str) -> None:
        self.field, self.value, self.problem = field, value, problem
        super().__init__(f"{field}={shown(value)}: {problem}")


class InvalidRequest(NbengineError, ValueError):
    """A request that no engine with this model could serve: empty prompt, ids beyond the
    vocabulary, a prompt as long as the model's context."""


class RequestTooLarge(InvalidRequest):
    """A request that this engine can never serve: it needs more blocks or seats than there are in
    all. `needed` and `available` are in the unit that the message names."""

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


class UnknownRequest(NbengineError, KeyError):
    """No request or sequence of this name is known (any more)."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0])


class UnknownStep(NbengineError, LookupError):
    """A step that has not been taken, or that the history no longer (or never) holds."""


class TraceError(NbengineError, ValueError):
    """A file is no trace, or a line of it is not what it should be: the message says which, and
    why."""


class CacheBusy(NbengineError, RuntimeError):
    """The prefix cache can't be reset while sequences hold blocks."""


class ModelNotFound(NbengineError, FileNotFoundError):
    """The model is no directory, no file, no known name, and can't be fetched."""


class UnsupportedModel(NbengineError, ValueError):
    """The architecture, or a feature of it, is one that nbengine does not run."""


class WeightsError(NbengineError, ValueError):
    """A weights file is truncated, unreadable, or does not fit the model's config."""


class NotEnoughMemory(NbengineError, MemoryError):
    """The model or its KV cache does not fit; the message holds the sizes and suggestions."""


class SamplingError(NbengineError, ArithmeticError):
    """No token can be drawn from a row of logits: it holds NaN or infinity, or every token of it
    is masked."""


class EngineClosed(NbengineError, RuntimeError):
    """The engine was closed, and its memory given back; or it lives in another process."""


class DeviceLost(EngineClosed):
    """The GPU's context was destroyed by a kernel's error: no engine or tensor of this process can
    use that GPU again. The error itself is the cause of this one."""


class EngineBusy(NbengineError, RuntimeError):
    """The engine was called from inside one of its own steps (by a policy), or asked on its own
    thread to wait for steps that only this thread can take."""
