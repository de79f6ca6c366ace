"""Each notebook is a lesson that runs: it ships with the outputs of a whole run from the top, and
runs again without an error, in a new kernel, against this tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
SECONDS_FOR_A_NOTEBOOK = 120

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook: nbformat.NotebookNode) -> list[str]:
    """The error outputs, except those of cells that a notebook tags as raising on purpose."""
    return [
        f"{output.ename}: {output.evalue}"
        for cell in code_cells(notebook)
        if "raises-exception" not in cell.metadata.get("tags", [])
        for output in cell.outputs
        if output.output_type == "error"
    ]


@each_notebook
def test_notebook_begins_with_its_title(path: Path) -> None:
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")


@each_notebook
def test_notebook_ships_with_the_outputs_of_one_run_from_the_top(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []


@each_notebook
def test_it_names_no_folder_of_the_machine_that_ran_it(path: Path) -> None:
    assert re.findall(r"/(?:home|root|tmp|work|mnt|Users)/[\w.-]+", path.read_text()) == []


@each_notebook
def test_opening_it_in_jupyterlab_is_no_change(path: Path) -> None:
    """JupyterLab writes the kernel's own words into a notebook, and marks it as modified where they
    differ. (The version of Python is the reader's, and may.)"""
    kernelspec = pytest.importorskip("jupyter_client.kernelspec")
    ipkernel = pytest.importorskip("ipykernel.ipkernel")
    metadata = nbformat.read(path, as_version=4).metadata
    assert metadata.keys() == {"kernelspec", "language_info"}
    spec = kernelspec.get_kernel_spec(metadata.kernelspec.name)
    assert metadata.kernelspec.display_name == spec.display_name
    assert metadata.kernelspec.language == spec.language
    language = ipkernel.IPythonKernel.language_info | {"version": metadata.language_info.version}
    assert metadata.language_info == language


@each_notebook
def test_links_and_pictures_of_the_text_lead_to_files_of_the_project(path: Path) -> None:
    text = "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    )
    without_code = re.sub(r"`[^`]*`", "", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", without_code) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_lab_serves_the_project_with_the_notebooks_open() -> None:
    """With notebooks/ as the server's root, pictures and links that leave it would be dead."""
    planned = subprocess.run(
        ["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (arguments,) = re.findall(r"-m jupyterlab(.*)", planned)
    assert [a for a in arguments.split() if not a.startswith("--")] == [], "the root is ROOT"
    (opened,) = re.findall(r"default_url=/lab/tree/(\S+)", arguments)
    assert (ROOT / opened / NOTEBOOKS[0].name).exists()


@each_notebook
def test_no_output_is_lost_where_the_notebook_is_not_trusted(path: Path) -> None:
    """Which is everywhere but on the machine that ran it: JupyterLab strips these from its HTML."""
    stripped = ("<svg", "<script", "<style", "<iframe")
    pages = [
        output.data["text/html"]
        for cell in code_cells(nbformat.read(path, as_version=4))
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert [tag for html in pages for tag in stripped if tag in html] == []


@each_notebook
@pytest.mark.timeout(SECONDS_FOR_A_NOTEBOOK)
def test_notebook_runs_from_top_to_bottom(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS_FOR_A_NOTEBOOK,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert errors(notebook) == []
