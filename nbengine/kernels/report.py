"""What a kernel uses of a multiprocessor, and how much of it a launch fills.

`Resources` are ptxas's words, so they are known without a GPU; `KernelReport` sets them against the
architecture's limits for one block shape. Occupancy follows NVIDIA's own calculation
(`cuda_occupancy.h`): warps resident on a multiprocessor as a fraction of those it has room for.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nbengine.kernels.display import table_html, table_text

WARP = 32
REGISTERS = 65_536
"""32-bit registers of a multiprocessor, of every architecture below."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one multiprocessor, and of a block on it. CUDA Programming Guide, "Compute capabilities"."""

    shared_bytes: int
    block_shared_bytes: int
    """The most that one block may have, static and dynamic."""
    warps: int
    blocks: int
    reserved_bytes: int = 1024
    """Shared memory that the system keeps in each block."""


_KIB = 1024
LIMITS = {
    "sm_75": Limits(64 * _KIB, 64 * _KIB, 32, 16, reserved_bytes=0),
    "sm_80": Limits(164 * _KIB, 163 * _KIB, 64, 32),
    "sm_86": Limits(100 * _KIB, 99 * _KIB, 48, 16),
    "sm_87": Limits(164 * _KIB, 163 * _KIB, 48, 16),
    "sm_89": Limits(100 * _KIB, 99 * _KIB, 48, 24),
    "sm_90": Limits(228 * _KIB, 227 * _KIB, 64, 32),
    "sm_100": Limits(228 * _KIB, 227 * _KIB, 64, 32),
    "sm_103": Limits(228 * _KIB, 227 * _KIB, 64, 32),
    "sm_110": Limits(228 * _KIB, 227 * _KIB, 48, 24),
    "sm_120": Limits(100 * _KIB, 99 * _KIB, 48, 24),
    "sm_121": Limits(100 * _KIB, 99 * _KIB, 48, 24),
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread or one block of a kernel takes."""

    registers: int
    shared_bytes: int
    """Static shared memory of a block."""
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    max_threads: int
    """The largest block: what `__launch_bounds__` says, or what the registers leave."""

    @classmethod
    def of_ptxas(cls, log: str, ptx: str, symbol: str) -> Resources:
        """From what `ptxas -v` prints."""
        start = log.find(f"Compiling entry function '{symbol}'")
        said = log[start:].split("Compiling entry function", 2)
        mine = said[1] if len(said) > 1 else ""

        def number(pattern: str) -> int:
            match = re.search(pattern, mine)
            return int(match[1]) if match else 0

        registers = number(r"Used (\d+) registers")
        bounds = re.search(
            rf"\.entry {re.escape(symbol)}\b[^{{]*?\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?",
            ptx,
        )
        if bounds:
            x, y, z = (int(part or 1) for part in bounds.groups())
            max_threads = x * y * z
        else:
            max_threads = min(1024, _warps_by_registers(registers) * WARP)
        return cls(
            registers,
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
            max_threads,
        )


@dataclass(frozen=True, slots=True)
class KernelReport:
    """A kernel at a launch shape. `str()` is a table; a notebook draws it as one."""

    kernel: str
    architecture: str
    resources: Resources
    block_threads: int
    dynamic_shared_bytes: int
    blocks_per_multiprocessor: int | None
    """None for an architecture whose limits are not known."""
    occupancy: float | None
    limited_by: str | None
    """registers, shared memory, warps or blocks."""
    warnings: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        r = self.resources
        spills = f"{r.spill_store_bytes} bytes stored, {r.spill_load_bytes} loaded"
        shown = [
            ("registers", f"{r.registers} a thread"),
            (
                "shared memory",
                f"{r.shared_bytes:,} bytes static, {self.dynamic_shared_bytes:,} dynamic",
            ),
            ("spills", spills if r.spill_store_bytes or r.spill_load_bytes else "none"),
            ("stack", f"{r.stack_bytes} bytes a thread"),
            ("block", f"{self.block_threads} threads, at most {r.max_threads}"),
        ]
        if self.occupancy is not None:
            num_blocks = self.blocks_per_multiprocessor
            shown.append(
                (
                    "occupancy",
                    f"{self.occupancy:.0%}: {num_blocks} block{'s' * (num_blocks != 1)} a "
                    f"multiprocessor, limited by {self.limited_by}",
                )
            )
        return shown + [("warning", warning) for warning in self.warnings]

    def __str__(self) -> str:
        return table_text((self.kernel, self.architecture), self.rows())

    def _repr_html_(self) -> str:
        return table_html((self.kernel, self.architecture), self.rows())


def report(
    kernel: str,
    architecture: str,
    resources: Resources,
    block_threads: int,
    dynamic_shared_bytes: int,
    limits: Limits | None,
    blocks: int | None = None,
    warnings: tuple[str, ...] = (),
) -> KernelReport:
    """The resources at a launch shape. `blocks` on a multiprocessor are calculated unless given;
    without `limits` there is no occupancy."""
    occupancy, limited_by = None, None
    if limits is not None:
        bounds = _bounds(limits, resources, block_threads, dynamic_shared_bytes)
        limited_by = min(bounds, key=lambda name: bounds[name])
        if blocks is None:
            blocks = bounds[limited_by]
        occupancy = blocks * -(-block_threads // WARP) / limits.warps
    return KernelReport(
        kernel,
        architecture,
        resources,
        block_threads,
        dynamic_shared_bytes,
        blocks,
        occupancy,
        limited_by,
        warnings,
    )


def disassembly(code: bytes) -> str | None:
    """SASS of a CUBIN by nvdisasm: on the PATH, in NVIDIA's packages, or in Triton's. None where
    there is none."""
    tool = _nvdisasm()
    if tool is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [tool, "--print-code", "--print-line-info", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _nvdisasm() -> str | None:
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            from cuda.pathfinder import find_nvidia_binary_utility

            found = find_nvidia_binary_utility("nvdisasm")
        except ImportError:  # an old pathfinder does not look for programs
            pass
    if found is None and (triton := importlib.util.find_spec("triton")) is not None:
        beside = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(beside) if beside.is_file() else None
    return found


def limits_of(architecture: str) -> Limits | None:
    """`sm_90a` has those of `sm_90`."""
    return LIMITS.get(architecture.rstrip("af"))


def _bounds(
    limits: Limits, resources: Resources, block_threads: int, dynamic_shared_bytes: int
) -> dict[str, int]:
    """How many blocks a multiprocessor takes, by each of its resources."""
    warps = -(-block_threads // WARP)
    shared = resources.shared_bytes + dynamic_shared_bytes
    taken = -(-(shared + limits.reserved_bytes) // 128) * 128
    fitting = limits.shared_bytes // taken if taken else limits.blocks
    return {
        "warps": limits.warps // warps if block_threads <= resources.max_threads else 0,
        "registers": _warps_by_registers(resources.registers) // warps,
        "shared memory": fitting if shared <= limits.block_shared_bytes else 0,
        "blocks": limits.blocks,
    }


def _warps_by_registers(registers: int) -> int:
    """Warps for which a multiprocessor has registers: each of its four partitions gives them out
    256 at a time."""
    per_warp = max(256, -(-registers * WARP // 256) * 256)
    return REGISTERS // 4 // per_warp * 4
