"""Triton kernels of `FastNystromAttention`. Launches: `landmark` (once, or once a step at S > 128), `finish`, `output`.

Names follow docs/design.md: A (`core`) is the softmax among landmarks, Z the Newton-Schulz iterate, W = A Z, and Bv the exact
attention output of the landmark tokens. M is what takes the place of Z Bv: the core is Newton-Schulz, or with `_chebyshev` in a
launch's name `fna.plugins.kernels.chebyshev`. All scratch is fp32 except `mixed`, the values of the last product, which has the
type of the inputs, and Chebyshev's matrices. Everything is padded inside: S to S_PAD (64, 128 or 256), D to BLOCK_D (64 or 128);
padded rows and columns of A are zero, which keeps those of every product zero.

Masked keys (`key_mask`, int32 [B or 1, N], with `mask_mode`: 0 none and the pointer is not read, 1 for all queries, 2 for queries
that are not masked themselves) have MASKED taken off their scores, as in `fna.special_tokens`: finite, so that no row is empty.

Landmark indices are clamped to the tokens that exist, so wrong indices give wrong rows but never a wild access.

Scratch, per head (`bh` = batch item * heads + head):
    partial   [bh, splits, S_PAD, BLOCK_D]    unnormalised sums of exp(score) * value over one stretch of keys
    stats     [bh, splits, 2, S_PAD]          the running maximum (base 2) and the sum of exponentials of that stretch
    matrices  Newton-Schulz: [bh, 5, S_PAD, S_PAD], Z, W, A, T = 7 W - W W, Y = Z W, with 16-bit inputs as `core.py` lays them out;
              where they fit registers [bh, 4, S_PAD, S_PAD] as fp16, of which Z and R = 1 - A Z.
              Chebyshev: [bh, 2, S_PAD, S_PAD], A and T = w A^T A, as fp16 where they fit registers
    colsum    [bh, S_PAD / 64, S_PAD]         column sums of A by row tile (of all rows for Chebyshev in registers)
    between   [bh, 2 or 3, S_PAD, BLOCK_D]    between the products of the last launch (where they do not fit registers)
    exact     [bh, S_PAD, BLOCK_D]            Bv
    mixed     [bh, S_PAD, BLOCK_D]            M (Z6 Bv) / mixed_scale, in the type of the inputs
    mixed_scale [bh, BLOCK_D]                 largest magnitude of each column of M, so that fp16 cannot overflow
"""

import triton
import triton.language as tl

from fna.plugins.kernels.chebyshev import (
    chebyshev_in_registers,
    chebyshev_through_scratch,
    half_normal,
    landmark_columns,
    normal_blocked,
    normal_tile,
)
from fna.plugins.kernels.core import core_scores, core_to_scratch, softmax_rows
from fna.plugins.kernels.newton_schulz import (
    inverse_scale,
    last_iteration_in_registers,
    last_iteration_through_scratch,
    newton_blocked,
    newton_registers,
    newton_tile,
)
from fna.plugins.kernels.tiles import (
    LOG2E,
    MASKED,
    TILE,
    attend_further,
    deep_scores,
    dot_input,
    gather_rows,
    landmark_index,
    mask_flags,
    power_of_two,
)

JOINED = tl.constexpr(4)
"""Splits of Bv whose sums are read at a time."""

# Numbers that are never compiled in, so that PyTorch's just-in-time path has as few forms as the ahead-of-time build.
_SIZES = ["heads", "tokens", "count", "landmark_stride", "bias_stride", "mask_stride", "mask_mode"]
_PLAIN = [*_SIZES, "splits", "split_tokens", "first_job", "step", "full_iterations"]
_PLAIN_FINISH = ["splits", "count", "one_iteration"]
_PLAIN_CHEBYSHEV = ["heads", "tokens", "count", "landmark_stride", "splits", "steps"]
_PLAIN_OUTPUT = [*_SIZES, "tiles", "exact_rows"]


@triton.jit
def _exact_split(query, key, value, stride_n, landmarks, key_mask, mask_mode, partial, stats, split, first,
                 split_tokens, tokens, count, head_size, scale,
                 S_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 UPCAST: tl.constexpr):  # fmt: skip
    """Attention of landmark queries `first` to `first + BLOCK_S` over one stretch of keys, online softmax."""
    row = first + tl.arange(0, BLOCK_S)
    column = tl.arange(0, BLOCK_D)
    in_head = column < head_size
    index = landmark_index(landmarks, row, count, tokens)
    if query.dtype.element_ty != tl.float32:
        queries = gather_rows(query, stride_n, index, head_size, BLOCK_D)

    ordinary = 1.0 - mask_flags(key_mask, mask_mode // 2, index, row < count)

    maximum = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    low = split * split_tokens
    high = tl.minimum(low + split_tokens, tokens)
    whole = low
    if query.dtype.element_ty != tl.float32:
        # Whole blocks of keys, none of them masked, need no test. That the queries serve two loops keeps them in registers.
        whole += tl.where(mask_mode == 0, (high - low) // BLOCK_N * BLOCK_N, 0)
        for start in tl.range(low, whole, BLOCK_N):
            offset = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * stride_n + column[None, :]
            keys = tl.load(key + offset, mask=in_head[None, :], other=0.0)
            scores = dot_input(queries, tl.trans(keys), tl.zeros([BLOCK_S, BLOCK_N], tl.float32), UPCAST)
            values = tl.load(value + offset, mask=in_head[None, :], other=0.0)
            maximum, total, acc = attend_further(scores * (scale * LOG2E), values, maximum, total, acc, UPCAST)
    for start in tl.range(whole, high, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        mask = (token < high)[:, None] & in_head[None, :]
        offset = token.to(tl.int64)[:, None] * stride_n + column[None, :]
        if query.dtype.element_ty == tl.float32:
            scores = deep_scores(query, key, index, token, row < count, token < high, stride_n, head_size,
                                  BLOCK_S, BLOCK_N, BLOCK_D)  # fmt: skip
        else:
            keys = tl.load(key + offset, mask=mask, other=0.0)
            scores = dot_input(queries, tl.trans(keys), tl.zeros([BLOCK_S, BLOCK_N], tl.float32), UPCAST)
        values = tl.load(value + offset, mask=mask, other=0.0)
        hidden = mask_flags(key_mask, mask_mode, token, token < high) * (MASKED * LOG2E)
        scores = scores * (scale * LOG2E) - ordinary[:, None] * hidden[None, :]
        scores = tl.where((token < high)[None, :], scores, float("-inf"))
        maximum, total, acc = attend_further(scores, values, maximum, total, acc, UPCAST)

    tl.store(partial + (split * S_PAD + row)[:, None] * BLOCK_D + column[None, :], acc)
    tl.store(stats + split * 2 * S_PAD + row, maximum)
    tl.store(stats + (split * 2 + 1) * S_PAD + row, total)


@triton.jit(do_not_specialize=_PLAIN)
def landmark_kernel(
    query, key, value, landmarks, bias, key_mask, partial, stats, matrices, colsum,
    heads, tokens, count, head_size, stride_b, stride_h, stride_n, landmark_stride, bias_stride, mask_stride, mask_mode,
    splits, split_tokens, first_job, step, full_iterations, scale,
    S_PAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MATRICES: tl.constexpr,
    IN_REGISTERS: tl.constexpr, CHEBYSHEV: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A with Newton-Schulz, or A with T for Chebyshev, and at the same time the split-K part of Bv: one heterogeneous grid.

    Grid: (B * H, C + a number of split jobs), of splits * S_PAD / BLOCK_S jobs in all. Programs with y < C are the long ones, so
    they are numbered first: up to S_PAD = 128 one program per head (C = 1) forms A and iterates, beside all of the split jobs.
    At 256 the launch is repeated for each dependent product, which the stream orders, with a share of the split jobs (from
    `first_job` on) beside each: step 0 writes A, a row tile a program (C = 4), every later one a product, a tile a program (C = 16).
    """
    tiles: tl.constexpr = S_PAD // TILE
    core_programs = 1
    if S_PAD > 2 * TILE:
        core_programs = tl.where(step == 0, tiles, tiles * tiles)
    bh = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    value += head
    landmarks += item * landmark_stride
    bias += item * bias_stride
    key_mask += item * mask_stride
    matrices += bh * MATRICES * S_PAD * S_PAD
    colsum += bh * (S_PAD // TILE) * S_PAD
    if job < core_programs:
        if IN_REGISTERS and CHEBYSHEV:
            half_normal(query, key, stride_n, landmarks, bias, key_mask, mask_mode, matrices, colsum, tokens, count, head_size, scale,
                        S_PAD, BLOCK_D, UPCAST)  # fmt: skip
        elif IN_REGISTERS:
            scores = core_scores(query, key, stride_n, landmarks, bias, key_mask, mask_mode, 0, 0, tokens, count, head_size, scale,
                                 S_PAD, S_PAD, BLOCK_D, False, UPCAST)  # fmt: skip
            a = softmax_rows(scores, 0, count, S_PAD)
            newton_registers(a, matrices, full_iterations, step, S_PAD)
        elif S_PAD <= 2 * TILE:
            for row in tl.range(0, S_PAD, TILE, num_stages=1):
                core_to_scratch(query, key, stride_n, landmarks, bias, key_mask, mask_mode, matrices, colsum, row,
                                tokens, count, head_size, scale, S_PAD, BLOCK_D, CHEBYSHEV, HALF, UPCAST)  # fmt: skip
            if CHEBYSHEV:
                normal_blocked(matrices, colsum, S_PAD, HALF)
            else:
                newton_blocked(matrices, colsum, full_iterations, S_PAD, HALF)
        elif step == 0:
            core_to_scratch(query, key, stride_n, landmarks, bias, key_mask, mask_mode, matrices, colsum, job * TILE,
                            tokens, count, head_size, scale, S_PAD, BLOCK_D, CHEBYSHEV, HALF, UPCAST)  # fmt: skip
        elif CHEBYSHEV:
            normal_tile(matrices, colsum, (job // tiles) * TILE, (job % tiles) * TILE, S_PAD, HALF)
        else:
            newton_tile(matrices, colsum, (job // tiles) * TILE, (job % tiles) * TILE, (step - 1) % 3, step <= 3,
                        step > 3 * full_iterations, S_PAD, HALF)  # fmt: skip
    else:
        row_tiles: tl.constexpr = S_PAD // BLOCK_S
        job += first_job - core_programs
        split = job // row_tiles
        first = (job % row_tiles) * BLOCK_S
        partial += bh * splits * S_PAD * BLOCK_D
        stats += bh * splits * 2 * S_PAD
        _exact_split(query, key, value, stride_n, landmarks, key_mask, mask_mode, partial, stats, split, first,
                     split_tokens, tokens, count, head_size, scale,
                     S_PAD, BLOCK_S, BLOCK_N, BLOCK_D, UPCAST)  # fmt: skip


@triton.jit
def _combine_splits(partial, stats, splits, row, column, padded_d, count, S_PAD: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Join the splits of Bv for some rows and columns, as columns [COLUMNS, ROWS]; rows of padding are zero.

    The maximum of all splits comes first: then no split's sums wait for another's, and JOINED of them are on their way at a time.
    """
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    for first in tl.range(0, splits, JOINED, num_stages=1):
        for place in tl.static_range(JOINED):
            there = row < tl.where(first + place < splits, S_PAD, 0)
            maximum = tl.maximum(
                maximum, tl.load(stats + (first + place) * 2 * S_PAD + row, mask=there, other=float("-inf"))
            )
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for first in tl.range(0, splits, JOINED, num_stages=1):
        for place in tl.static_range(JOINED):
            split = first + place
            there = row < tl.where(split < splits, S_PAD, 0)
            # As three dimensions: two-dimensional fp32 is read in vectors as long as those of 16 bits beside it, half a sector a time.
            part = partial + ((split * S_PAD + row)[None, :] * padded_d + column[:, None])[None, :, :]
            shrink = tl.exp2(tl.load(stats + split * 2 * S_PAD + row, mask=there, other=float("-inf")) - maximum)
            total += tl.load(stats + (split * 2 + 1) * S_PAD + row, mask=there, other=0.0) * shrink
            acc += tl.sum(tl.load(part, mask=there[None, None, :], other=0.0), 0) * shrink[None, :]
    return acc * tl.where(row < count, 1.0 / total, 0.0)[None, :]


@triton.jit(do_not_specialize=_PLAIN_FINISH)
def finish_kernel(
    partial, stats, matrices, colsum, exact, mixed, mixed_scale, between,
    splits, count, padded_d, one_iteration,
    S_PAD: tl.constexpr, COLUMNS: tl.constexpr, MATRICES: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Join the splits into Bv, and apply the last iteration to it: Z6 Bv = 1/4 Z5 (13 Bv - W (15 Bv - W (7 Bv - W Bv))).

    Grid: (B * H, BLOCK_D / COLUMNS): columns of Bv do not depend on one another. Through scratch in fp32 with tf32x3 products for
    every input type: 13 Bv + ... can pass the range of fp16. In registers in fp16, of R = 1 - W and of Bv in units of a power of two.
    The result is divided by the largest magnitude of its column.
    """
    bh = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial += bh * splits * S_PAD * padded_d
    stats += bh * splits * 2 * S_PAD
    matrices += bh * MATRICES * S_PAD * S_PAD
    exact += bh * S_PAD * padded_d
    mixed += bh * S_PAD * padded_d
    if IN_REGISTERS:
        row = tl.arange(0, S_PAD)
        cell = row[None, :] * padded_d + column[:, None]
        known = _combine_splits(partial, stats, splits, row, column, padded_d, count, S_PAD, S_PAD, COLUMNS)
        tl.store(exact + cell, known)
        unit = power_of_two(tl.max(tl.abs(known), 1))
        result = last_iteration_in_registers(known * (1.0 / unit)[:, None], matrices, S_PAD, COLUMNS)
        largest = tl.max(tl.abs(result), 1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        tl.store(mixed + cell, (result * (1.0 / largest)[:, None]).to(mixed.dtype.element_ty))
        tl.store(mixed_scale + bh * padded_d + column, largest * unit)
    else:
        between += bh * 2 * S_PAD * padded_d
        even, odd = between, between + S_PAD * padded_d
        z_scale = inverse_scale(colsum + bh * (S_PAD // TILE) * S_PAD, one_iteration != 0, S_PAD)
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            row = first + tl.arange(0, TILE)
            known = _combine_splits(partial, stats, splits, row, column, padded_d, count, S_PAD, TILE, COLUMNS)
            tl.store(exact + row[None, :] * padded_d + column[:, None], known)
        largest = last_iteration_through_scratch(exact, even, odd, matrices, z_scale, column, padded_d, S_PAD, COLUMNS)
        largest = tl.where(largest > 0.0, largest, 1.0)
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
            tl.store(mixed + cell, (tl.load(odd + cell) / largest[None, :]).to(mixed.dtype.element_ty))
        tl.store(mixed_scale + bh * padded_d + column, largest)


@triton.jit(do_not_specialize=_PLAIN_CHEBYSHEV)
def finish_chebyshev_kernel(
    partial, stats, matrices, colsum, exact, mixed, mixed_scale, between, value, landmarks,
    heads, tokens, count, head_size, padded_d, stride_b, stride_h, stride_n, landmark_stride,
    splits, steps, middle, ratio, half_width,
    S_PAD: tl.constexpr, COLUMNS: tl.constexpr, MATRICES: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Join the splits into Bv, and step towards the values that A turns into it: `fna.attention.chebyshev_core`.

    Grid: (B * H, BLOCK_D / COLUMNS): columns of the values do not depend on one another. The spectrum [low, high] of the steps
    is given by its middle, half its width, and their ratio.
    """
    bh = tl.program_id(0).to(tl.int64)
    item = bh // heads
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value += item * stride_b + (bh % heads) * stride_h
    landmarks += item * landmark_stride
    partial += bh * splits * S_PAD * padded_d
    stats += bh * splits * 2 * S_PAD
    matrices += bh * MATRICES * S_PAD * S_PAD
    colsum += bh * (S_PAD // TILE) * S_PAD
    exact += bh * S_PAD * padded_d
    mixed += bh * S_PAD * padded_d
    if IN_REGISTERS:
        row = tl.arange(0, S_PAD)
        cell = row[None, :] * padded_d + column[:, None]
        known = _combine_splits(partial, stats, splits, row, column, padded_d, count, S_PAD, S_PAD, COLUMNS)
        tl.store(exact + cell, known)
        own = landmark_columns(value, stride_n, landmarks, row, column, tokens, count, head_size)
        correction, unit = chebyshev_in_registers(known, own, matrices, colsum, row, count, steps, middle, ratio, half_width,
                                                  S_PAD, COLUMNS)  # fmt: skip
        result = tl.where((row < count)[None, :], own + unit[:, None] * correction, 0.0)
        largest = tl.max(tl.abs(result), 1)
        largest = tl.where(largest > 0.0, largest, 1.0)
        tl.store(mixed + cell, (result * (1.0 / largest)[:, None]).to(mixed.dtype.element_ty))
        tl.store(mixed_scale + bh * padded_d + column, largest)
    else:
        between += bh * 3 * S_PAD * padded_d
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            row = first + tl.arange(0, TILE)
            known = _combine_splits(partial, stats, splits, row, column, padded_d, count, S_PAD, TILE, COLUMNS)
            tl.store(exact + row[None, :] * padded_d + column[:, None], known)
        largest = chebyshev_through_scratch(value, stride_n, landmarks, exact, between, matrices, colsum, column, tokens, count,
                                            head_size, padded_d, steps, middle, ratio, half_width, S_PAD, COLUMNS)  # fmt: skip
        largest = tl.where(largest > 0.0, largest, 1.0)
        for first in tl.range(0, S_PAD, TILE, num_stages=1):
            cell = (first + tl.arange(0, TILE))[:, None] * padded_d + column[None, :]
            tl.store(mixed + cell, (tl.load(between + cell) / largest[None, :]).to(mixed.dtype.element_ty))
        tl.store(mixed_scale + bh * padded_d + column, largest)


@triton.jit
def _landmark_keys(key, stride_n, landmarks, first, tokens, count, head_size,
                   TILE_S: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """kp^T of a tile of landmarks, [BLOCK_D, TILE_S]."""
    index = landmark_index(landmarks, first + tl.arange(0, TILE_S), count, tokens)
    return tl.trans(gather_rows(key, stride_n, index, head_size, BLOCK_D))


@triton.jit
def _landmark_mixed(mixed, first, TILE_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of M, [TILE_S, BLOCK_D]."""
    return tl.load(mixed + (first + tl.arange(0, TILE_S))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def _landmark_offset(
    bias, landmarks, key_mask, hides, first, tokens, count, TILE_S: tl.constexpr, BRANCH: tl.constexpr
):
    """The bias (base 2, -inf on padding, less where `hides`) of a tile of landmarks. BRANCH: as of `core_scores`."""
    slot = first + tl.arange(0, TILE_S)
    if BRANCH:
        offset = tl.load(bias + slot, mask=slot < count, other=float("-inf")) * LOG2E
        if hides != 0:
            index = landmark_index(landmarks, slot, count, tokens)
            offset -= mask_flags(key_mask, hides, index, slot < count) * (MASKED * LOG2E)
        return offset
    else:
        offset = tl.load(bias + slot, mask=slot < count, other=0.0) * LOG2E
        index = landmark_index(landmarks, slot, count, tokens)
        offset -= mask_flags(key_mask, hides, index, slot < count) * (MASKED * LOG2E)
        return tl.where(slot < count, offset, float("-inf"))


@triton.jit
def _output_from_registers(query, keys, values, landmarks, bias, key_mask, mixed_scale, out, tokens, count, head_size,
                           stride_n, out_n, mask_mode, low, high, scale, TILE_S: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Tiles of queries from `low` to `high` over one tile of landmarks, whose keys and values stay in registers."""
    column = tl.arange(0, BLOCK_D)
    in_head = column < head_size
    offset = _landmark_offset(bias, landmarks, key_mask, mask_mode % 2, 0, tokens, count, TILE_S, True)
    scale_of_column = tl.load(mixed_scale + column)
    start = low
    # Into a loop with `for`, Triton moves what turns keys and values into operands: they would be read for every tile again.
    while start < high:
        token = start + tl.arange(0, BLOCK_M)
        inside = (token < tokens)[:, None] & in_head[None, :]
        queries = tl.load(query + token.to(tl.int64)[:, None] * stride_n + column[None, :], mask=inside, other=0.0)
        scores = dot_input(queries, keys, tl.zeros([BLOCK_M, TILE_S], tl.float32), UPCAST)
        scores = scores * (scale * LOG2E) + offset[None, :]
        weight = tl.exp2(scores - tl.max(scores, 1)[:, None])
        acc = dot_input(weight.to(values.dtype), values, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), UPCAST)
        _store_output(acc / tl.sum(weight, 1)[:, None] * scale_of_column[None, :], out, token, tokens, out_n, key_mask, mask_mode,
                      in_head, BLOCK_D)  # fmt: skip
        start += BLOCK_M


@triton.jit
def _store_output(rows, out, token, tokens, out_n, key_mask, mask_mode, in_head, BLOCK_D: tl.constexpr):
    """Write the rows of some tokens: all that exist, or those of masked tokens alone (`mask_mode` 2)."""
    pointer = out + token.to(tl.int64)[:, None] * out_n + tl.arange(0, BLOCK_D)[None, :]
    written = (token < tokens) & (mask_flags(key_mask, mask_mode // 2, token, token < tokens) == mask_mode // 2)
    tl.store(pointer, rows.to(out.dtype.element_ty), mask=written[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=_PLAIN_OUTPUT)
def output_kernel(
    query, key, landmarks, bias, key_mask, exact, mixed, mixed_scale, out,
    heads, tokens, count, head_size, stride_b, stride_h, stride_n, out_b, out_h, out_n,
    landmark_stride, bias_stride, mask_stride, mask_mode, tiles, exact_rows, scale,
    S_PAD: tl.constexpr, TILE_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """softmax(scale * query @ kp^T + bias) @ (Z6 Bv), and Bv over the rows of the landmarks.

    Grid: (ceil(N / (BLOCK_M * tiles)), B * H); a program takes `tiles` tiles of BLOCK_M queries. kp and vp stay on chip across them
    where HELD, one tile of landmarks or two. The exact rows of its own queries are written after a barrier, so they follow its own
    approximate rows; no other program touches them.

    Here `mask_mode` is 0, 1 (masked keys are hidden from all queries), or 2: nothing is hidden, and only the rows of masked
    queries are written. Sinks are a launch of 1 and then one of 2, which keeps a second vector of offsets out of registers.
    """
    bh = tl.program_id(1).to(tl.int64)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    out += item * out_b + (bh % heads) * out_h
    landmarks += item * landmark_stride
    bias += item * bias_stride
    key_mask += item * mask_stride
    exact += bh * S_PAD * BLOCK_D
    mixed += bh * S_PAD * BLOCK_D
    column = tl.arange(0, BLOCK_D)
    in_head = column < head_size
    hides = mask_mode % 2
    if HELD:
        keys = _landmark_keys(key, stride_n, landmarks, 0, tokens, count, head_size, TILE_S, BLOCK_D)
        values = _landmark_mixed(mixed, 0, TILE_S, BLOCK_D)
        if S_PAD > TILE_S:
            more_keys = _landmark_keys(key, stride_n, landmarks, TILE_S, tokens, count, head_size, TILE_S, BLOCK_D)
            more_values = _landmark_mixed(mixed, TILE_S, TILE_S, BLOCK_D)
    low = tl.program_id(0) * tiles * BLOCK_M
    high = tl.minimum(low + tiles * BLOCK_M, tokens)
    if HELD and S_PAD == TILE_S and BLOCK_D == TILE:
        _output_from_registers(query, keys, values, landmarks, bias, key_mask, mixed_scale + bh * BLOCK_D, out, tokens, count,
                               head_size, stride_n, out_n, mask_mode, low, high, scale, TILE_S, BLOCK_M, BLOCK_D, UPCAST)  # fmt: skip
    else:
        for start in tl.range(low, high, BLOCK_M):
            token = start + tl.arange(0, BLOCK_M)
            mask = (token < tokens)[:, None] & in_head[None, :]
            own = query + token.to(tl.int64)[:, None] * stride_n + column[None, :]
            maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            if HELD:
                queries = tl.load(own, mask=mask, other=0.0)
                scores = dot_input(queries, keys, tl.zeros([BLOCK_M, TILE_S], tl.float32), UPCAST)
                # Offsets are read for every tile of queries: held, they would take as many registers as a tile's weights.
                offset = _landmark_offset(bias, landmarks, key_mask, hides, 0, tokens, count, TILE_S, BLOCK_D == TILE)
                scores = scores * (scale * LOG2E) + offset[None, :]
                maximum = tl.max(scores, 1)
                weight = tl.exp2(scores - maximum[:, None])
                total = tl.sum(weight, 1)
                acc = dot_input(weight.to(values.dtype), values, acc, UPCAST)
                if S_PAD > TILE_S:
                    scores = dot_input(queries, more_keys, tl.zeros([BLOCK_M, TILE_S], tl.float32), UPCAST)
                    more_offset = _landmark_offset(
                        bias, landmarks, key_mask, hides, TILE_S, tokens, count, TILE_S, BLOCK_D == TILE
                    )
                    scores = scores * (scale * LOG2E) + more_offset[None, :]
                    maximum, total, acc = attend_further(scores, more_values, maximum, total, acc, UPCAST)
            else:
                # Every tile has a landmark, so the maximum is finite from the first on.
                for first in tl.range(0, count, TILE_S, num_stages=1):
                    if query.dtype.element_ty == tl.float32:
                        slot = first + tl.arange(0, TILE_S)
                        index = landmark_index(landmarks, slot, count, tokens)
                        scores = deep_scores(query, key, token, index, token < tokens, slot < count, stride_n, head_size,
                                              BLOCK_M, TILE_S, BLOCK_D)  # fmt: skip
                    else:
                        keys = _landmark_keys(
                            key, stride_n, landmarks, first, tokens, count, head_size, TILE_S, BLOCK_D
                        )
                        queries = tl.load(own, mask=mask, other=0.0)
                        scores = dot_input(queries, keys, tl.zeros([BLOCK_M, TILE_S], tl.float32), UPCAST)
                    values = _landmark_mixed(mixed, first, TILE_S, BLOCK_D)
                    offset = _landmark_offset(bias, landmarks, key_mask, hides, first, tokens, count, TILE_S, False)
                    scores = scores * (scale * LOG2E) + offset[None, :]
                    maximum, total, acc = attend_further(scores, values, maximum, total, acc, UPCAST)
            result = acc / total[:, None] * tl.load(mixed_scale + bh * BLOCK_D + column)[None, :]
            _store_output(result, out, token, tokens, out_n, key_mask, mask_mode, in_head, BLOCK_D)
    if exact_rows != 0:
        tl.debug_barrier()
        for first in tl.static_range(0, S_PAD, TILE):
            slot = first + tl.arange(0, TILE)
            token = landmark_index(landmarks, slot, count, tokens)
            mine = ((slot < count) & (token >= low) & (token < high))[:, None] & in_head[None, :]
            rows = tl.load(exact + slot[:, None] * BLOCK_D + column[None, :], mask=mine, other=0.0)
            pointer = out + token.to(tl.int64)[:, None] * out_n + column[None, :]
            tl.store(pointer, rows.to(out.dtype.element_ty), mask=mine)
