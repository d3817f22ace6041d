"""The cheaper core on one head: `fna.attention.chebyshev_core`, Chebyshev steps on the residual of the landmarks' values.

The landmark launch forms A and T = w A^T A beside the splits; the last step of Bv's launch, which knows Bv, does the rest. Columns
of the values do not depend on one another, so a head is shared by programs without a barrier between them.

Where inputs are 16 bits wide, A and T are kept in fp16 (both lie in 0..1) and each column is stepped in units of a power of two near
its largest value, so that nothing leaves the range of fp16 and nothing is rounded by the unit.
"""

import triton
import triton.language as tl

from fna.chebyshev import CHEBYSHEV_COLUMN_FLOOR
from fna.plugins.kernels.core import core_scores, softmax_rows
from fna.plugins.kernels.newton_schulz import apply_rows
from fna.plugins.kernels.tiles import TILE, dot_matrix, landmark_index, matrix_tile, power_of_two

FLOOR = tl.constexpr(CHEBYSHEV_COLUMN_FLOOR)
STEPS_AT_A_TIME = tl.constexpr(7)
"""All but the first of the 8 steps that are usual at 128 landmarks."""


@triton.jit
def row_weights(colsum, row, S_PAD: tl.constexpr):
    """W = 1 / max(column sum of A, floor) of the landmarks `row`, from the sums of every row tile of A."""
    total = tl.load(colsum + row)
    for tile in tl.static_range(1, S_PAD // TILE):
        total += tl.load(colsum + tile * S_PAD + row)
    return 1.0 / tl.maximum(total, FLOOR)


@triton.jit
def half_normal(query, key, stride_n, landmarks, bias, key_mask, mask_mode, matrices, colsum, tokens, count, head_size, scale,
                S_PAD: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Write A and -T as fp16, and w, by one program. -T, since every step takes T's product off the residual."""
    slot = tl.arange(0, S_PAD)
    a = matrices.to(tl.pointer_type(tl.float16))
    if BLOCK_D <= TILE:
        scores = core_scores(query, key, stride_n, landmarks, bias, key_mask, mask_mode, 0, 0, tokens, count, head_size, scale,
                             S_PAD, S_PAD, BLOCK_D, True, UPCAST)  # fmt: skip
        weight = softmax_rows(scores, 0, count, S_PAD)
        whole = weight.to(tl.float16)
        tl.store(a + slot[:, None] * S_PAD + slot[None, :], whole)
        mirrored = tl.trans(whole)
        normal = tl.dot(mirrored, whole, tl.zeros([S_PAD, S_PAD], tl.float32))
        # By the tensor cores: as a sum over registers it would go through shared memory, and back for the rows of T.
        sums = tl.max(tl.dot(mirrored, tl.full([S_PAD, 16], 1.0, tl.float16)), 1)
        tl.store(colsum + slot, sums)
        normal *= (-1.0 / tl.maximum(sums, FLOOR))[:, None]
        tl.store(a + (S_PAD + slot[:, None]) * S_PAD + slot[None, :], normal.to(tl.float16))
    else:
        # Beside wider heads, registers hold 64 rows at a time.
        sums = tl.zeros([S_PAD], tl.float32)
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            row = first + tl.arange(0, TILE)
            scores = core_scores(query, key, stride_n, landmarks, bias, key_mask, mask_mode, first, 0, tokens, count, head_size,
                                 scale, TILE, S_PAD, BLOCK_D, True, UPCAST)  # fmt: skip
            weight = softmax_rows(scores, first, count, TILE)
            tl.store(a + row[:, None] * S_PAD + slot[None, :], weight.to(tl.float16))
            sums += tl.sum(weight, 0)
        tl.store(colsum + slot, sums)
        tl.debug_barrier()
        whole = tl.load(a + slot[:, None] * S_PAD + slot[None, :])
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            row = first + tl.arange(0, TILE)
            columns = tl.load(a + slot[:, None] * S_PAD + row[None, :])
            normal = tl.dot(tl.trans(columns), whole, tl.zeros([TILE, S_PAD], tl.float32))
            normal *= (-1.0 / tl.maximum(tl.load(colsum + row), FLOOR))[:, None]
            tl.store(a + (S_PAD + row[:, None]) * S_PAD + slot[None, :], normal.to(tl.float16))


@triton.jit
def normal_tile(matrices, colsum, row, column, S_PAD: tl.constexpr, HALF: tl.constexpr):
    """Write the tile (row, column) of T, from A in scratch."""
    depth: tl.constexpr = TILE if HALF else TILE // 2  # tf32x3 holds every operand twice
    acc = tl.zeros([TILE, TILE], tl.float32)
    i, j, inner = row + tl.arange(0, TILE), column + tl.arange(0, TILE), tl.arange(0, depth)
    for k in tl.range(0, S_PAD, depth, num_stages=1):
        x = tl.load(matrices + (k + inner)[:, None] * S_PAD + i[None, :])
        y = tl.load(matrices + (k + inner)[:, None] * S_PAD + j[None, :])
        acc = dot_matrix(tl.trans(x), y, acc, HALF)
    normal = acc * row_weights(colsum, i, S_PAD)[:, None]
    tl.store(matrix_tile(matrices + S_PAD * S_PAD, row, column, S_PAD), normal)


@triton.jit
def normal_blocked(matrices, colsum, S_PAD: tl.constexpr, HALF: tl.constexpr):
    """Write T by one program, tile after tile."""
    tl.debug_barrier()
    for row in tl.range(0, S_PAD, TILE, num_stages=1):
        for column in tl.range(0, S_PAD, TILE, num_stages=1):
            normal_tile(matrices, colsum, row, column, S_PAD, HALF)


@triton.jit
def landmark_values(value, stride_n, landmarks, row, column, tokens, count, head_size):
    """Vp: the values at landmarks `row`, fp32, zero beyond `count` and `head_size`."""
    index = landmark_index(landmarks, row, count, tokens)
    inside = (row < count)[:, None] & (column < head_size)[None, :]
    pointer = value + index.to(tl.int64)[:, None] * stride_n + column[None, :]
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def landmark_columns(value, stride_n, landmarks, row, column, tokens, count, head_size):
    """Vp as columns, [len(column), len(row)]."""
    index = landmark_index(landmarks, row, count, tokens)
    inside = (row < count)[None, :] & (column < head_size)[:, None]
    pointer = value + index.to(tl.int64)[None, :] * stride_n + column[:, None]
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def chebyshev_in_registers(known, own, matrices, colsum, row, count, steps, middle, ratio, half_width,
                           S_PAD: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """(mean and correction of the values `own` in units, the unit of each column): M = own + unit * correction; all [COLUMNS, S_PAD].

    The first residual is w A^T (known - A own - mean), of which w A^T A own is T own: A is read one way round only. What it takes
    off from each other is as large as the values, so both are less a constant first, to which it is blind: the rows of A sum to one.
    """
    sums = tl.load(colsum + row)
    # So the mean needs no product either. No sum here is of products: lanes that hold it twice would contract it differently.
    mean = tl.sum(known - sums[None, :] * own, 1) / count
    inside = (row < count)[None, :]
    highest = tl.max(tl.where(inside, tl.maximum(known, own), float("-inf")), 1)
    lowest = tl.min(tl.where(inside, tl.minimum(known, own), float("inf")), 1)
    centre = 0.5 * highest + 0.5 * lowest
    unit = power_of_two(0.5 * highest - 0.5 * lowest)
    known = tl.where(inside, known - centre[:, None], 0.0) * (1.0 / unit)[:, None]
    own = tl.where(inside, own - centre[:, None], 0.0) * (1.0 / unit)[:, None]
    mean *= 1.0 / unit
    slot = tl.arange(0, S_PAD)
    cell = matrices.to(tl.pointer_type(tl.float16)) + slot[:, None] * S_PAD + slot[None, :]
    residual = (
        tl.dot(known.to(tl.float16), tl.load(cell), tl.zeros([COLUMNS, S_PAD], tl.float32))
        - mean[:, None] * sums[None, :]
    )
    minus_normal = tl.trans(tl.load(cell + S_PAD * S_PAD))
    residual = tl.dot(own.to(tl.float16), minus_normal, residual * (1.0 / tl.maximum(sums, FLOOR))[None, :])
    step = residual * (1.0 / middle)
    total = step
    rho = 1.0 / ratio
    # Steps at a time share -T in registers; with one use in the loop it would be read from shared memory anew for each.
    for _ in tl.range(1, steps, num_stages=1, loop_unroll_factor=STEPS_AT_A_TIME):
        residual = tl.dot(step.to(tl.float16), minus_normal, residual)
        following = 1.0 / (2.0 * ratio - rho)
        step = (following * rho) * step + (2.0 * following / half_width) * residual
        total += step
        rho = following
    return total + mean[:, None], unit


@triton.jit
def chebyshev_through_scratch(value, stride_n, landmarks, exact, between, matrices, colsum, column, tokens, count, head_size,
                              padded_d, steps, middle, ratio, half_width,
                              S_PAD: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Write M to the first part of `between`, tile after tile, and return the largest magnitude of each column."""
    residual, step = between, between + S_PAD * padded_d
    total = step + S_PAD * padded_d
    normal = matrices + S_PAD * S_PAD
    sums = tl.zeros([COLUMNS], tl.float32)
    tl.debug_barrier()
    for first in tl.range(0, S_PAD, TILE, num_stages=1):
        row = first + tl.arange(0, TILE)
        cell = row[:, None] * padded_d + column[None, :]
        acc = tl.zeros([TILE, COLUMNS], tl.float32)
        for k in tl.range(0, S_PAD, TILE, num_stages=1):
            x = tl.load(matrix_tile(matrices, first, k, S_PAD))
            y = landmark_values(value, stride_n, landmarks, k + tl.arange(0, TILE), column, tokens, count, head_size)
            acc = tl.dot(x, y, acc, input_precision="tf32x3")
        left = tl.load(exact + cell) - acc
        tl.store(step + cell, left)
        sums += tl.sum(left, 0)
    mean = sums / count
    tl.debug_barrier()
    for first in tl.range(0, S_PAD, TILE, num_stages=1):
        row = first + tl.arange(0, TILE)
        cell = row[:, None] * padded_d + column[None, :]
        acc = tl.zeros([TILE, COLUMNS], tl.float32)
        for k in tl.range(0, S_PAD, TILE, num_stages=1):
            inner = k + tl.arange(0, TILE)
            x = tl.load(matrix_tile(matrices, k, first, S_PAD))
            y = tl.load(step + inner[:, None] * padded_d + column[None, :])
            y = tl.where((inner < count)[:, None], y - mean[None, :], 0.0)
            acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
        left = acc * row_weights(colsum, row, S_PAD)[:, None]
        tl.store(residual + cell, left)
        tl.store(total + cell, left / middle)
    tl.debug_barrier()
    for first in tl.range(0, S_PAD, TILE, num_stages=1):
        cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
        tl.store(step + cell, tl.load(total + cell))
    rho = 1.0 / ratio
    for _ in tl.range(1, steps, num_stages=1):
        following = 1.0 / (2.0 * ratio - rho)
        tl.debug_barrier()
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
            acc = apply_rows(normal, step, first, column, padded_d, S_PAD, COLUMNS)
            tl.store(residual + cell, tl.load(residual + cell) - acc)
        tl.debug_barrier()
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
            moved = (following * rho) * tl.load(step + cell) + (2.0 * following / half_width) * tl.load(residual + cell)
            tl.store(step + cell, moved)
            tl.store(total + cell, tl.load(total + cell) + moved)
        rho = following
    tl.debug_barrier()
    largest = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, S_PAD, TILE, num_stages=1):
        row = first + tl.arange(0, TILE)
        cell = row[:, None] * padded_d + column[None, :]
        own = landmark_values(value, stride_n, landmarks, row, column, tokens, count, head_size)
        result = tl.where((row < count)[:, None], own + mean[None, :] + tl.load(total + cell), 0.0)
        tl.store(residual + cell, result)
        largest = tl.maximum(largest, tl.max(tl.abs(result), 0))
    tl.debug_barrier()
    return largest
