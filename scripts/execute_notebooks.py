"""Execute the notebooks and save them with their outputs: `python scripts/execute_notebooks.py`.

What is saved is one whole run from the top, in a new kernel, against this checkout. So that a
second run changes little, only what a reader sees is kept: no times of execution, no state of
widgets (their HTML form is what a page without a kernel shows), and an output that differs from
the saved one in nothing but decimal numbers (times, speeds, free memory) stays as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import nbclient
import nbformat
from jupyter_client.kernelspec import get_kernel_spec
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SECONDS_FOR_A_NOTEBOOK = 120

KERNEL = "python3"
WIDGET = "application/vnd.jupyter.widget-view+json"
DECIMALS = re.compile(r"\d[\d,]*\.\d+(?:e[-+]\d+)?|(?<= ) +")
"""And the spaces that line them up."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    arguments.add_argument("names", nargs="*", help="files in notebooks/ (default: all)")
    arguments.add_argument("--all-outputs", action="store_true", help="keep none of the old ones")
    options = arguments.parse_args()
    paths = [FOLDER / Path(name).name for name in options.names] or sorted(
        FOLDER.glob("[0-9]*.ipynb")
    )
    for path in paths:
        began = time.monotonic()
        saved = nbformat.read(path, as_version=4)
        print(f"{path.relative_to(ROOT)} ... ", end="", flush=True)
        try:
            notebook = executed(saved)
        except nbclient.exceptions.CellExecutionError as error:
            print(f"failed\n{error}", file=sys.stderr)
            return 1
        tidy(notebook, None if options.all_outputs else saved)
        nbformat.write(notebook, path)
        print(f"{time.monotonic() - began:.0f} s")
    return 0


def executed(saved: NotebookNode) -> NotebookNode:
    """A copy with the outputs of a run from the top."""
    notebook = nbformat.from_dict({**saved, "cells": [dict(cell) for cell in saved.cells]})
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_FOR_A_NOTEBOOK,
        kernel_name=KERNEL,
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client.execute(env={**os.environ, "PYTHONPATH": path})
    return notebook


def tidy(notebook: NotebookNode, saved: NotebookNode | None) -> None:
    """Bring the notebook into its saved form, in place."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernelspec(), "language_info": notebook.metadata.language_info}
    )
    olds = {cell.id: cell for cell in saved.cells if cell.cell_type == "code"} if saved else {}
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        cell.outputs = joined(relocated(cell.outputs))
        # What a progress line leaves behind where it can't be taken away.
        cell.outputs = [output for output in cell.outputs if output.get("data") != {}]
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET, None)
            output.pop("transient", None)
        old = olds.get(cell.id)
        if old is not None and gist(old) == gist(cell):
            cell.outputs = old.outputs


def kernelspec() -> dict[str, str]:
    """As JupyterLab writes it. It compares this and the language, version included, with the kernel
    that it starts, and marks a notebook as modified at once if they differ."""
    spec = get_kernel_spec(KERNEL)
    return {"display_name": spec.display_name, "language": spec.language, "name": KERNEL}


def relocated(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with the checkout's own files (in a traceback) named as they are in the project."""
    text = json.dumps(outputs).replace(f"{ROOT}{os.sep}", "")
    return [nbformat.from_dict(output) for output in json.loads(text)]


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, with the pieces of one stream put together: where it was cut is chance."""
    result: list[NotebookNode] = []
    for output in outputs:
        last = result[-1] if result else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            result.append(output)
    return result


def gist(cell: NotebookNode) -> str:
    """A cell and its outputs without decimal numbers."""
    return DECIMALS.sub("", nbformat.v4.writes_json(notebook_of(cell)))


def notebook_of(cell: NotebookNode) -> NotebookNode:
    return nbformat.v4.new_notebook(cells=[cell])


if __name__ == "__main__":
    sys.exit(main())
