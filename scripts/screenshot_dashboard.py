"""Take the pictures that the README shows, of a real model in a real JupyterLab.

    python scripts/screenshot_dashboard.py [--theme dark] [--only dashboard|kernel_bench]

They go to docs/images/. Needs the extras `notebook`, `cuda` and `test`, the model, and the system's
Chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.browser.lab import CHROMIUM_ARGUMENTS, Lab, NotebookPage, find_chromium  # noqa: E402

DASHBOARD = [
    """\
%load_ext nbengine
%nb_load smollm2-135m --quantization int4 --num-gpu-blocks-override 40 --max-num-seqs 5 --max-num-batched-tokens 64""",
    """\
%%nb_add --each-line --chat --max-tokens 110 --temperature 0.6 --seed 7
Why is the sky blue?
Write a short story about a lighthouse keeper and a lost whale.
What is a paged KV cache, in one paragraph?
Explain how bread rises.
Name three uses of olive oil, and say why each works.
What would you pack for a week in the mountains?
Tell me something surprising about octopuses.
How does a bicycle stay upright?""",
    "%nb_dashboard",
]
KERNEL_BENCH = ["%load_ext nbengine", "%nb_watch paged_attention_decode"]
MIN_STEPS = 90


def dashboard(page: Any, notebook: NotebookPage, out: Path) -> None:
    notebook.run_all()
    root = page.locator(".nbe")
    root.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function(f"() => +document.querySelector('.nbe')?.dataset.step > {MIN_STEPS}")
    root.get_by_role("combobox", name="Run until").select_option("preemption")
    page.wait_for_selector(".nbe[data-running=false]")
    root.locator(".nbe-name").nth(2).click()
    page.wait_for_selector("tr.nbe-selected")
    page.mouse.move(2, 2)
    page.wait_for_timeout(600)
    page.locator(".jp-Notebook-cell").nth(2).screenshot(path=out)


def kernel_bench(page: Any, notebook: NotebookPage, out: Path) -> None:
    for index in range(len(KERNEL_BENCH)):
        notebook.run(index)
    page.locator(".nbk").wait_for()
    page.wait_for_timeout(1000)
    page.locator(".jp-Notebook-cell").last.screenshot(path=out)


PICTURES = {"dashboard": (DASHBOARD, dashboard), "kernel_bench": (KERNEL_BENCH, kernel_bench)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--only", choices=PICTURES)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "docs" / "images")
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium here: install Debian's package chromium, or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lab = Lab(Path(folder), theme=f"JupyterLab {arguments.theme.title()}")
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
            for name, (sources, take) in PICTURES.items():
                if arguments.only not in (None, name):
                    continue
                page = browser.new_page(
                    viewport={"width": 1180, "height": 1800}, device_scale_factor=1.25
                )
                page.set_default_timeout(60_000)
                notebook = NotebookPage(lab, page, sources, name=f"{name}.ipynb")
                page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
                out = arguments.folder / f"{name}.png"
                take(page, notebook, out)
                print(f"{out}: {out.stat().st_size / 1024:.0f} KiB")
                page.close()
        finally:
            lab.close()


if __name__ == "__main__":
    main()
