"""A real JupyterLab with its own folder and settings, and a notebook in it, driven through a
headless Chromium. For the browser tests and for `scripts/screenshot_dashboard.py`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import nbformat

REPOSITORY = Path(__file__).parents[2]
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """The system's Chromium (or Chrome); `CHROMIUM` names another."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


class Lab:
    """A running JupyterLab server with its own folder and settings."""

    def __init__(self, folder: Path, theme: str = "JupyterLab Light") -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
        (settings / "notification.jupyterlab-settings").write_text(
            json.dumps({"fetchNews": "false", "checkForUpdates": False})
        )
        self.notebooks = folder / "notebooks"
        self.notebooks.mkdir()
        environment = os.environ | {
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        }
        self.log = (folder / "lab.log").open("w")
        # port_retries=0: on a taken port it must fail, not move and leave us someone else's server.
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
                f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0",
                "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=",
                "--LabApp.expose_app_in_browser=True",
                f"--ServerApp.root_dir={self.notebooks}", "--LabApp.news_url=",
            ],
            env=environment, stdout=self.log, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, (self.folder / "lab.log").read_text()
            try:
                urllib.request.urlopen(f"{self.url}/api", timeout=2).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "JupyterLab did not come up"
                time.sleep(0.1)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


class NotebookPage:
    """A notebook open in JupyterLab, in a page of the browser."""

    def __init__(self, lab: Lab, page: Any, sources: list[str], name: str = "test.ipynb") -> None:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, lab.notebooks / name)
        self.page = page
        page.goto(f"{lab.url}/lab/tree/{name}?reset")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        """A cell that is run before the kernel is connected is run nowhere."""
        self.page.wait_for_function(
            """() => {
              const panel = window.jupyterapp?.shell.currentWidget;
              return panel?.sessionContext?.isReady &&
                panel.sessionContext.session?.kernel?.connectionStatus === "connected" &&
                panel.sessionContext.session.kernel.status === "idle" &&
                panel.content.widgets.length > 0;
            }""",
            timeout=60_000,
        )

    def run_all(self) -> None:
        """Run every cell, and wait until they have run."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def run(self, index: int) -> None:
        """Run one cell, and wait until it has run."""
        self._run(index, "await")

    def start_running(self, index: int) -> None:
        """Begin to run one cell."""
        self._run(index, "void")

    def _run(self, index: int, how: str) -> None:
        self.page.evaluate(
            f"""async (index) => {{
              window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
              {how} window.jupyterapp.commands.execute("notebook:run-cell");
            }}""",
            index,
        )

    def evaluate(self, expression: str) -> str:
        """The repr of an expression in the kernel, without a cell."""
        return self.page.evaluate(
            """async (expression) => {
              const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
              const future = kernel.requestExecute({
                code: "", silent: true, store_history: false, user_expressions: { it: expression },
              });
              const reply = await future.done;
              return reply.content.user_expressions.it.data["text/plain"];
            }""",
            expression,
        )

    def interrupt(self) -> None:
        """The stop button."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
        self.wait_for_kernel()

    def save_and_reload(self) -> None:
        """Save the notebook, and load the page anew; the kernel goes on."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        self.page.reload()
        self.wait_for_kernel()

    @property
    def has_subshells(self) -> bool:
        """Whether the kernel can handle messages while a cell runs (ipykernel 7)."""
        return self.page.evaluate(
            "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.supportsSubshells"
        )

    def execution_count(self, index: int) -> str:
        """`[3]:`, or `[*]:` while it runs."""
        cell = self.page.locator(".jp-Notebook-cell").nth(index)
        return cell.locator(".jp-InputPrompt").inner_text()
