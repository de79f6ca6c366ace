"""The set-up's decisions: which Python, which torch, what a failure of pip means."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "installed_version", lambda python, package: "")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    return module


class Steps:
    """Records what pip is asked for; only the first `failures` attempts fail."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.asked: list[tuple[str, ...]] = []

    def begin(self, what: str) -> None: ...

    def note(self, what: str) -> None: ...

    def try_pip(self, python: Path, *arguments: str) -> bool:
        self.asked.append(arguments)
        return len(self.asked) > self.failures

    def pip(self, python: Path, *arguments: str) -> None:
        self.asked.append(arguments)


PYTHON = Path("python")


def test_without_a_gpu_the_cpu_build_is_taken_from_the_configured_index(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    steps = Steps()
    bootstrap.install_torch(PYTHON, steps)
    assert steps.asked == [("--no-deps", f"torch=={bootstrap.pinned('torch')}+cpu")]


def test_without_a_gpu_the_default_build_comes_only_after_pytorchs_own_cpu_index(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    steps = Steps(failures=2)
    bootstrap.install_torch(PYTHON, steps)
    _, from_pytorch, default = steps.asked
    assert bootstrap.PYTORCH_CPU_INDEX in from_pytorch
    assert from_pytorch[-1].endswith("+cpu")
    assert default == ("torch",)


def test_with_a_gpu_the_default_build_is_taken_at_once(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    steps = Steps()
    bootstrap.install_torch(PYTHON, steps)
    assert steps.asked == [("torch",)]


def test_a_torch_of_the_pinned_version_is_kept_whatever_its_build(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = bootstrap.pinned("torch")
    monkeypatch.setattr(bootstrap, "installed_version", lambda python, package: f"{version}+cu130")
    steps = Steps()
    bootstrap.install_torch(PYTHON, steps)
    assert steps.asked == []


def test_stamp_covers_what_was_installed_until_an_input_changes(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert not bootstrap.Stamp(tmp_path).covers(set())
    bootstrap.Stamp(tmp_path).write({"test"})
    assert bootstrap.Stamp(tmp_path).covers({"test"})
    assert not bootstrap.Stamp(tmp_path).covers({"test", "notebook"})
    changed = tmp_path / "constraints.txt"
    changed.write_text("torch==0\n")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", changed)
    stamp = bootstrap.Stamp(tmp_path)
    assert not stamp.covers({"test"})
    assert stamp.extras == {"test"}  # so that they are installed again


def test_a_python_without_venv_is_passed_over_and_named_when_there_is_no_other(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = {"python3.13": (3, 13, 1), "python3.11": (3, 11, 2)}
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(bootstrap, "version_of", lambda python: there.get(str(python), (3, 8, 1)))
    monkeypatch.setattr(bootstrap, "runs", lambda python, code: str(python) == "python3.11")
    assert str(bootstrap.suitable_python()) == "python3.11"
    monkeypatch.setattr(bootstrap, "runs", lambda python, code: False)
    with pytest.raises(SystemExit):
        bootstrap.suitable_python()
    assert "apt install python3-venv" in capsys.readouterr().err


def test_a_machine_with_old_pythons_only_is_told_which_are_needed(
    bootstrap: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bootstrap, "version_of", lambda python: (3, 9, 2))
    with pytest.raises(SystemExit):
        bootstrap.suitable_python()
    told = capsys.readouterr().err
    assert "needs Python 3.11 to 3.14; this machine has 3.9.2" in told


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("NewConnectionError: [Errno -2] Name or service not known", "can't be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("error: command 'g++' failed: No such file or directory", "apt install g++"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no version of a package"),
    ],
)
def test_a_failure_of_pip_is_explained(bootstrap: ModuleType, output: str, told: str) -> None:
    assert told in bootstrap.explanation(output)


def test_everything_that_the_project_requires_is_pinned(bootstrap: ModuleType) -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    extras = ("notebook", "test", "cuda")
    for text in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        requirement = Requirement(text)
        if requirement.name == "nbengine":  # an extra that contains another
            assert requirement.extras <= {*extras}
            continue
        assert requirement.specifier.contains(bootstrap.pinned(requirement.name))
