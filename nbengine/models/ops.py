"""The decoder's small operations: norm, rotary embedding, gated activation.

Each is one pass over its rows in the compiled kernels (`nbengine.cpu`) where x is float32 on a CPU,
and the same in a handful of torch operations elsewhere. The decoder calls them a few times a layer;
at one row the calls cost more than the arithmetic. A row's result depends on its own row alone.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from nbengine.cpu import kernels


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019), over the last dimension.

    x is `[T, size]` for a weight `[size]`, and `[T, sets, size]` for one `[sets, size]`. Computed in
    float32 whatever the dtype of x, which is the result's.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight.float().contiguous()
        self.eps = eps
        # sqrt(mean(x^2) + eps) is hypot(|x|, sqrt(n * eps)) / sqrt(n), in torch two operations less.
        n = weight.shape[-1]
        self._root = math.sqrt(n)
        self._floor = torch.tensor(math.sqrt(n * eps), dtype=torch.float32, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        native = _native(x)
        if native is not None:
            out = torch.empty(x.shape)
            native.rms_norm(
                x.data_ptr(),
                x.stride(0),
                self.weight.data_ptr(),
                self.eps,
                x.shape[0],
                x.shape[1] if x.dim() == 3 else 1,
                x.shape[-1],
                out.data_ptr(),
                torch.get_num_threads(),
            )
            return out
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = self._root / torch.hypot(norm, self._floor)
        return (x * scale).mul_(self.weight).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x `[T, heads, head_dim]` by `cos_sin`
    `[T, 2, head_dim]`, rows of `rope_table`."""
    heads, head_dim = x.shape[1:]
    native = _native(x)
    if native is not None and cos_sin.dtype == torch.float32:
        out = torch.empty(x.shape)
        native.rotate(
            x.data_ptr(),
            x.stride(0),
            cos_sin.data_ptr(),
            x.shape[0],
            heads,
            head_dim,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out
    cos, sin = cos_sin[:, :1], cos_sin[:, 1:]
    return torch.addcmul(x * cos, x.roll(head_dim // 2, dims=-1), sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU, Shazeer 2020): `[T, 2 * size]`, gate before up -> `[T, size]`."""
    size = gate_up.shape[1] // 2
    native = _native(gate_up)
    if native is not None and gate_up.is_contiguous():
        out = torch.empty(gate_up.shape[0], size)
        native.silu_and_mul(
            gate_up.data_ptr(), gate_up.shape[0], size, out.data_ptr(), torch.get_num_threads()
        )
        return out
    return silu(gate_up[:, :size]).mul_(gate_up[:, size:])


def _native(x: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they serve x: float32 on a CPU, each row dense."""
    if x.dtype == torch.float32 and x.is_cpu and x.stride(-1) == 1:
        if x.dim() == 3 and x.stride(1) != x.shape[2]:
            return None
        return kernels()
    return None
