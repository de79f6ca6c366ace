"""The kernel bench: is a source right (`verify`), and how fast is it (`bench`) beside what this
device can do (`roofline`)? What does each of its threads touch (`watch`)? For a cell of a notebook, a test or a script; without an engine."""

from nbengine.kernels.bench import Benched, Measurement, bench
from nbengine.kernels.roofline import Roofline, roofline
from nbengine.kernels.timing import NeedsGpu, Timing
from nbengine.kernels.verification import Mismatch, Verified, verify, verify_call
from nbengine.kernels.watch import KernelTrace, watch
from nbengine.progress import progress_to

__all__ = [
    "Benched",
    "KernelTrace",
    "Measurement",
    "Mismatch",
    "NeedsGpu",
    "Roofline",
    "Timing",
    "Verified",
    "bench",
    "progress_to",
    "roofline",
    "verify",
    "verify_call",
    "watch",
]
