"""CUDA C to machine code: NVRTC, with a cache on the disk. No GPU, driver or toolkit is needed.

One kernel of one source for one architecture at a time: `compile(source, "scale<float>", "sm_90")`.
The result is CUBIN rather than PTX, because a driver older than NVRTC refuses newer PTX; the PTX is
kept beside it to be read. NVRTC is called through `cuda.bindings`, as that gives both, and ptxas's
account of the registers, from one compilation on a machine without a driver.

The cache holds one file for each result. Its name is a hash of all that the result is made from:
the text, its headers, the options, NVRTC's version. NVIDIA's own headers count by their sizes and
dates.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nbengine.disk_cache import cache_folder, drop_oldest, made_whole, mark_used
from nbengine.kernels.diagnostics import CompileError, Diagnostic, lines_of, parse_nvrtc
from nbengine.kernels.report import (
    KernelReport,
    Limits,
    Resources,
    disassembly,
    limits_of,
    report,
)
from nbengine.kernels.source import INCLUDE_ROOT, Source, declared_at, included
from nbengine.kernels.toolchain import ToolchainMissing, headers_identity, nvidia_headers
from nbengine.progress import doing

OPTIONS = (
    "--std=c++17",
    "-lineinfo",
    "--ptxas-options=-v",
    "-default-device",
    "-no-source-include",
)
"""Given to every compilation. -default-device: NVRTC 13.0 takes generic lambdas for host functions.
-no-source-include: it would also look into the working directory."""
CACHE_BYTES = 256 * 2**20
"""Results that were not asked for the longest are deleted when the cache is larger."""
_FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel."""

    expression: str
    architecture: str
    symbol: str
    """The kernel's mangled name inside the code."""
    code: bytes
    ptx: str
    resources: Resources
    warnings: tuple[Diagnostic, ...]

    def report(
        self,
        block_threads: int,
        dynamic_shared_bytes: int = 0,
        limits: Limits | None = None,
        blocks: int | None = None,
    ) -> KernelReport:
        """Registers, shared memory, spills, and the occupancy in blocks of this shape. `limits`,
        and how many `blocks` fit a multiprocessor, may be given where a driver was asked."""
        return report(
            self.expression,
            self.architecture,
            self.resources,
            block_threads,
            dynamic_shared_bytes,
            limits or limits_of(self.architecture),
            blocks,
            tuple(f"{remark.place}: {remark.message}" for remark in self.warnings),
        )

    def sass(self) -> str:
        """The machine code as text, with the source lines that it comes from. Raises
        `ToolchainMissing` where no disassembler is found."""
        text = disassembly(self.code)
        if text is None:
            raise ToolchainMissing(
                "reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm"
            )
        return text


def compile(
    source: Source, expression: str, architecture: str, options: Iterable[str] = ()
) -> Cubin:
    """Compile the kernel that `expression` names, or take it from the cache.

    `architecture` is a real one, `sm_80` or `sm_90a`; `options` are further ones of NVRTC
    (`-DkTile=64`, `--use_fast_math`). Thread-safe; NVRTC runs without the GIL.

    Raises:
        CompileError: with the compiler's remarks.
        ToolchainMissing: NVRTC or its headers are not installed.
    """
    options = (*OPTIONS, *options, f"-arch={architecture}")
    path = cubin_folder() / f"{_key(source, expression, options)}.cubin"
    found = _read(path)
    if found is None:
        with doing(f"compiling {expression} for {architecture}"):
            found = _compile(source, expression, architecture, options)
        _write(path, found)
    return found


def supported_architectures() -> tuple[str, ...]:
    """What the installed NVRTC compiles for, oldest first."""
    nvrtc = _nvrtc()
    status, numbers = nvrtc.nvrtcGetSupportedArchs()
    _expect(nvrtc, status)
    return tuple(f"sm_{number}" for number in numbers)


def architecture_for(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a device of this compute capability. Code for an earlier
    minor version of the same major one runs too, where NVRTC is older than the device."""
    major, minor = capability
    known = [int(name[3:]) for name in supported_architectures()]
    fitting = [number for number in known if major * 10 <= number <= major * 10 + minor]
    if not fitting:
        raise ToolchainMissing(
            f"NVRTC {'.'.join(map(str, nvrtc_version()))} can't compile for this GPU (compute "
            f"capability {major}.{minor}); it knows sm_{known[0]} to sm_{known[-1]}. A newer one "
            "comes with: pip install --upgrade nvidia-cuda-nvrtc"
        )
    return f"sm_{fitting[-1]}"


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    nvrtc = _nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    _expect(nvrtc, status)
    return major, minor


def cubin_folder() -> Path:
    """The cache's."""
    return cache_folder("cubin")


def clear_cache() -> None:
    drop_oldest(cubin_folder(), "*.cubin", 0)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:  # pathfinder's errors are RuntimeErrors
        raise ToolchainMissing(
            "compiling CUDA C needs NVIDIA's compiler, which is a Python package: "
            f"pip install 'nbengine[cuda]' ({error})"
        ) from error
    return nvrtc


def _expect(nvrtc: Any, status: Any) -> None:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {status.name}")


def _compile(source: Source, expression: str, architecture: str, options: tuple[str, ...]) -> Cubin:
    status, log, outputs = _run_nvrtc(source, expression, options)
    if outputs is None and _NAME_MAP in log:  # what is wrong without the expression is told alone
        alone = _run_nvrtc(source, None, options)
        if alone[2] is None:
            status, log, _ = alone
    remarks = _located(parse_nvrtc(log), source, expression)
    if outputs is None:
        if any(remark.file == "ptxas" and remark.line for remark in remarks):
            remarks = _at_source_lines(remarks, source, expression, options)
        count = sum(remark.severity == "error" for remark in remarks)
        raise CompileError(
            f"{expression} of {source.name} does not compile for {architecture}: "
            f"{f'{count} errors' if count > 1 else '1 error' if count else status}",
            remarks,
            source.texts,
            log,
        )
    symbol, code, ptx = outputs
    for remark in remarks:
        _log.info("%s: %s: %s", remark.place, remark.severity, remark.message)
    return Cubin(
        expression,
        architecture,
        symbol,
        code,
        ptx,
        Resources.of_ptxas(log, ptx, symbol),
        tuple(remarks),
    )


def _run_nvrtc(
    source: Source, expression: str | None, options: tuple[str, ...]
) -> tuple[str, str, tuple[str, bytes, str] | None]:
    """The status, the log, and (symbol, CUBIN, PTX) unless it failed. Without an expression nothing
    is instantiated, and there is no symbol."""
    nvrtc = _nvrtc()
    folders = [*([source.folder] if source.folder else []), INCLUDE_ROOT, *nvidia_headers()]
    arguments = [option.encode() for option in (*options, *(f"-I{path}" for path in folders))]
    names = [] if expression is None else [expression.encode()]
    text, headers = source.spelled(str)
    status, program = nvrtc.nvrtcCreateProgram(
        text.encode(),
        source.compiled_name.encode(),
        len(headers),
        [header.encode() for header in headers.values()],
        [str(path).encode() for path in headers],
    )
    _expect(nvrtc, status)
    try:
        for name in names:
            (status,) = nvrtc.nvrtcAddNameExpression(program, name)
            _expect(nvrtc, status)
        (compiled,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = source.with_own_name(_text(nvrtc, "ProgramLog", program))
        if compiled != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return compiled.name, log, None
        symbol = b""
        for name in names:
            status, symbol = nvrtc.nvrtcGetLoweredName(program, name)
            _expect(nvrtc, status)
        ptx = _text(nvrtc, "PTX", program)
        return compiled.name, log, (symbol.decode(), _bytes(nvrtc, "CUBIN", program), ptx)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bytes(nvrtc: Any, what: str, program: Any) -> bytes:
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _expect(nvrtc, status)
    # NVRTC writes into these bytes. One more than it needs: Python has a single object for all equal
    # bytes of length one, and an empty log would put a null into every b" " of the process.
    content = bytes(size + 1)
    (status,) = getattr(nvrtc, f"nvrtcGet{what}")(program, content)
    _expect(nvrtc, status)
    return content[:size]


def _text(nvrtc: Any, what: str, program: Any) -> str:
    # NVRTC ends each of a log's parts with a null
    return _bytes(nvrtc, what, program).decode(errors="replace").replace("\0", "").rstrip()


# --- What NVRTC says of lines that the user did not write ------------------------------------------


_NAME_MAP = "__nv_name_map"
_HEADERS = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}


def _located(
    remarks: Iterable[Diagnostic], source: Source, expression: str
) -> tuple[Diagnostic, ...]:
    """NVRTC appends the name expression to the source, and speaks of a line of its own there. The
    line that matters is the kernel's."""
    kept = []
    file, line = declared_at(source, expression)
    for remark in remarks:
        if remark.file != _NAME_MAP:
            notes = (re.sub(rf" at line \d+ of {_NAME_MAP}", "", note) for note in remark.notes)
            kept.append(replace(remark, notes=tuple(notes)))
        elif not remark.message.startswith("Error in parsing name expression"):
            message = f"{expression}: {remark.message}"
            notes = (
                f"the source needs: #include <{header}>"
                for type_name, header in _HEADERS.items()
                if f'"{type_name}" is undefined' in message
            )
            kept.append(Diagnostic(file, line, None, remark.severity, message, tuple(notes)))
    return tuple(kept)


def _at_source_lines(
    remarks: tuple[Diagnostic, ...], source: Source, expression: str, options: tuple[str, ...]
) -> tuple[Diagnostic, ...]:
    """ptxas refused inline assembly, and names a line of the PTX. That is compiled again without
    ptxas, for the `.loc` before the line says which line of the source it comes from."""
    virtual = [re.sub(r"^-arch=sm_", "-arch=compute_", option) for option in options]
    virtual = [option for option in virtual if not option.startswith("--ptxas-options")]
    _, _, outputs = _run_nvrtc(source, expression, tuple(virtual))
    if outputs is None:
        return remarks
    lines = lines_of(outputs[2])
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', outputs[2], re.MULTILINE))
    kept = []
    for remark in remarks:
        if remark.file == "ptxas" and remark.line:
            before = "\n".join(lines[: remark.line])
            places = re.findall(r"^\s*\.loc\s+(\d+)\s+(\d+)", before, re.MULTILINE)
            if places and places[-1][0] in files:
                file, line = files[places[-1][0]], int(places[-1][1])
                if file in (str(Path.cwd() / source.name), source.compiled_name):  # as NVRTC has it
                    file = source.name
                words = lines[remark.line - 1].strip() if remark.line <= len(lines) else ""
                remark = Diagnostic(
                    file, line, None, remark.severity, f"ptxas: {remark.message}", (words,)
                )
        kept.append(remark)
    return tuple(kept)


# --- The cache -------------------------------------------------------------------------------------


def _key(source: Source, expression: str, options: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((_FORMAT, nvrtc_version(), expression, options)).encode())
    digest.update(f"\0{source.folder}\0{source.path}".encode())
    found = [match[1] for option in options if (match := _FOLDER.fullmatch(option))]
    further = included("\n".join(source.texts.values()), *map(Path, found))
    for name, text in (*source.texts.items(), *further.items()):
        digest.update(f"\0{name}\0{text}".encode())
    digest.update(headers_identity())
    return digest.hexdigest()[:32]


_FOLDER = re.compile(r"(?:-I|--include-path=)\s*(.+)")


def _read(path: Path) -> Cubin | None:
    """None for what is not there, or is damaged."""
    try:
        content = path.read_bytes()
        checksum, header, payload = content.split(b"\n", 2)
        if hashlib.sha256(header + payload).hexdigest().encode() != checksum:
            return None
        fields = json.loads(header)
        size = fields.pop("code_bytes")
        resources = Resources(**fields.pop("resources"))
        warnings = tuple(
            Diagnostic(**{**remark, "notes": tuple(remark["notes"])})
            for remark in fields.pop("warnings")
        )
        mark_used(path)
        return Cubin(
            **fields,
            code=payload[:size],
            ptx=payload[size:].decode(),
            resources=resources,
            warnings=warnings,
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    fields = asdict(cubin)
    code, ptx = fields.pop("code"), fields.pop("ptx").encode()
    header = json.dumps({**fields, "code_bytes": len(code)}).encode()
    checksum = hashlib.sha256(header + code + ptx).hexdigest().encode()
    try:
        with made_whole(path) as whole:
            whole.write_bytes(b"\n".join((checksum, header, code + ptx)))
        drop_oldest(path.parent, "*.cubin", CACHE_BYTES)
    except OSError as error:
        _log.warning("compiled kernels can't be kept in %s: %s", path.parent, error)
