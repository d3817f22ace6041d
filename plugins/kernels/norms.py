"""Triton kernels of norm-grid landmarks: the tokens of largest norm, and the rest evenly spaced among the others.

Two launches instead of the fifteen or so standard operators of `fna.samplers.norm_grid`, their twin. Among equal norms the
lowest index is taken. Features are [B, N, C], contiguous.
"""

import triton
import triton.language as tl

NO_INDEX = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["tokens"])
def norms_kernel(features, norms, tokens, channels, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Squared norms [B, N] in fp32. Grid: (ceil(N / BLOCK_N), B)."""
    item = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = features + item * tokens * channels + token.to(tl.int64)[:, None] * channels
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        mask = (token < tokens)[:, None] & (channel < channels)[None, :]
        x = tl.load(row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += tl.sum(x * x, 1)
    tl.store(norms + item * tokens + token, sums, mask=token < tokens)


@triton.jit(do_not_specialize=["tokens", "count", "prefix", "by_norm"])
def norm_grid_kernel(
    norms, landmarks, tokens, count, prefix, by_norm,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Prefix tokens, the `by_norm` patches of largest norm ascending, the rest evenly spaced. N <= BLOCK_N. Grid: (B).

    The p-th token outside a set t of which j are lower than t_j is p + #{j : t_j - j <= p}.
    """
    item = tl.program_id(0).to(tl.int64)
    landmarks += item * count
    token = tl.arange(0, BLOCK_N)
    patch = (token >= prefix) & (token < tokens)
    left = tl.load(norms + item * tokens + token, mask=patch, other=-1.0)
    place = tl.arange(0, BLOCK_T)
    taken = tl.full([BLOCK_T], NO_INDEX, tl.int32)  # counted from the first patch
    for step in tl.range(0, by_norm, num_stages=1):
        best = tl.min(tl.where(left == tl.max(left, 0), token, NO_INDEX), 0)
        best = tl.minimum(best, tokens - 1)
        left = tl.where(token == best, -1.0, left)
        taken = tl.where(place == step, best - prefix, taken)
    rank = tl.sum((taken[None, :] < taken[:, None]).to(tl.int32), 1)
    tl.store(landmarks + prefix + rank, taken + prefix, mask=place < by_norm)

    slot = tl.arange(0, BLOCK_S)
    tl.store(landmarks + slot, slot, mask=slot < prefix)
    spaced = count - prefix - by_norm
    others = tokens - prefix - by_norm
    position = ((2 * slot + 1) * others) // tl.maximum(2 * spaced, 1)
    shift = tl.where(place < by_norm, taken - rank, NO_INDEX)
    skipped = tl.sum((shift[None, :] <= position[:, None]).to(tl.int32), 1)
    tl.store(landmarks + prefix + by_norm + slot, position + skipped + prefix, mask=slot < spaced)
