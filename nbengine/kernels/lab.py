"""The kernel bench: is a source right (`verify`), and how fast is it (`bench`, against this
device's `roofline`)? For a cell of a notebook, a test or a script; without an engine."""

from nbengine.kernels.verification import Mismatch, Verified, verify, verify_call

__all__ = ["Mismatch", "Verified", "verify", "verify_call"]
