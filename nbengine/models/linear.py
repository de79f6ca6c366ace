"""The weight-matrix seam: a linear is called with x `[T, in]` and returns `[T, out]`."""

from __future__ import annotations

from typing import Protocol

import gguf
import torch
from torch import Tensor
from torch.nn.functional import linear


class Linear(Protocol):
    """A weight matrix in some format. `nbytes` is what it holds in memory."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def shares(self, tensor: Tensor) -> bool:
        """Whether the weight is this very tensor (a tied embedding)."""
        ...


class DenseLinear:
    """x @ weight.T + bias in the weight's own dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, tensor: Tensor) -> bool:
        return self.weight.data_ptr() == tensor.data_ptr()


def make_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    quantization: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Linear:
    """From a weight `[out, in]`; a dense one of the right dtype is kept, not copied."""
    return DenseLinear(weight.to(dtype), None if bias is None else bias.to(dtype))


def make_linear_from_gguf(
    blocks: Tensor, quant_type: str, bias: Tensor | None, dtype: torch.dtype
) -> Linear:
    """From raw GGUF blocks: uint8 `[out, bytes per row]` of type "Q4_0" or "Q4_1"."""
    kind = gguf.GGMLQuantizationType[quant_type]
    weight = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))
    return make_linear(weight, bias, None, dtype)
