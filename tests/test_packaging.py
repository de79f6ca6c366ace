"""What is published is what is tested: the sdist builds by itself, the wheel holds everything, and
a program that has the wheel alone can generate text.

The new environment borrows the heavy dependencies from the one that runs the tests, through a
`.pth` file: Python does not follow the `.pth` files that lie in a borrowed folder, so that an
editable nbengine there stays out of reach. `make wheel-check` does it with nothing borrowed.
"""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(kind: str, source: Path, directory: Path) -> Path:
    """Build `kind` ("sdist" or "wheel") of the tree at `source`, as any PEP 517 front end would."""
    code = f"import hatchling.build as b, sys; print(b.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(directory)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return directory / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    directory = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", ROOT, directory)
    shutil.unpack_archive(archive, directory)
    (tree,) = (path for path in directory.iterdir() if path.is_dir())
    return tree


@pytest.fixture(scope="module")
def wheel(sdist_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist alone."""
    return build("wheel", sdist_tree, tmp_path_factory.mktemp("wheel"))


def files_below(folder: Path) -> set[str]:
    """Source files below `folder`, relative to it."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def packaged_files(wheel: Path) -> set[str]:
    """Files of the package in a wheel, relative to the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {name.removeprefix("nbengine/") for name in names if name.startswith("nbengine/")}


def test_wheel_from_the_sdist_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = files_below(ROOT / "nbengine")
    expected |= {f"cuda/{name}" for name in files_below(ROOT / "cuda")}
    assert packaged_files(wheel) == expected
    assert "py.typed" in expected


def test_wheel_carries_the_license_and_only_minimum_versions(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata_name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        info = metadata_name.rpartition("/")[0]
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = email.message_from_bytes(archive.read(metadata_name))
        top_level = {name.partition("/")[0] for name in archive.namelist()}
    assert top_level == {"nbengine", info}
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert required
    assert not [r for r in required if "==" in r]


def test_cuda_sources_travel_inside_the_wheel(sdist_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(sdist_tree, tree)
    (tree / "cuda" / "include").mkdir(parents=True, exist_ok=True)
    (tree / "cuda" / "probe.cu").write_text('#include "probe.cuh"\n')
    (tree / "cuda" / "include" / "probe.cuh").write_text("#pragma once\n")
    directory = tmp_path / "dist"
    directory.mkdir()
    assert packaged_files(build("wheel", tree, directory)) >= {
        "cuda/probe.cu",
        "cuda/include/probe.cuh",
    }


GENERATE = """
import sys
import nbengine
assert "torch" not in sys.modules
from nbengine import LLM, SamplingParams
with LLM("smollm2-135m", max_model_len=256) as llm:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
print(nbengine.__file__)
print(output.outputs[0].text)
"""


def test_wheel_alone_in_a_new_environment_generates_text(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # A pure wheel is installed by unpacking it.
        archive.extractall(site)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ran = subprocess.run(
        [str(python), "-I", "-c", GENERATE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    *_, imported_from, text = ran.stdout.strip().splitlines()
    assert Path(imported_from) == site / "nbengine" / "__init__.py"
    assert "Paris" in text
