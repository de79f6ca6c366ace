"""rms_norm in CuTe DSL: a second implementation of the op, in Python (`nvidia-cutlass-dsl`).

The same division of the work as `cuda/rms_norm.cu`: a block for each (token, set), a row's 16-byte
packs kept in registers between the sum and the product, so that each byte moves once. It is
compiled for each dtype, size and kind at its first call.
"""

from __future__ import annotations

import functools
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator
from torch import Tensor

from nbengine.kernels.shapes import check_dense, check_rows, pack_size

_TYPES = {
    torch.float32: cutlass.Float32,
    torch.float16: cutlass.Float16,
    torch.bfloat16: cutlass.BFloat16,
}
_WARP = 32
_MAX_THREADS = 1024


def launch(
    *, out: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> None:
    """See `nbengine.kernels.ops.rms_norm.launch`."""
    num_tokens, *inner = x.shape
    check_dense("weight", weight, *inner)
    check_rows("x", x, num_tokens, *inner)
    check_rows("out", out, num_tokens, *inner)
    if residual is not None:
        check_dense("residual", residual, num_tokens, *inner)
    if num_tokens == 0:
        return
    size = inner[-1]
    num_sets = weight.numel() // size
    with torch.cuda.device(x.device):
        _compiled(x.dtype, size, residual is not None)(
            _pointer(out.dtype, size, out.data_ptr()),
            _pointer(x.dtype, size, x.data_ptr()),
            _pointer(x.dtype, size, (x if residual is None else residual).data_ptr()),
            _pointer(weight.dtype, size, weight.data_ptr()),
            num_tokens,
            num_sets,
            x.stride(0),
            out.stride(0),
            eps,
            driver.CUstream(torch.cuda.current_stream().cuda_stream),
        )


@functools.cache
def _compiled(dtype: torch.dtype, size: int, with_residual: bool) -> Any:
    some, weight = _pointer(dtype, size, 0), _pointer(torch.float32, size, 0)
    norm = _RMSNorm(_TYPES[dtype], size, with_residual)
    return cute.compile(norm, some, some, some, weight, 1, 1, size, size, 1e-5, driver.CUstream(0))


def _pointer(dtype: torch.dtype, size: int, address: int) -> Any:
    """To rows of `size` elements, which start at multiples of their pack."""
    alignment = pack_size(size, dtype.itemsize) * dtype.itemsize
    return make_ptr(_TYPES[dtype], address, cute.AddressSpace.gmem, assumed_align=alignment)


class _RMSNorm:
    """The kernel for one dtype and size."""

    def __init__(self, dtype: type[cutlass.Numeric], size: int, with_residual: bool) -> None:
        self.size, self.with_residual = size, with_residual
        self.pack = pack_size(size, dtype.width // 8)
        self.num_packs = size // self.pack
        self.threads = min(_MAX_THREADS, -(-self.num_packs // _WARP) * _WARP)
        self.packs_per_thread = -(-self.num_packs // self.threads)

    @cute.jit
    def __call__(
        self,
        out: cute.Pointer,
        x: cute.Pointer,
        residual: cute.Pointer,
        weight: cute.Pointer,
        num_tokens: cutlass.Int32,
        num_sets: cutlass.Int32,
        x_stride: cutlass.Int64,
        out_stride: cutlass.Int64,
        eps: cutlass.Float32,
        stream: driver.CUstream,
    ) -> None:
        def packed(pointer: cute.Pointer, token_stride: cutlass.Int64) -> cute.Tensor:
            """[pack, packs of a row, set, token]"""
            token_stride = cute.assume(token_stride, divby=self.pack)
            return cute.make_tensor(
                pointer,
                cute.make_layout(
                    (self.pack, self.num_packs, num_sets, num_tokens),
                    stride=(1, self.pack, self.size, token_stride),
                ),
            )

        self.kernel(
            packed(out, out_stride),
            packed(x, x_stride),
            packed(residual, cutlass.Int64(self.size)),
            packed(weight, cutlass.Int64(0)),
            eps,
        ).launch(grid=(num_tokens, num_sets, 1), block=(self.threads, 1, 1), stream=stream)

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        x: cute.Tensor,
        residual: cute.Tensor,
        weight: cute.Tensor,
        eps: cutlass.Float32,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        token, which, _ = cute.arch.block_idx()
        shape = (self.pack, self.packs_per_thread)
        packs = cute.make_rmem_tensor(shape, x.element_type)
        packs.fill(0.0)
        before = cute.make_rmem_tensor(self.pack, x.element_type)
        for i in cutlass.range_constexpr(self.packs_per_thread):
            at = thread + i * self.threads
            if at < self.num_packs:
                cute.autovec_copy(x[None, at, which, token], packs[None, i])
                if cutlass.const_expr(self.with_residual):
                    cute.autovec_copy(residual[None, at, which, token], before)
                    total = before.load().to(cutlass.Float32) + packs[None, i].load().to(
                        cutlass.Float32
                    )
                    packs[None, i].store(total.to(x.element_type))
                    cute.autovec_copy(packs[None, i], residual[None, at, which, token])

        values = packs.load().to(cutlass.Float32)
        total = (values * values).reduce(
            cute.ReductionOp.ADD, cutlass.Float32(0.0), reduction_profile=0
        )
        total = self._block_sum(total)
        scale = cute.math.rsqrt(total / self.size + eps)

        factors = cute.make_rmem_tensor(self.pack, cutlass.Float32)
        for i in cutlass.range_constexpr(self.packs_per_thread):
            at = thread + i * self.threads
            if at < self.num_packs:
                cute.autovec_copy(weight[None, at, which, 0], factors)
                row = packs[None, i].load().to(cutlass.Float32) * scale * factors.load()
                packs[None, i].store(row.to(x.element_type))
                cute.autovec_copy(packs[None, i], out[None, at, which, token])

    @cute.jit
    def _block_sum(self, value: cutlass.Float32) -> cutlass.Float32:
        """Over the threads of the block; every thread gets it."""
        value = cute.arch.warp_reduction_sum(value)
        num_warps = self.threads // _WARP
        if cutlass.const_expr(num_warps > 1):
            allocator = SmemAllocator()
            partials = allocator.allocate_tensor(cutlass.Float32, cute.make_layout(num_warps))
            thread, _, _ = cute.arch.thread_idx()
            # Not arch.warp_idx(): that is a shuffle, and one lane alone must not make it.
            if thread % _WARP == 0:
                partials[thread // _WARP] = value
            cute.arch.sync_threads()
            value = partials.load().reduce(
                cute.ReductionOp.ADD, cutlass.Float32(0.0), reduction_profile=0
            )
        return value
