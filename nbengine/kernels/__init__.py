"""CUDA C kernels: compiled at run time, launched on torch tensors, checked, measured and swapped.

Usable without the engine. `op.py` says what an op is and `ops/` holds one file for each; their CUDA
C lies in `cuda/`. A `Program` is one source on one backend: compiled by NVRTC for a GPU
(`compiler.py`, `launcher.py`) or as C++ for this machine's CPU (`emulator/`). Nothing here knows of
requests, schedulers or models.
"""
