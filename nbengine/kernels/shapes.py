"""What a launch asks of its tensors before it trusts their pointers, in words that name them.

Kernels move rows in packs of up to 16 bytes, so a row must start at a multiple of its pack. Dtypes
and devices are checked by the kernel itself (`Kernel.check`). Each check is a few comparisons of
integers: a launch has some microseconds in all.
"""

from __future__ import annotations

from torch import Tensor

PACK_BYTES = 16

MAX_VOCAB_SIZE = 1 << 19
"""Of the sampling kernels: a row's weights are summed in integers of 64 bits."""


def pack_size(size: int, itemsize: int) -> int:
    """Elements in the widest pack of which rows of `size` elements are a whole number: the
    `nb::pack_size` of the kernels."""
    elements = PACK_BYTES // itemsize
    while size % elements:
        elements //= 2
    return elements


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raises `ValueError` where `tensor` has another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, and needs {list(shape)}")


def check_dense(name: str, tensor: Tensor, *shape: int, alignment: int = PACK_BYTES) -> None:
    """`tensor` has this shape and no gaps, and starts at a multiple of `alignment` bytes."""
    past = tensor.data_ptr() % alignment
    if tensor.shape == shape and tensor.is_contiguous() and not past:
        return
    check_shape(name, tensor, *shape)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} {list(shape)} has the strides {list(tensor.stride())}, and must be contiguous"
        )
    raise ValueError(f"{name} starts {past} bytes after a multiple of {alignment}")


def check_rows(name: str, tensor: Tensor, *shape: int) -> None:
    """`tensor` has this shape, and each of its rows (all but the first dimension) is dense; rows
    may be slices of wider ones that keep them on multiples of their pack."""
    address = tensor.data_ptr()
    if tensor.shape == shape and tensor.is_contiguous() and address % PACK_BYTES == 0:
        return
    check_shape(name, tensor, *shape)
    stride = tensor.stride()
    dense = 1
    for dim in range(len(shape) - 1, 0, -1):
        if stride[dim] != dense and shape[dim] > 1:
            raise ValueError(
                f"{name} {list(shape)} has the strides {list(stride)}: each row must be dense"
            )
        dense *= shape[dim]
    itemsize = tensor.element_size()
    pack = pack_size(shape[-1], itemsize)
    if (shape[0] > 1 and stride[0] % pack) or address % (pack * itemsize):
        raise ValueError(
            f"{name} {list(shape)}: its rows, {stride[0]} elements apart from address "
            f"{address:#x} on, must start at multiples of {pack * itemsize} bytes"
        )


def check_logits(logits: Tensor) -> None:
    """`logits` is `[R, V]` with dense rows, which may be slices of wider ones and start anywhere:
    a vocabulary may have any size. V is at most 2^19, so that a sum of weights fits its integer."""
    if logits.dim() != 2 or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise ValueError(
            f"logits {list(logits.shape)} have the strides {list(logits.stride())}: they are [R, V] "
            "with dense rows"
        )
    if not 1 <= logits.shape[1] <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"logits of {logits.shape[1]:,} tokens: 1 to {MAX_VOCAB_SIZE:,} are possible"
        )
