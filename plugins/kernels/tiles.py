"""What every attention kernel is made of: products of tiles, gathered rows, masks, and tiles of the scratch matrices."""

import triton
import triton.language as tl

from fna.plugins import launch_plan
from fna.special_tokens import MASKED_SCORE

LOG2E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(MASKED_SCORE)
TILE = tl.constexpr(launch_plan.TILE)
SMALLEST = tl.constexpr(1e-30)
EXPONENT = tl.constexpr(0x7F800000)
"""The exponent's bits of an fp32: what they leave of a number is the power of two below it."""


@triton.jit
def dot_input(x, y, acc, UPCAST: tl.constexpr):
    """Product of two tiles of the input type, added to `acc` in fp32. UPCAST: the interpreter has no bf16 product."""
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc)
    else:
        return tl.dot(x, y, acc, input_precision="tf32x3")


@triton.jit
def dot_matrix(x, y, acc, HALF: tl.constexpr):
    """Product of two fp32 tiles of A, Z, W: fp16 operands where the inputs are 16 bits wide, else tf32x3."""
    if HALF:
        return tl.dot(x.to(tl.float16), y.to(tl.float16), acc)
    else:
        return tl.dot(x, y, acc, input_precision="tf32x3")


@triton.jit
def attend_further(scores, values, maximum, total, acc, UPCAST: tl.constexpr):
    """One more tile of scores (base 2) and values in an online softmax: the new maximum, total and unnormalised sum."""
    larger = tl.maximum(maximum, tl.max(scores, 1))
    weight = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(maximum - larger)
    acc = dot_input(weight.to(values.dtype), values, acc * shrink[:, None], UPCAST)
    return larger, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def gather_rows(base, stride_n, index, head_size, BLOCK_D: tl.constexpr):
    """Rows `index` of one head, [len(index), BLOCK_D], zero beyond `head_size`."""
    column = tl.arange(0, BLOCK_D)
    pointer = base + index.to(tl.int64)[:, None] * stride_n + column[None, :]
    return tl.load(pointer, mask=(column < head_size)[None, :], other=0.0)


@triton.jit
def landmark_index(landmarks, row, count, tokens):
    """Clamped token index of each landmark in `row`; padding repeats a valid token."""
    index = tl.load(landmarks + row, mask=row < count, other=0)
    return tl.minimum(tl.maximum(index, 0), tokens - 1)


@triton.jit
def mask_flags(key_mask, wanted, index, inside):
    """1 for tokens `index` that are masked, 0 for the others and outside; 0 for all, unread, where `wanted` is false."""
    flags = tl.load(key_mask + index, mask=tl.where(inside, wanted, 0) != 0, other=0)
    return tl.where(flags != 0, 1.0, 0.0)


@triton.jit
def taken_off(key_mask, mask_mode, queries, keys, in_queries, in_keys):
    """What masking takes off the scores (base 2) of `queries` against `keys`: nothing, to the bit, where nothing is masked."""
    hidden = mask_flags(key_mask, mask_mode, keys, in_keys) * (MASKED * LOG2E)
    ordinary = 1.0 - mask_flags(key_mask, mask_mode // 2, queries, in_queries)
    return ordinary[:, None] * hidden[None, :]


@triton.jit
def deep_scores(query, key, row, column, in_rows, in_columns, stride_n, head_size,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """query[row] @ key[column]^T in fp32, read in steps of 32 channels: tf32x3 holds every operand twice."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, BLOCK_D, 32, num_stages=1):
        channel = start + tl.arange(0, 32)
        inside = (channel < head_size)[None, :]
        x = tl.load(query + row.to(tl.int64)[:, None] * stride_n + channel[None, :],
                    mask=in_rows[:, None] & inside, other=0.0)  # fmt: skip
        y = tl.load(key + column.to(tl.int64)[:, None] * stride_n + channel[None, :],
                    mask=in_columns[:, None] & inside, other=0.0)  # fmt: skip
        acc = tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), acc, input_precision="tf32x3")
    return acc


@triton.jit
def matrix_tile(matrix, row, column, S_PAD: tl.constexpr):
    """Pointers to the 64 x 64 tile of a scratch matrix that starts at (row, column)."""
    return matrix + (row + tl.arange(0, TILE))[:, None] * S_PAD + (column + tl.arange(0, TILE))[None, :]


@triton.jit
def matrix_product(left, right, row, column, S_PAD: tl.constexpr, HALF: tl.constexpr):
    """Tile (row, column) of the product of two scratch matrices."""
    depth: tl.constexpr = TILE if HALF else TILE // 2  # tf32x3 holds every operand twice
    acc = tl.zeros([TILE, TILE], tl.float32)
    i, j, inner = row + tl.arange(0, TILE), column + tl.arange(0, TILE), tl.arange(0, depth)
    for k in tl.range(0, S_PAD, depth, num_stages=1):
        x = tl.load(left + i[:, None] * S_PAD + (k + inner)[None, :])
        y = tl.load(right + (k + inner)[:, None] * S_PAD + j[None, :])
        acc = dot_matrix(x, y, acc, HALF)
    return acc


@triton.jit
def two_products(first, second, right, row, column, S_PAD: tl.constexpr):
    """Tiles (row, column) of the products of two fp16 scratch matrices with the same one, which is read once."""
    one = tl.zeros([TILE, TILE], tl.float32)
    other = tl.zeros([TILE, TILE], tl.float32)
    i, j, inner = row + tl.arange(0, TILE), column + tl.arange(0, TILE), tl.arange(0, TILE)
    for k in tl.range(0, S_PAD, TILE, num_stages=1):
        y = tl.load(right + (k + inner)[:, None] * S_PAD + j[None, :])
        one = tl.dot(tl.load(first + i[:, None] * S_PAD + (k + inner)[None, :]), y, one)
        other = tl.dot(tl.load(second + i[:, None] * S_PAD + (k + inner)[None, :]), y, other)
    return one, other


@triton.jit
def power_of_two(largest):
    """The power of two at or below each of some magnitudes: a unit that rounds nothing; 1 for what is next to nothing."""
    largest = tl.where(largest > SMALLEST, largest, 1.0)
    return (largest.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
