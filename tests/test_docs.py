"""What README and docs say is true: their links lead somewhere, and README's example runs."""

from __future__ import annotations

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
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not target(page, link).exists()] == []


def test_readme_begins_with_the_two_commands() -> None:
    first_block = (ROOT / "README.md").read_text().split("```")[1]
    assert re.findall(r"^\$ (.*?)\s+#", first_block, re.MULTILINE) == ["make demo", "make test"]


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    ran = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout
    assert "req-1: running" in ran.stdout


def test_every_setting_has_a_meaning_in_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import conf

    documented = [field.strip("`") for field, *_ in conf.settings()]
    from nbengine import EngineConfig

    assert documented == list(EngineConfig.__dataclass_fields__)
    assert all(meaning for _, meaning in conf.magics())
