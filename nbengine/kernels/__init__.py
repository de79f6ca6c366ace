"""CUDA C kernels: compiled at run time, launched on torch tensors, checked, measured and swapped.

Usable without the engine:

    import nbengine.kernels as kernels

    scale = kernels.load("my.cu", "scale<float>")
    scale[grid, block](x, y, n)

`op.py` says what an op is and `ops/` holds one file for each; their CUDA C lies in `cuda/`. A
`Program` is one source on one backend: compiled by NVRTC for a GPU (`compiler.py`, `launcher.py`) or
as C++ for this machine's CPU (`emulator/`). Nothing here knows of requests, schedulers or models.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from nbengine.kernels.diagnostics import CompileError, Diagnostic
from nbengine.kernels.program import Kernel, LaunchError, Program, kernel_device
from nbengine.kernels.source import Source, is_text

__all__ = [
    "CompileError",
    "Diagnostic",
    "Kernel",
    "LaunchError",
    "Program",
    "Source",
    "load",
    "program",
]


def load(
    source: str | Path | Source,
    expression: str,
    *,
    device: torch.device | str | None = None,
    debug: bool = False,
) -> Kernel:
    """A kernel of a `.cu` file, or of CUDA C text, ready to be launched on torch tensors.

    Args:
        source: a path, or the text itself (anything of more than one line, or with a brace).
        expression: the kernel's name with its template arguments, as C++ spells them:
            `scale<float>`, `rms_norm<__nv_bfloat16, 576, 96, true>`.
        device: where the tensors are; default: the current GPU, or the CPU where there is none. On
            the CPU the kernel is emulated, with the checks for races, wild accesses and missing
            barriers.
        debug: on a GPU, wait after each launch, so that an error surfaces where it was caused.

    Raises:
        CompileError: with the lines that the compiler refuses.
        FileNotFoundError: there is no such file.
        InvalidField: kernels can't run on this device, or it is not there.
    """
    return program(source, device=device, debug=debug).kernel(expression)


def program(
    source: str | Path | Source,
    *,
    device: torch.device | str | None = None,
    debug: bool = False,
) -> Program:
    """The source on a device, for more than one of its kernels; see `load`."""
    if not isinstance(source, Source):
        source = Source(str(source), "kernel.cu") if is_text(source) else Source.read(source)
    device = kernel_device(device)
    # Each backend is imported when it is used: a laptop has no CUDA, a server no C++ compiler.
    found: Program
    if device.type == "cuda":
        launcher = importlib.import_module("nbengine.kernels.launcher")
        found = launcher.CudaProgram(source, device, debug=debug)
    else:
        emulator = importlib.import_module("nbengine.kernels.emulator")
        found = emulator.EmulatedProgram(source, checks=True)
    return found
