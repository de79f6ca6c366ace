"""The paged KV cache: where keys and values lie, decided in this one place.

Each layer has one K and one V tensor `[num_blocks, num_kv_heads, block_size, head_dim]`, so that
the rows of one head within one block are contiguous. A token's slot is
`block_id * block_size + offset`. All layers are one allocation, and a block's copy is one operation
over it. The runner calls this; which block belongs to whom is the block pool's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nbengine.errors import NotEnoughMemory
from nbengine.kernels.table import Kernels
from nbengine.models.config import ModelConfig


class KVCache:
    """Device blocks, and host blocks to swap to."""

    kernels: Kernels | None = None
    """Copies blocks; else torch does."""

    def __init__(self, data: Tensor, host: Tensor) -> None:
        self.data = data  # [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]
        self.host = host  # the same with num_host_blocks; pinned beside a GPU
        self.k: list[Tensor] = list(data[:, 0].unbind(0))
        self.v: list[Tensor] = list(data[:, 1].unbind(0))

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        num_host_blocks: int = 0,
    ) -> KVCache:
        """Blocks of uninitialised memory: no unused slot reaches a result (see attention), and the
        system commits a CPU's pages only as they are written. Raises `NotEnoughMemory`."""
        device = torch.device(device)

        def empty(n: int, where: torch.device | str, pinned: bool) -> Tensor:
            shape = (config.num_layers, 2, n, config.num_kv_heads, block_size, config.head_dim)
            try:
                return torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned)
            except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors
                each = bytes_per_block(config, block_size, dtype)
                raise NotEnoughMemory(
                    f"could not allocate {n} KV blocks of {each:,} bytes "
                    f"({n * each / 2**30:.2f} GiB) on {where}: lower gpu_memory_utilization, "
                    "max_model_len, num_gpu_blocks_override or swap_space"
                ) from error

        pinned = device.type == "cuda" and num_host_blocks > 0
        return cls(empty(num_blocks, device, False), empty(num_host_blocks, "cpu", pinned))

    @property
    def num_blocks(self) -> int:
        return self.data.shape[2]

    @property
    def num_host_blocks(self) -> int:
        return self.host.shape[2]

    @property
    def block_size(self) -> int:
        return self.data.shape[4]

    @property
    def nbytes(self) -> int:
        """Of the device blocks."""
        return self.data.nbytes

    def slots(self, slot_mapping: Tensor) -> tuple[slice | Tensor, ...]:
        """An index of `data` for these slots' keys and values in all layers."""
        blocks, offsets = slot_mapping // self.block_size, slot_mapping % self.block_size
        return slice(None), slice(None), blocks, slice(None), offsets

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy device blocks: (source, destination). All sources are read before any is
        written."""
        if self.kernels is not None and pairs:
            self.kernels.copy_blocks(cache=self.data, pairs=self._on_device(pairs))
        else:
            _copy(self.data, self.data, pairs)

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(device block, host block)."""
        self._swap(self.data, self.host, pairs)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """(host block, device block)."""
        self._swap(self.host, self.data, pairs)

    def _swap(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        if self.kernels is not None and pairs:
            self.kernels.swap_blocks(source=source, target=target, pairs=self._on_device(pairs))
        else:
            _copy(source, target, pairs)

    def _on_device(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """int64 [P, 2]."""
        return torch.tensor(pairs, dtype=torch.int64, device=self.data.device)


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Keys and values of `block_size` tokens in all layers."""
    return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize


def _copy(source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
    if not pairs:
        return
    froms, tos = zip(*pairs, strict=True)
    blocks = source[:, :, torch.tensor(froms, device=source.device)]
    target[:, :, torch.tensor(tos, device=target.device)] = blocks.to(target.device)
