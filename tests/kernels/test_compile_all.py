"""Every specialisation that an op's grid asks for compiles for every architecture, without a
warning or a spill, and can be launched as the op launches it. It needs NVRTC and no GPU.

The specialisations are not listed here: each op is launched on its own cases with a program that
writes down what it is asked for.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from nbengine.kernels import Kernel, Program, Source, compiler
from nbengine.kernels.ops import OPS
from nbengine.kernels.report import LIMITS

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")

MAY_SPILL_BYTES = {
    "paged_attention_decode<__nv_bfloat16, 256, 2,": 1024,
    "paged_attention_decode": 64,
    "paged_attention_prefill": 64,
    "sample": 16,
}
"""By the beginning of the kernel's name. How many addresses the tiles of attention leave registers
for depends on NVRTC's version; more than 8 queries of 256 dimensions are more than the registers
hold. `sample` keeps a word or two across calls, outside of its loops, so that two blocks fit a
multiprocessor."""

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC has no build for macOS")


class Wishes(Program):
    """Notes each kernel that is asked for, and the largest block and shared memory of its
    launches."""

    def __init__(self, source: Source, architecture: str) -> None:
        super().__init__(source, torch.device("cpu"))
        self.limits = LIMITS[architecture]
        self.launches: dict[str, tuple[int, int]] = {}

    def _make(self, expression: str) -> Kernel:
        return Wish(self, expression)


class Wish(Kernel):
    def __init__(self, program: Wishes, expression: str) -> None:
        super().__init__(program.source, expression, program.device)
        self.launches = program.launches

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None:
        threads, most = self.launches.get(self.name, (0, 0))
        threads = max(threads, block[0] * block[1] * block[2])
        self.launches[self.name] = threads, max(most, shared_bytes)


def wishes(name: str, architecture: str) -> Wishes:
    op = OPS[name]
    program = Wishes(Source.of_op(op.source), architecture)
    for case in op.cases():
        op.launch(program, **case.make(torch.Generator().manual_seed(0)))
    return program


@pytest.mark.parametrize("name", OPS)
def test_a_newer_architecture_takes_the_same_path(name: str) -> None:
    newest = compiler.supported_architectures()[-1]
    assert int(newest[3:]) > 90
    asked = wishes(name, ARCHITECTURES[-1])
    cubin = compiler.compile(asked.source, next(iter(asked.launches)), newest)
    assert cubin.code and cubin.warnings == ()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_specialisation_compiles_without_warnings_or_spills(
    name: str, architecture: str
) -> None:
    asked = wishes(name, architecture)
    assert asked.launches, "the op's cases launch nothing"

    def compiled(expression: str) -> compiler.Cubin:
        return compiler.compile(asked.source, expression, architecture)

    with ThreadPoolExecutor() as pool:
        for cubin in pool.map(compiled, asked.launches):
            threads, shared_bytes = asked.launches[cubin.expression]
            used, limits = cubin.resources, LIMITS[architecture]
            title = f"{cubin.expression} on {architecture}"
            assert cubin.warnings == (), title
            spilled = max(used.spill_store_bytes, used.spill_load_bytes)
            may = (n for start, n in MAY_SPILL_BYTES.items() if cubin.expression.startswith(start))
            assert spilled <= next(may, 0), title
            assert threads <= used.max_threads, title
            assert used.shared_bytes + shared_bytes <= limits.block_shared_bytes, title
