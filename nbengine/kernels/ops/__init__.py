"""The op table: every op of the engine by its name, one file each."""

from nbengine.kernels.op import Op
from nbengine.kernels.ops import (
    copy_blocks,
    dequantize,
    gated_mlp,
    gemm,
    gemv,
    greedy,
    kv_cache_write,
    logprobs,
    paged_attention_decode,
    paged_attention_prefill,
    penalties,
    quantized_gemv,
    restore_logits,
    rms_norm,
    rope,
    sample,
    swap_blocks,
)

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        copy_blocks.OP,
        dequantize.OP,
        gated_mlp.OP,
        gemm.OP,
        gemv.OP,
        greedy.OP,
        kv_cache_write.OP,
        logprobs.OP,
        paged_attention_decode.OP,
        paged_attention_prefill.OP,
        penalties.OP,
        quantized_gemv.OP,
        restore_logits.OP,
        rms_norm.OP,
        rope.OP,
        sample.OP,
        swap_blocks.OP,
    )
}
