"""The Newton-Schulz iterates of A, on one head, and the last iteration applied to Bv."""

import triton
import triton.language as tl

from fna.plugins.kernels.core import (
    HALF_A,
    HALF_T,
    HALF_W,
    HALF_Y,
    HALF_Z,
    MATRIX_A,
    MATRIX_T,
    MATRIX_W,
    MATRIX_Y,
    MATRIX_Z,
)
from fna.plugins.kernels.tiles import TILE, matrix_product, matrix_tile, two_products


@triton.jit
def inverse_scale(colsum, apply, S_PAD: tl.constexpr):
    """1 / (largest column sum of A), which turns A^T into Z0; 1 when Z is past Z0 (`apply` false)."""
    column = tl.arange(0, S_PAD)
    total = tl.zeros([S_PAD], tl.float32)
    for tile in tl.static_range(S_PAD // TILE):
        total += tl.load(colsum + tile * S_PAD + column)
    return tl.where(apply, 1.0 / tl.max(total, 0), 1.0)


@triton.jit
def newton_tile(matrices, colsum, row, column, phase, first, last, S_PAD: tl.constexpr, HALF: tl.constexpr):
    """One tile of one of the three dependent products of an iteration.

    Z' = 1/4 Z (13 - 15 W + 7 W^2 - W^3) = 1/4 (13 Z - 15 Y + Y T), with W = A Z, Y = Z W and T = 7 W - W W:
    phase 0 forms W, phase 1 forms T and Y, phase 2 overwrites Z (each tile reads no other tile of Z). With 16-bit inputs what
    products take is kept as fp16, which they read as it is; Z and Y, which are added, in fp32 too, and the `last` W.
    """
    size = S_PAD * S_PAD
    z, w, a = matrices + MATRIX_Z * size, matrices + MATRIX_W * size, matrices + MATRIX_A * size
    t, y = matrices + MATRIX_T * size, matrices + MATRIX_Y * size
    z_sum, w_sum, y_sum = z, w, y
    if HALF:
        half = matrices.to(tl.pointer_type(tl.float16))
        y_sum = t
        z, w, a = half + HALF_Z * size, half + HALF_W * size, half + HALF_A * size
        t, y = half + HALF_T * size, half + HALF_Y * size
    scale = inverse_scale(colsum, first, S_PAD)
    if phase == 0:
        own = matrix_product(a, z, row, column, S_PAD, HALF) * scale
        tl.store(matrix_tile(w, row, column, S_PAD), own.to(w.dtype.element_ty))
        if HALF and last:
            tl.store(matrix_tile(w_sum, row, column, S_PAD), own)
    elif phase == 1:
        if HALF:
            squared, own = two_products(w, z, w, row, column, S_PAD)
            own *= scale
            squared = 7.0 * tl.load(matrix_tile(w, row, column, S_PAD)).to(tl.float32) - squared
            tl.store(matrix_tile(t, row, column, S_PAD), squared.to(tl.float16))
            tl.store(matrix_tile(y, row, column, S_PAD), own.to(tl.float16))
            tl.store(matrix_tile(y_sum, row, column, S_PAD), own)
        else:
            own = tl.load(matrix_tile(w, row, column, S_PAD))
            tl.store(matrix_tile(t, row, column, S_PAD), 7.0 * own - matrix_product(w, w, row, column, S_PAD, HALF))
            tl.store(matrix_tile(y, row, column, S_PAD), matrix_product(z, w, row, column, S_PAD, HALF) * scale)
    else:
        acc = matrix_product(y, t, row, column, S_PAD, HALF)
        acc += 13.0 * scale * tl.load(matrix_tile(z_sum, row, column, S_PAD))
        acc = 0.25 * (acc - 15.0 * tl.load(matrix_tile(y_sum, row, column, S_PAD)))
        tl.store(matrix_tile(z_sum, row, column, S_PAD), acc)
        if HALF:
            tl.store(matrix_tile(z, row, column, S_PAD), acc.to(tl.float16))


@triton.jit
def newton_registers(a, matrices, full_iterations, nothing, S_PAD: tl.constexpr):
    """All iterations but the last on one head's A, [64, 64], held in registers; writes Z and R = 1 - A Z as fp16.

    The last product is of the Z that is written, and of A to twice the precision of fp16: what R says of Z is what the last
    iteration mends, so R's error is the result's. `nothing` is a 0 that the compiler cannot know: addresses behind the loop are then
    formed there, rather than held through it where registers are short.
    """
    half = matrices.to(tl.pointer_type(tl.float16))
    slot = tl.arange(0, S_PAD)
    cell = slot[:, None] * S_PAD + slot[None, :]
    zero = tl.zeros([S_PAD, S_PAD], tl.float32)
    high = a.to(tl.float16)
    # Both halves of A lie in scratch, where Z and R go in the end: registers are short.
    tl.store(half + cell, high)
    tl.store(half + S_PAD * S_PAD + cell, (a - high.to(tl.float32)).to(tl.float16))
    z = tl.trans(a) / tl.max(tl.sum(a, 0), 0)
    tl.debug_barrier()
    for _ in tl.range(0, full_iterations, num_stages=1):
        w = tl.dot(tl.load(half + cell), z.to(tl.float16), zero).to(tl.float16)
        t = tl.dot(w, w, -7.0 * w.to(tl.float32)).to(tl.float16)
        y = tl.dot(z.to(tl.float16), w, zero)
        z = -0.25 * tl.dot(y.to(tl.float16), t, 15.0 * y - 13.0 * z)
    rounded = z.to(tl.float16)
    cell += nothing * S_PAD
    w = tl.dot(tl.load(half + cell), rounded, zero)
    tl.debug_barrier()
    w = tl.dot(tl.load(half + S_PAD * S_PAD + cell), rounded, w)
    tl.debug_barrier()
    tl.store(half + cell, rounded)
    identity = tl.where(slot[:, None] == slot[None, :], 1.0, 0.0)
    tl.store(half + S_PAD * S_PAD + cell, (identity - w).to(tl.float16))


@triton.jit
def newton_blocked(matrices, colsum, full_iterations, S_PAD: tl.constexpr, HALF: tl.constexpr):
    """All iterations but the last on one head by one program, tile after tile through scratch."""
    for step in tl.range(0, 3 * full_iterations + 1, num_stages=1):
        tl.debug_barrier()
        for row in tl.range(0, S_PAD, TILE, num_stages=1):
            for column in tl.range(0, S_PAD, TILE, num_stages=1):
                newton_tile(matrices, colsum, row, column, step % 3, step < 3, step == 3 * full_iterations, S_PAD, HALF)


@triton.jit
def apply_rows(matrix, source, row, column, padded_d, S_PAD: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `row` to `row + 64` of (scratch matrix @ scratch columns), [64, COLUMNS]."""
    acc = tl.zeros([TILE, COLUMNS], tl.float32)
    for k in tl.range(0, S_PAD, TILE, num_stages=1):
        x = tl.load(matrix_tile(matrix, row, k, S_PAD))
        y = tl.load(source + (k + tl.arange(0, TILE))[:, None] * padded_d + column[None, :])
        acc = tl.dot(x, y, acc, input_precision="tf32x3")
    return acc


@triton.jit
def last_iteration_in_registers(known, matrices, S_PAD: tl.constexpr, COLUMNS: tl.constexpr):
    """Z6 Bv of a whole head's rows, from Bv in units, both as columns [COLUMNS, S_PAD]: with R = 1 - A Z,
    Z6 = Z (1 + R (1 + R (1 + R / 4))), which cancels nothing.

    The step that Z is applied to is given to twice the precision of fp16.
    """
    slot = tl.arange(0, S_PAD)
    half = matrices.to(tl.pointer_type(tl.float16)) + slot[:, None] * S_PAD + slot[None, :]
    r, z = tl.trans(tl.load(half + S_PAD * S_PAD)), tl.trans(tl.load(half))
    step = tl.dot((0.25 * known).to(tl.float16), r, known)
    step = tl.dot(step.to(tl.float16), r, known)
    step = tl.dot(step.to(tl.float16), r, known)
    high = step.to(tl.float16)
    return tl.dot(
        (step - high.to(tl.float32)).to(tl.float16), z, tl.dot(high, z, tl.zeros([COLUMNS, S_PAD], tl.float32))
    )


@triton.jit
def last_iteration_through_scratch(exact, even, odd, matrices, z_scale, column, padded_d,
                                   S_PAD: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Write Z6 Bv to `odd`, tile after tile, and return the largest magnitude of each column."""
    size: tl.constexpr = S_PAD * S_PAD
    for step in tl.static_range(3):
        tl.debug_barrier()
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
            known = tl.load(exact + cell)
            if step == 0:
                acc = apply_rows(matrices + MATRIX_W * size, exact, first, column, padded_d, S_PAD, COLUMNS)
                tl.store(even + cell, 7.0 * known - acc)
            elif step == 1:
                acc = apply_rows(matrices + MATRIX_W * size, even, first, column, padded_d, S_PAD, COLUMNS)
                tl.store(odd + cell, 15.0 * known - acc)
            else:
                acc = apply_rows(matrices + MATRIX_W * size, odd, first, column, padded_d, S_PAD, COLUMNS)
                tl.store(even + cell, 13.0 * known - acc)
    tl.debug_barrier()
    largest = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, S_PAD, TILE, num_stages=1):
        cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
        acc = apply_rows(matrices + MATRIX_Z * size, even, first, column, padded_d, S_PAD, COLUMNS)
        acc *= 0.25 * z_scale
        tl.store(odd + cell, acc)
        largest = tl.maximum(largest, tl.max(tl.abs(acc), 0))
    tl.debug_barrier()
    return largest
