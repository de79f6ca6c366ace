"""The weight-matrix seam: a linear is called with x `[T, in]` and returns `[T, out]`.

`make_linear` takes a float weight and may quantise it; `make_linear_from_gguf` keeps the 4-bit
codes, scales and minima of a GGUF file as they are. Quantisation is of weights alone: no scale is
shared between rows of x, so a row's result depends on that row and on nothing else in the batch.

On a CPU the compiled kernels (`nbengine.cpu`) do the work. Without them torch's int4pack and
int8pack operations do, with x rounded to bfloat16, the one dtype in which those are fast. On a GPU,
and for the engine's kernels on any device (`for_kernels`), codes and scales lie as the ops
`dequantize` and `quantized_gemv` read them.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL, byref
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from nbengine.cpu import Matrix, kernels
from nbengine.errors import InvalidField
from nbengine.kernels.ops import dequantize
from nbengine.kernels.ops.dequantize import GROUP  # that of GGUF's Q4_0 and Q4_1, too

MAX_KERNEL_ROWS = 16
"""Rows of a float32 x up to which the compiled kernel beats torch's, which is made for many."""

SLICE_WEIGHTS = 1 << 23
"""Weights that are put into codes, or taken out of them, at a time: 16 MiB in 16 bits, which a GPU's
L2 holds until the product has read them."""


class Linear(Protocol):
    """A weight matrix in some format. `nbytes` is what it holds in memory."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def matrix(self) -> Matrix | None:
        """The weight as the compiled kernels see it, where they serve it."""
        ...

    def shares(self, tensor: Tensor) -> bool:
        """Whether the weight is this very tensor (a tied embedding)."""
        ...


def make_linear(
    weight: Tensor,
    bias: Tensor | None = None,
    quantization: str | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    for_kernels: bool = False,
) -> Linear:
    """From a weight `[out, in]` and a bias `[out]`.

    `quantization`: None keeps `dtype` (and the very tensor, if that is its dtype); "int8" rounds
    each row to 8 bits with one scale; "int4" rounds each row's groups of 32 to 4 bits with a scale
    and a minimum. Raises `InvalidField` for any other.
    """
    if quantization is None:
        return DenseLinear(weight.to(dtype), None if bias is None else bias.to(dtype))
    if quantization not in ("int8", "int4"):
        raise InvalidField("quantization", quantization, "must be None, 'int8' or 'int4'")
    quantise: Callable[[Tensor], tuple[Tensor, ...]] = {"int8": _to_int8, "int4": _to_int4}[
        quantization
    ]
    rows = max(1, SLICE_WEIGHTS // max(1, weight.shape[1]))  # what is computed in between is small
    parts = [quantise(part.float()) for part in weight.split(rows)]
    codes, scale, *minimum = [torch.cat(each) for each in zip(*parts, strict=True)]
    in_features = weight.shape[1]
    if minimum:
        return _int4(codes, scale, minimum[0], bias, in_features, dtype, for_kernels)
    if weight.is_cpu and not for_kernels:
        return Int8Linear(codes, scale, bias)
    codes = pad(codes, (0, -in_features % GROUP)).contiguous()
    return QuantizedLinear(codes, scale, bias, in_features, dtype)


_TINY = torch.finfo(torch.float32).tiny


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[out, in]`, float32 scales `[out]`."""
    scale = weight.abs().amax(dim=1).div_(127)
    codes = (weight / scale.clamp(min=_TINY)[:, None]).round_()
    return codes.to(torch.int8), scale


def _to_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes 0..15 `[out, groups, 32]`, float16 scales and minima `[out, groups]`."""
    groups = pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scale, minimum = (high - low).div_(15).half(), low.half()
    step = scale.float().clamp(min=_TINY)[..., None]
    codes = ((groups - minimum.float()[..., None]) / step).round_().clamp_(0, 15)
    return codes.to(torch.uint8), scale, minimum


def make_linear_from_gguf(
    blocks: Tensor,
    quant_type: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    for_kernels: bool = False,
) -> Linear:
    """From raw GGUF blocks: uint8 `[out, bytes per row]` of type "Q4_0" (a float16 scale and 32
    codes, weight = scale * (code - 8)) or "Q4_1" (with a float16 minimum, weight = scale * code +
    minimum). A block's byte i holds code i in its low half and code i + 16 in its high half."""
    num_scales = {"Q4_0": 1, "Q4_1": 2}[quant_type]
    blocks = blocks.unflatten(1, (-1, 2 * num_scales + GROUP // 2))
    scales = blocks[..., : 2 * num_scales].contiguous().view(torch.float16)  # [out, groups, n]
    packed = blocks[..., 2 * num_scales :]
    codes = torch.cat((packed & 15, packed >> 4), dim=-1)
    minimum = scales[..., 1] if quant_type == "Q4_1" else scales[..., 0] * -8
    form = (codes, scales[..., 0], minimum, bias, codes.shape[1] * GROUP)
    return _int4(*form, dtype, for_kernels)


def _int4(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    bias: Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    for_kernels: bool,
) -> Linear:
    """From codes 0..15, uint8 `[out, groups, 32]`, and float16 scales and minima `[out, groups]`."""
    if codes.is_cpu and not for_kernels:
        return Int4Linear(codes, scale, minimum, bias, in_features)
    pairs = codes.flatten(1).unflatten(1, (-1, 2))
    scales = torch.stack((scale, minimum), dim=-1).half()
    return QuantizedLinear(pairs[..., 0] | (pairs[..., 1] << 4), scales, bias, in_features, dtype)


class DenseLinear:
    """x @ weight.T + bias in the weight's own dtype, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        fits = weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
        self._kernels = kernels() if fits else None
        self.matrix: Matrix | None = None
        if self._kernels is not None:
            self.matrix = _matrix(32, weight, None, bias, *weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is None or self.matrix is None or x.shape[0] > MAX_KERNEL_ROWS:
            return linear(x, self.weight, self.bias)
        return _multiply(self._kernels, self.matrix, x)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def shares(self, tensor: Tensor) -> bool:
        return self.weight.data_ptr() == tensor.data_ptr()


class Int8Linear:
    """weight = scale * code, with one float32 scale for each row of codes int8 `[out, in]`."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = codes.shape
        self.bias = None if bias is None else bias.float()
        self.matrix: Matrix | None = None
        self._kernels = kernels()
        if self._kernels is None:
            # Whole vectors only: torch's kernel reads beyond the end of other shapes.
            rows = -len(codes) % 32
            self.codes = pad(codes, (0, -self.in_features % 32, 0, rows)).contiguous()
            self.scale = pad(scale, (0, rows)).bfloat16()
        else:
            tile, strip = self._kernels.tile_rows(), self._kernels.strip_rows()
            self.codes = _pack_int8(pad(codes, (0, 0, 0, -len(codes) % strip)), tile)
            self.scale = pad(scale.float(), (0, -len(codes) % strip))
            self.matrix = _matrix(8, self.codes, self.scale, self.bias, *codes.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is not None and self.matrix is not None:
            return _multiply(self._kernels, self.matrix, x)
        rounded = pad(x.bfloat16(), (0, -self.in_features % 32)).contiguous()
        y = torch._weight_int8pack_mm(rounded, self.codes, self.scale)[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes, self.scale, self.bias)

    def shares(self, tensor: Tensor) -> bool:
        return False


class Int4Linear:
    """weight = scale * code + minimum, with a float16 scale and minimum `[out, groups]` for each
    row's groups of 32 codes 0..15, uint8 `[out, groups, 32]`."""

    def __init__(
        self, codes: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None, in_features: int
    ) -> None:
        self.out_features, self.in_features = codes.shape[0], in_features
        self.bias = None if bias is None else bias.float()
        self.matrix: Matrix | None = None
        self._kernels = kernels()
        if self._kernels is None:
            # torch wants out to be a multiple of 16, and weight = scale * (code - 8) + zero
            rows = -self.out_features % 16
            codes = pad(codes.flatten(1), (0, 0, 0, rows)).int()
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            zero = minimum.float() + 8 * scale.float()
            scale = torch.stack((scale.float(), zero), dim=-1).bfloat16()  # [out, groups, 2]
            self.scale = pad(scale, (0, 0, 0, 0, 0, rows)).transpose(0, 1).contiguous()
        else:
            tile, rows = self._kernels.tile_rows(), -len(codes) % self._kernels.strip_rows()
            self.codes = _pack_int4(pad(codes, (0, 0, 0, 0, 0, rows)), tile)
            scales = torch.stack((scale, minimum), dim=-1).half()  # [out, groups, 2]
            self.scale = _pack_scales(pad(scales, (0, 0, 0, 0, 0, rows)), tile)
            self.matrix = _matrix(
                4, self.codes, self.scale, self.bias, self.out_features, in_features
            )

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is not None and self.matrix is not None:
            return _multiply(self._kernels, self.matrix, x)
        rounded = pad(x.bfloat16(), (0, -self.in_features % GROUP)).contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, self.codes, GROUP, self.scale)
        y = y[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes, self.scale, self.bias)

    def shares(self, tensor: Tensor) -> bool:
        return False


class QuantizedLinear:
    """Codes and scales as the op `dequantize` reads them, on any device; the bias in the dtype of
    activations."""

    matrix: Matrix | None = None

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        in_features: int,
        dtype: torch.dtype,
    ) -> None:
        self.codes, self.scales, self.in_features = codes, scales, in_features
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x, dequantize.reference)

    def multiply(
        self,
        x: Tensor,
        dequantize: Callable[..., None],
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear,
    ) -> Tensor:
        """The product, with a slice of the weights at a time taken out of their codes by
        `dequantize(out=, codes=, scales=)` into the dtype of x, and multiplied by
        `product(x, weight, bias)`."""
        out = x.new_empty(x.shape[0], len(self.codes))
        rows = min(len(self.codes), max(1, SLICE_WEIGHTS // self.in_features))
        weights = x.new_empty(rows, self.in_features)
        for start in range(0, len(self.codes), rows):
            part = slice(start, start + rows)
            codes = self.codes[part]
            weight = weights[: len(codes)]
            dequantize(out=weight, codes=codes, scales=self.scales[part])
            bias = None if self.bias is None else self.bias[part]
            out[:, part] = product(x, weight, bias)
        return out

    @property
    def nbytes(self) -> int:
        return _nbytes(self.codes, self.scales, self.bias)

    def shares(self, tensor: Tensor) -> bool:
        return False


def _matrix(
    kind: int,
    codes: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Matrix:
    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    return Matrix(kind, address(codes), address(scales), address(bias), out_features, in_features)


def _multiply(native: CDLL, matrix: Matrix, x: Tensor) -> Tensor:
    values = x.to(torch.float32).contiguous()
    rows = values.shape[0]
    out = torch.empty(rows, matrix.out_features)
    native.linear(byref(matrix), values.data_ptr(), rows, out.data_ptr(), torch.get_num_threads())
    return out.to(x.dtype)


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


# The layouts of cpu/kernels.cpp. Rows are interleaved in tiles of as many as a vector has 32-bit
# lanes, and padded to whole strips of tiles; a lane's 32 bits hold consecutive codes of its row, the
# first of each pair of codes in the low 16 bits and the second in the high 16.


def _pack_int8(codes: Tensor, tile: int) -> Tensor:
    """int8 `[out, in]` -> `[tiles, groups, 8, tile, 2, 2]`."""
    codes = pad(codes, (0, -codes.shape[1] % GROUP))
    lanes = codes.view(codes.shape[0] // tile, tile, -1, 8, 2, 2)  # .., vector, pair, which
    return lanes.permute(0, 2, 3, 1, 5, 4).contiguous()


def _pack_int4(codes: Tensor, tile: int) -> Tensor:
    """uint8 `[out, groups, 32]` -> `[tiles, groups, 4, tile, 2, 2]`."""
    lanes = codes.view(
        -1, tile, codes.shape[1], 4, 2, 2, 2
    )  # .., vector, pair // 2, pair % 2, which
    packed = lanes[..., 0, :] | (lanes[..., 1, :] << 4)  # .., vector, pair // 2, which
    return packed.permute(0, 2, 3, 1, 5, 4).contiguous()


def _pack_scales(scales: Tensor, tile: int) -> Tensor:
    """float16 `[out, groups, 2]` -> `[tiles, groups, 2, tile]`."""
    return scales.view(-1, tile, *scales.shape[1:]).permute(0, 2, 3, 1).contiguous()
