"""`LiveOutput`: the places where a live view is shown, so that a still picture can take its place.

Of the dashboard and the kernel view. A saved notebook holds what its outputs were last, and JupyterLab
prefers a widget whose model went with its kernel ("Error displaying widget: model not found") to the
picture beside it. So a view that ends leaves its picture; and each ends at the latest with the
kernel, when that is shut down or restarted in good order.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Callable, Mapping
from typing import Any


class LiveOutput:
    """Every output that shows one view."""

    def __init__(self, end: Callable[[], None]) -> None:
        """`end` has the view `leave`; called when the kernel ends, while messages still go out."""
        self._end = end
        self._handles: list[Any] = []

    def show(self, bundle: Mapping[str, Any], *, is_live: bool) -> None:
        """In the cell that runs now."""
        from IPython.core.getipython import get_ipython
        from IPython.display import display

        handle = display(dict(bundle), raw=True, display_id=True)
        in_notebook = getattr(get_ipython(), "kernel", None) is not None  # else no output changes
        if handle is not None and is_live and in_notebook:
            if not self._handles:
                atexit.register(self._end)
            self._handles.append(handle)

    def leave(self, still: Mapping[str, str]) -> None:
        """Put this in all places, once."""
        atexit.unregister(self._end)
        handles, self._handles = self._handles, []
        with contextlib.suppress(Exception):  # nobody may be there to send to any more
            for handle in handles:
                handle.update(dict(still), raw=True)
