"""The core runs anywhere: it imports nothing heavy."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import nbengine.core


def test_the_core_imports_neither_torch_nor_numpy_nor_notebooks():
    modules = [f"nbengine.core.{m.name}" for m in pkgutil.iter_modules(nbengine.core.__path__)]
    assert "nbengine.core.scheduler" in modules
    code = (
        f"import sys, {', '.join(modules)}\n"
        "heavy = {'torch', 'numpy', 'IPython', 'ipywidgets', 'cuda', 'transformers'}\n"
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
