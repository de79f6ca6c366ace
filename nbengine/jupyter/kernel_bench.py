"""The magics for kernels: try one from a cell, look at what runs each op, swap and restore.

They show what `kernel_trial`, `kernel_survey` and `kernels` return; nothing is decided here. Loaded
by `%load_ext nbengine` with the others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar

from IPython.core.magic import line_cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument

from nbengine.jupyter.kernel_view import KernelView
from nbengine.jupyter.magic import EngineMagics, magic, quotable
from nbengine.jupyter.source_view import SourceView
from nbengine.kernel_survey import RooflinePlot, Survey, survey
from nbengine.kernel_trial import Trial, compiled_now, source_now, try_kernel
from nbengine.kernels.cell import cell_source
from nbengine.kernels.contract import Contract, contract
from nbengine.kernels.implementation import Implementation, op_named, short_name
from nbengine.kernels.ops import OPS
from nbengine.kernels.report import LIMITS
from nbengine.kernels.roofline import PUBLISHED
from nbengine.kernels.table import Implementations
from nbengine.kernels.watch import watch

_OP = argument("op", help="which; %%nb_kernels lists them")
_CASE = argument(
    "--case",
    type=quotable,
    metavar="PART",
    help="only calls of the grid with this in their names, which are dtype, sizes and what is "
    "particular, joined by dashes: float16, 1x64, float32-1x64",
)
_ARCH = argument(
    "--arch",
    metavar="SM",
    help="compile for this architecture (sm_80); default: this GPU's, or sm_90",
)


def _three(text: str) -> tuple[int, int, int]:
    """`2` or `2,0,0`."""
    try:
        x, y, z = (*map(int, text.split(",")), 0, 0)[:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no index such as 2 or 2,0,0") from error
    return x, y, z


@magics_class
class KernelMagics(EngineMagics):
    """Kernels: tried, looked at, swapped."""

    option_values: ClassVar = {"--arch": tuple(LIMITS), "--gpu": tuple(PUBLISHED)}

    @magic(
        line_cell_magic,
        _OP,
        argument("--swap", action="store_true", help="put it into the running engine"),
        argument("--emulate", action="store_true", help="run it on the CPU, with every check"),
        argument("--source", action="store_true", help="put the current source into a cell below"),
        argument("--no-bench", action="store_true", help="do not time it"),
        _CASE,
        _ARCH,
        tells_progress=True,
    )
    def nb_kernel(self, args: argparse.Namespace, cell: str | None) -> Trial | Contract | None:
        """Try the CUDA C of the cell in an op's place: compiled, verified against the reference (on
        the op's grid and on the engine's live tensors), measured, and with --swap put into the
        engine. The Trial is returned.

        Without CUDA C it says what a kernel in the op's place must do. The cell's text is kept as a
        file with line information, for Nsight and cuda-gdb: `_.source.path`.
        """
        engine = self._open_engine
        if cell is None or not cell.strip():
            source = source_now(args.op, engine)
            if args.source:
                body = source.text.removeprefix(f"// %%nb_kernel {args.op}\n").rstrip("\n")
                self.shell.set_next_input(f"%%nb_kernel {args.op}\n{body}")
                return None
            return contract(args.op, source, args.case)
        op_named(args.op)
        return try_kernel(
            args.op,
            cell_source(args.op, cell, self._first_line(cell), Path.cwd()),
            engine,
            swap=args.swap,
            emulate=args.emulate,
            case=args.case,
            architecture=args.arch,
            measured=not args.no_bench,
        )

    @property
    def _open_engine(self) -> Any:
        engine = self._engine_or_none
        return None if engine is None or engine.is_closed else engine

    def _first_line(self, body: str) -> int:
        """The number that the body's first line has in the cell: empty lines may stand before the
        magic."""
        typed = self.shell.history_manager.input_hist_raw[-1]
        before, found, _ = typed.rpartition(body.rstrip("\n"))
        return before.count("\n") + 1 if found and "%%nb_kernel" in before else 2

    @magic(
        line_magic,
        argument("--roofline", action="store_true", help="draw them under the roofs of the device"),
        argument(
            "--gpu", type=quotable, help="without a GPU: whose published figures (default: H100)"
        ),
        argument("--step", type=int, help="in that step (default: at the engine's batch)"),
        tells_progress=True,
    )
    def nb_kernels(self, args: argparse.Namespace, _: str | None) -> Survey | RooflinePlot:
        """The ops, what runs each now, and what it costs at the engine's batch or in a step: bytes and
        operations, and on a GPU its time and the fraction of the roofline that it reaches."""
        engine = self._open_engine
        found = survey(None if engine is None else engine.kernels, args.gpu, args.step)
        return RooflinePlot(found) if args.roofline else found

    @magic(line_magic, _OP)
    def nb_source(self, args: argparse.Namespace, _: str | None) -> SourceView:
        """The source of what runs an op now."""
        source = source_now(args.op, self._open_engine)
        return SourceView(f"{args.op}: {short_name(source.name)}", source.text, "cpp")

    @magic(line_magic, _OP, _CASE, _ARCH, tells_progress=True)
    def nb_ptx(self, args: argparse.Namespace, _: str | None) -> SourceView:
        """The PTX of the kernels that an op launches now: for the engine's batch, or for one call of
        its grid. It needs NVRTC, and neither a GPU nor a driver."""
        found = compiled_now(args.op, self._open_engine, case=args.case, architecture=args.arch)
        return SourceView(_title(args.op, found), "\n".join(c.ptx for c in found), "text")

    @magic(line_magic, _OP, _CASE, _ARCH, tells_progress=True)
    def nb_sass(self, args: argparse.Namespace, _: str | None) -> SourceView:
        """The machine code of the same kernels, with the source lines that it comes from. It needs
        nvdisasm (pip install nvidia-cuda-nvdisasm), and no GPU."""
        found = compiled_now(args.op, self._open_engine, case=args.case, architecture=args.arch)
        return SourceView(_title(args.op, found), "\n".join(c.sass() for c in found), "text")

    @magic(
        line_magic,
        argument("op", nargs="?", help="which; without one, every op that was swapped"),
        tells_progress=True,
    )
    def nb_restore(
        self, args: argparse.Namespace, _: str | None
    ) -> Implementation | Implementations:
        """Put the engine's own kernel of an op back in its place, or those of all ops."""
        kernels = self._engine.kernels
        if args.op is not None:
            return kernels.restore(args.op)
        for row in kernels.implementations:
            if not row.is_own:
                kernels.restore(row.op.name)
        return kernels.implementations

    @magic(
        line_magic,
        _OP,
        _CASE,
        argument("--live", action="store_true", help="a call at the engine's batch, and no case"),
        argument("--block", type=_three, default=(0, 0, 0), metavar="X,Y,Z", help="of the grid"),
        argument("--phase", type=int, metavar="N", help="begin with this one (from 1 on)"),
        tells_progress=True,
    )
    def nb_watch(self, args: argparse.Namespace, _: str | None) -> KernelView:
        """Watch one CUDA block of an op's kernel, emulated: which thread reads and writes which
        element of which tensor and KV block, from barrier to barrier."""
        if args.live:
            trace = self._engine.kernels.watch(args.op, of=args.block)
        else:
            source = source_now(args.op, self._open_engine)
            trace = watch(args.op, source, args.case, of=args.block)
        return KernelView(trace, None if args.phase is None else args.phase - 1)

    def _values(self, name: str) -> tuple[str, ...]:
        return () if name == "nb_kernels" else tuple(OPS)


def _title(op: str, found: Any) -> str:
    return f"{op}: {', '.join(f'{c.expression} for {c.architecture}' for c in found)}"
