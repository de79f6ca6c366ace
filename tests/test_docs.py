"""What README and docs say is true: their links lead somewhere, and README's example runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)")
# The site's lessons are copies of notebooks/, its tables are written at every build.
WRITTEN_BY_THE_BUILD = {"lessons": ROOT / "notebooks"}


def target(page: Path, link: str) -> Path:
    folder, _, name = link.partition("/")
    if page.parent.name == "docs" and folder in WRITTEN_BY_THE_BUILD:
        return WRITTEN_BY_THE_BUILD[folder] / name
    return page.parent / link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not target(page, link).exists()] == []


def test_the_page_on_kernels_lists_every_op_with_its_file() -> None:
    from nbengine.kernels.ops import OPS

    table = (ROOT / "docs" / "kernels.md").read_text().partition("Larger matrix products")[0]
    missing = [
        op.name for op in OPS.values() if not re.search(rf"`{op.name}`.*`{op.source}`", table)
    ]
    assert missing == []


def test_readme_begins_with_the_two_commands() -> None:
    first_block = (ROOT / "README.md").read_text().split("```")[1]
    assert re.findall(r"^\$ (.*?)\s+#", first_block, re.MULTILINE) == ["make demo", "make test"]


def run(example: str, folder: Path) -> str:
    """What `example` prints, in a Python of its own."""
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def python_of(page: Path) -> str:
    """All the Python of a page, one block after the other."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def test_the_example_of_the_readme_runs() -> None:
    printed = run(python_of(ROOT / "README.md"), ROOT)
    assert "Paris" in printed
    assert "req-1: running" in printed


def test_the_examples_of_the_quick_start_run(tmp_path: Path) -> None:
    assert "running, 5 of 6 tokens computed" in run(
        python_of(ROOT / "docs" / "quickstart.md"), tmp_path
    )


def test_the_examples_of_time_travel_run(tmp_path: Path) -> None:
    printed = run(python_of(ROOT / "docs" / "time_travel.md"), tmp_path)
    assert "steps of sjf over 150 blocks of 16, until all requests had finished" in printed
    assert "steps waited: mean" in printed
    assert json.loads((tmp_path / "run.json").read_text())["traceEvents"]


def test_every_setting_has_a_meaning_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import conf

    documented = [field.strip("`") for field, *_ in conf.settings()]
    from nbengine import EngineConfig

    assert documented == list(EngineConfig.__dataclass_fields__)
    assert all(meaning for _, meaning in conf.magics())


def test_the_speeds_in_the_readme_are_those_that_were_measured() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu_decode.json").read_text())
    rows = dict(re.findall(r"^\| ([\w. ]+?) +\|(.+)\|$", (ROOT / "README.md").read_text(), re.M))
    for engine, speeds in results["tokens_per_second"].items():
        shown = [float(cell) for cell in rows[engine].split("|") if cell.strip()]
        assert shown == [speed["median"] for speed in speeds.values()]


def test_the_figures_of_kernels_in_the_readme_are_those_that_were_measured() -> None:
    path = ROOT / "benchmarks" / "results" / "gpu_check_nvidia_h100_80gb_hbm3.json"
    result, readme = json.loads(path.read_text()), (ROOT / "README.md").read_text()
    products = {row["case"]: row["of_read_bandwidth"] for row in result["bench"]}
    cases = (f"bfloat16-{bits}1x37888x3584" for bits in ("", "8bit-", "4bit-"))
    (sentence,) = re.findall(r"^The product of a token's 3,584 values .*?\n\n", readme, re.M | re.S)
    shown = [float(figure) for figure in re.findall(r"\d\.\d+", sentence)]
    assert shown == [round(products[case], 2) for case in cases]

    measured = [bar["figure"] for bar in result["bars"]]
    cells = re.findall(r"^\| (?:decode|prefill), .*\| +([\d.]+)", readme, re.M)
    assert [float(cell) for cell in cells] == [
        *(round(f, 2) for f in measured[:-1]),
        round(measured[-1]),
    ]
