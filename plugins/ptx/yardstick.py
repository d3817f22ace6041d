"""A plain exact flash-attention kernel in Triton, to count beside FNA in the same way: a yardstick, not the product.

The type of the inputs in and out, fp32 sums; the online softmax of Dao et al. 2022 ("FlashAttention"), as Triton's tutorial writes it.
"""

import triton
import triton.language as tl


@triton.jit
def _block(q, k, m, scale2):
    """Scores of a block of keys, the new row maxima (base 2), and the factor of what was summed before."""
    s = tl.dot(q, k.T, input_precision="tf32x3")
    new = tl.maximum(m, tl.max(s, 1) * scale2)
    return s, new, tl.exp2(m - new)


@triton.jit
def exact_kernel(
    query, key, value, out, tokens, scale2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of `[heads, tokens, D]`, contiguous; `scale2` is the scale times log2(e)."""
    start = tl.program_id(1).to(tl.int64) * tokens * D
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    at = start + rows[:, None] * D + d[None]
    q = tl.load(query + at, mask=rows[:, None] < tokens, other=0.0)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, D), tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    keys = key + start + columns[:, None] * D + d[None]
    values = value + start + columns[:, None] * D + d[None]
    for first in tl.range(0, whole, BLOCK_N, num_stages=NUM_STAGES):
        s, new, kept = _block(q, tl.load(keys + first * D), m, scale2)
        p = tl.exp2(s * scale2 - new[:, None])
        total = total * kept + tl.sum(p, 1)
        mixed = tl.dot(
            p.to(value.dtype.element_ty), tl.load(values + first * D), mixed * kept[:, None], input_precision="tf32x3"
        )
        m = new
    if whole < tokens:
        inside = whole + columns < tokens
        k = tl.load(keys + whole * D, mask=inside[:, None], other=0.0)
        s = tl.where(inside[None], tl.dot(q, k.T, input_precision="tf32x3"), -float("inf"))
        new = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - new[:, None])
        kept = tl.exp2(m - new)
        total = total * kept + tl.sum(p, 1)
        v = tl.load(values + whole * D, mask=inside[:, None], other=0.0)
        mixed = tl.dot(p.to(value.dtype.element_ty), v, mixed * kept[:, None], input_precision="tf32x3")
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=rows[:, None] < tokens)
