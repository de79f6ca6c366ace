"""The op table: every op of the engine by its name, one file each."""

from nbengine.kernels.op import Op
from nbengine.kernels.ops import (
    copy_blocks,
    gated_mlp,
    gemv,
    kv_cache_write,
    paged_attention_decode,
    paged_attention_prefill,
    rms_norm,
    rope,
    swap_blocks,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        copy_blocks.OP,
        gated_mlp.OP,
        gemv.OP,
        kv_cache_write.OP,
        paged_attention_decode.OP,
        paged_attention_prefill.OP,
        rms_norm.OP,
        rope.OP,
        swap_blocks.OP,
    )
}
