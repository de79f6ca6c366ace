"""The kernel bench: is a source right (`verify`), and how fast is it (`bench`) beside what this
device can do (`roofline`)? For a cell of a notebook, a test or a script; without an engine."""

from nbengine.kernels.bench import Benched, Measurement, bench
from nbengine.kernels.roofline import Roofline, roofline
from nbengine.kernels.timing import NeedsGpu, Timing
from nbengine.kernels.verification import Mismatch, Verified, verify, verify_call

__all__ = [
    "Benched",
    "Measurement",
    "Mismatch",
    "NeedsGpu",
    "Roofline",
    "Timing",
    "Verified",
    "bench",
    "roofline",
    "verify",
    "verify_call",
]
