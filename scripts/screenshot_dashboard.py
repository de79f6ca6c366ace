"""Take the picture of the dashboard that the README shows: a real model in a real JupyterLab.

    python scripts/screenshot_dashboard.py [--theme dark] [--out docs/images/dashboard.png]

Needs the extras `notebook` and `test`, the model, and the system's Chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.browser.lab import CHROMIUM_ARGUMENTS, Lab, NotebookPage, find_chromium  # noqa: E402

SOURCES = [
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
SHOW = 2
MIN_STEPS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "docs" / "images" / "dashboard.png"
    )
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium here: install Debian's package chromium, or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        lab = Lab(Path(folder), theme=f"JupyterLab {arguments.theme.title()}")
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
            page = browser.new_page(
                viewport={"width": 1180, "height": 1400}, device_scale_factor=1.25
            )
            page.set_default_timeout(600_000)
            notebook = NotebookPage(lab, page, SOURCES, name="dashboard.ipynb")
            page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
            notebook.run_all()
            dashboard = page.locator(".nbe")
            dashboard.get_by_role("button", name="Run", exact=True).click()
            # A moment with something of everything: one was preempted just now, some wait.
            page.wait_for_function(
                f"() => +document.querySelector('.nbe').dataset.step > {MIN_STEPS} &&"
                " [...document.querySelectorAll('.nbe-log tbody tr')].slice(2, 9)"
                ".some((row) => row.innerText.includes('preempted'))"
            )
            dashboard.get_by_role("button", name="Why req-", exact=False).last.click()
            page.wait_for_selector(".nbe-why:not([hidden])")
            page.locator(".jp-Notebook-cell").nth(SHOW).screenshot(path=arguments.out)
        finally:
            lab.close()
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
