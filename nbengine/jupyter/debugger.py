"""`breakpoint()` inside a policy, a breakpoint's condition or a listener: a prompt in the cell.

These run on the engine's thread, while the cell that takes the step waits. ipykernel hands
`breakpoint()` to JupyterLab's debugger, which does nothing while nobody has opened it; so on an
engine's thread IPython's own debugger is opened instead, whose prompt shows in that cell.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from nbengine.engine_thread import is_awaited

_log = logging.getLogger("nbengine")


def install() -> None:
    """Have `breakpoint()` do that on engines' threads, and what it did before on all others."""
    if getattr(sys.breakpointhook, "is_nbengines", False):
        return
    before = sys.breakpointhook

    def hook(*args: Any, **kwargs: Any) -> Any:
        awaited = is_awaited()
        if awaited is None or _is_debugger_open():
            return before(*args, **kwargs)
        _print_in_the_latest_cell()
        if not awaited:
            _log.warning(
                "breakpoint() was passed over: no cell waits for this step. Pause the engine, and "
                "take it with engine.step() or engine.run()"
            )
            return None
        from IPython.core.debugger import Pdb

        return Pdb().set_trace(sys._getframe(1))

    hook.is_nbengines = True  # type: ignore[attr-defined]
    sys.breakpointhook = hook


def _print_in_the_latest_cell() -> None:
    """ipykernel 6 prints what a thread says in the cell that started it, which is not the one that
    shows the prompt; ipykernel 7 prints in the latest."""
    ipykernel = sys.modules.get("ipykernel")
    if ipykernel is None or ipykernel.version_info[0] >= 7:
        return
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "set_parent") and hasattr(shell, "parent_header"):
            stream.set_parent(shell.parent_header)


def _is_debugger_open() -> bool:
    """Whether JupyterLab's debugger, or an editor's, is attached."""
    debugpy = sys.modules.get("debugpy")
    return debugpy is not None and bool(debugpy.is_client_connected())
