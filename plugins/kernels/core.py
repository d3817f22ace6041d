"""A, the softmax among landmarks: in registers, or written to scratch."""

import triton
import triton.language as tl

from fna.plugins.kernels.tiles import (
    LOG2E,
    TILE,
    deep_scores,
    dot_input,
    gather_rows,
    landmark_index,
    matrix_tile,
    taken_off,
)

MATRIX_Z = tl.constexpr(0)
MATRIX_W = tl.constexpr(1)
MATRIX_A = tl.constexpr(2)
MATRIX_T = tl.constexpr(3)
MATRIX_Y = tl.constexpr(4)
# For 16-bit inputs, by the place of an fp16 matrix: what products take. T and Y lie where the last W will (fp32 MATRIX_W), and Y for
# sums is fp32 MATRIX_T.
HALF_T = tl.constexpr(2)
HALF_Y = tl.constexpr(3)
HALF_A = tl.constexpr(4)
HALF_W = tl.constexpr(5)
HALF_Z = tl.constexpr(8)


@triton.jit
def core_scores(query, key, stride_n, landmarks, bias, key_mask, mask_mode, first, left, tokens, count, head_size, scale,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BRANCH: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """Scores (base 2) of landmark rows from `first` on against columns from `left` on; -inf on padding columns.

    BRANCH: pass the mask by where there is none, which saves moving it between lanes; other kernels would spill.
    """
    row, column = first + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    i = landmark_index(landmarks, row, count, tokens)
    j = landmark_index(landmarks, column, count, tokens)
    if query.dtype.element_ty == tl.float32:
        scores = deep_scores(query, key, i, j, row < count, column < count, stride_n, head_size,
                              ROWS, COLUMNS, BLOCK_D)  # fmt: skip
    else:
        queries = gather_rows(query, stride_n, i, head_size, BLOCK_D)
        keys = gather_rows(key, stride_n, j, head_size, BLOCK_D)
        scores = dot_input(queries, tl.trans(keys), tl.zeros([ROWS, COLUMNS], tl.float32), UPCAST)
    if BRANCH:
        offset = tl.load(bias + column, mask=column < count, other=float("-inf")) * LOG2E
        scores = scores * (scale * LOG2E) + offset[None, :]
        if mask_mode != 0:
            scores -= taken_off(key_mask, mask_mode, i, j, row < count, column < count)
        return scores
    else:
        scores = (scores * scale + tl.load(bias + column, mask=column < count, other=0.0)[None, :]) * LOG2E
        scores -= taken_off(key_mask, mask_mode, i, j, row < count, column < count)
        return tl.where((column < count)[None, :], scores, float("-inf"))


@triton.jit
def softmax_rows(scores, first, count, ROWS: tl.constexpr):
    """Softmax of scores in base 2; rows of padding are zero."""
    weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    return tl.where((first + tl.arange(0, ROWS) < count)[:, None], weight, 0.0)


@triton.jit
def core_to_scratch(query, key, stride_n, landmarks, bias, key_mask, mask_mode, matrices, colsum, row,
                    tokens, count, head_size, scale, S_PAD: tl.constexpr, BLOCK_D: tl.constexpr,
                    CHEBYSHEV: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Write 64 rows of A and their column sums; for Newton-Schulz also their transpose as the unscaled Z0."""
    size = S_PAD * S_PAD
    half = matrices.to(tl.pointer_type(tl.float16))
    # As scores first: in place, or where nothing lies yet.
    a = matrices if CHEBYSHEV else matrices + (MATRIX_W if HALF else MATRIX_A) * size
    for left in tl.range(0, S_PAD, TILE, num_stages=1):
        scores = core_scores(query, key, stride_n, landmarks, bias, key_mask, mask_mode, row, left, tokens, count, head_size, scale,
                              TILE, TILE, BLOCK_D, False, UPCAST)  # fmt: skip
        tl.store(matrix_tile(a, row, left, S_PAD), scores)
    tl.debug_barrier()
    sums = tl.zeros([S_PAD], tl.float32)
    column = tl.arange(0, S_PAD)
    for first in tl.range(row, row + TILE, 16, num_stages=1):
        r = first + tl.arange(0, 16)
        cell, mirrored = r[:, None] * S_PAD + column[None, :], column[None, :] * S_PAD + r[:, None]
        weight = softmax_rows(tl.load(a + cell), first, count, 16)
        if HALF and not CHEBYSHEV:
            tl.store(half + HALF_A * size + cell, weight.to(tl.float16))
            tl.store(half + HALF_Z * size + mirrored, weight.to(tl.float16))
        else:
            # Threads hold the same cells as in the load, but the store must not overtake a neighbour's read.
            tl.debug_barrier()
            tl.store(a + cell, weight)
        if not CHEBYSHEV:
            tl.store(matrices + MATRIX_Z * size + mirrored, weight)
        sums += tl.sum(weight, 0)
    tl.store(colsum + (row // TILE) * S_PAD + column, sums)
