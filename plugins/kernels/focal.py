"""Triton kernels of `FocalAttention`. Launches: `focal_hot` (where keys are hot or masked), then `focal`.

Names follow `fna.focal`. Scratch, per head (`bh` = batch item * heads + head), fp32 and int32:
    query_sums  [bh, splits, BLOCK_D] sums of the patches' queries, where several programs share a head
    hot_scores  [bh, N]             scale * key . mean patch query, less what masking takes off
    candidates  [bh, N]             patch tokens that score at least as high as the threshold, ascending
    hot_values  [bh, HOT]           the best scores so far, highest first
    hot_tokens  [bh, HOT]           their tokens
    offsets     [bh, N + HOT]       added to each key's scores (base 2): 0, what masking takes off, or HIDDEN for keys that are
                                    hot, since no tile lists a hot key a second time; then the same for the hot keys themselves
    listed      [bh, programs, R]   where the rows of a program's keys begin, hot keys first, in units of 16 elements
    biases      [bh, programs, R]   added to their scores (base 2)

Indices are clamped to the tokens that exist, so wrong lists give wrong rows but never a wild access.
"""

import triton
import triton.language as tl

from fna.focal_keys import FAR_BELOW
from fna.plugins import launch_plan
from fna.plugins.kernels.tiles import LOG2E, MASKED, attend_further, deep_scores, gather_rows, mask_flags

HIDDEN = tl.constexpr(FAR_BELOW)
HOT = tl.constexpr(launch_plan.MAX_HOT)
UNIT = tl.constexpr(launch_plan.HEAD_SIZE_STEP)

_SIZES = ["heads", "tokens", "prefix", "hot", "mask_stride", "mask_mode"]
_LISTS = ["row_blocks", "tile_rows", "list_length", "row_length", "has_offsets"]


@triton.jit
def _query_sum(query, stride_n, low, high, head_size, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of the queries of tokens `low` to `high`, fp32 [BLOCK_D]."""
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    in_head = (column < head_size)[None, :]
    pointer = query + (low + row).to(tl.int64)[:, None] * stride_n + column[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    whole = high - (high - low) % BLOCK_N
    for _ in tl.range(low, whole, BLOCK_N, num_stages=1):
        sums += tl.load(pointer, mask=in_head, other=0.0).to(tl.float32)
        pointer += BLOCK_N * stride_n.to(tl.int64)
    sums += tl.load(pointer, mask=(row < high - whole)[:, None] & in_head, other=0.0).to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def _score_block(pointer, mean, in_head, inside, key_mask, mask_mode, hot_scores, token):
    """Write the scores of the keys of some tokens against `mean`."""
    keys = tl.load(pointer, mask=inside[:, None] & in_head, other=0.0)
    score = tl.sum(keys.to(tl.float32) * mean[None, :], 1)
    if mask_mode != 0:
        score -= mask_flags(key_mask, mask_mode, token, inside) * MASKED
    tl.store(hot_scores + token, score, mask=inside)


@triton.jit
def _score_keys(key, stride_n, mean, key_mask, mask_mode, hot_scores, low, high, head_size,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write the scores of the keys of tokens `low` to `high` against `mean`."""
    row, column = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    in_head = (column < head_size)[None, :]
    pointer = key + (low + row).to(tl.int64)[:, None] * stride_n + column[None, :]
    whole = high - (high - low) % BLOCK_N
    for start in tl.range(low, whole, BLOCK_N, num_stages=1):
        _score_block(pointer, mean, in_head, row >= 0, key_mask, mask_mode, hot_scores, start + row)
        pointer += BLOCK_N * stride_n.to(tl.int64)
    _score_block(pointer, mean, in_head, row < high - whole, key_mask, mask_mode, hot_scores, whole + row)


@triton.jit
def _find_threshold(hot_scores, prefix, tokens, hot, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """A score that at least `hot` patches reach, and few more: the hot-th largest of the best scores of BLOCK_N groups of patches."""
    deep: tl.constexpr = BLOCK_C // BLOCK_N
    place = tl.arange(0, deep)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for start in tl.range(prefix, tokens, BLOCK_C, num_stages=1):
        score = tl.load(hot_scores + start + place, mask=start + place < tokens, other=float("-inf"))
        best = tl.maximum(best, tl.max(score, 0))
    reached = tl.sum((best[None, :] >= best[:, None]).to(tl.int32), 1)
    return tl.max(tl.where(reached >= hot, best, float("-inf")), 0)


@triton.jit
def _select(hot_scores, candidates, hot_values, hot_tokens, prefix, tokens, hot,
            BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Rank the patches that reach the threshold by counting, BLOCK_R at a time."""
    slot = tl.arange(0, HOT)
    threshold = _find_threshold(hot_scores, prefix, tokens, hot, BLOCK_N, BLOCK_C)
    tl.store(hot_values + slot, tl.full([HOT], float("-inf"), tl.float32))
    tl.store(hot_tokens + slot, tl.full([HOT], 0, tl.int32) + prefix)
    count = 0
    for start in tl.range(prefix, tokens, BLOCK_C, num_stages=1):
        token = start + tl.arange(0, BLOCK_C)
        score = tl.load(hot_scores + token, mask=token < tokens, other=float("-inf"))
        chosen = ((score >= threshold) & (token < tokens)).to(tl.int32)
        place = count + tl.cumsum(chosen, 0) - 1
        tl.store(candidates + place, token, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.debug_barrier()
    new = tl.arange(0, BLOCK_R)
    for start in tl.range(0, count, BLOCK_R, num_stages=1):
        # Candidates ascend, so those ranked before come first among equals.
        there = start + new < count
        token = tl.load(candidates + start + new, mask=there, other=0)
        score = tl.load(hot_scores + token, mask=there, other=float("-inf"))
        known, known_token = tl.load(hot_values + slot), tl.load(hot_tokens + slot)
        before = (score[None, :] > score[:, None]) | (
            (score[None, :] == score[:, None]) & (new[None, :] < new[:, None])
        )
        rank = tl.sum(before.to(tl.int32), 1) + tl.sum((known[None, :] >= score[:, None]).to(tl.int32), 1)
        known_rank = slot + tl.sum((score[None, :] > known[:, None]).to(tl.int32), 1)
        tl.debug_barrier()
        tl.store(hot_values + known_rank, known, mask=known_rank < HOT)
        tl.store(hot_tokens + known_rank, known_token, mask=known_rank < HOT)
        tl.store(hot_values + rank, score, mask=there & (rank < HOT))
        tl.store(hot_tokens + rank, token, mask=there & (rank < HOT))
        tl.debug_barrier()


@triton.jit(do_not_specialize=[*_SIZES, "splits", "split_tokens", "step"])
def focal_hot_kernel(
    query, key, key_mask, query_sums, hot_scores, candidates, hot_values, hot_tokens, offsets,
    heads, tokens, prefix, hot, head_size, stride_b, stride_h, stride_n, mask_stride, mask_mode,
    splits, split_tokens, step, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The `hot` patches whose keys score highest against the mean patch query, and what is added to the scores of each key.

    Grid: (B * H, splits). Step 0 does all, with one split. Where the GPU has multiprocessors for more, steps 1 and 2 add up queries
    and score keys, a split a program, and step 3 selects with one program a head. No sort; among equal scores the lower token is
    taken.
    """
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    key_mask += item * mask_stride
    query_sums += bh * splits * BLOCK_D
    hot_scores += bh * tokens
    hot_tokens += bh * HOT
    offsets += bh * (tokens + HOT)
    column = tl.arange(0, BLOCK_D)
    low = prefix + split * split_tokens
    high = tl.minimum(low + split_tokens, tokens)
    if step <= 1:
        # The prefix tokens are the first split's.
        for start in tl.range(tl.where(split == 0, 0, low), high, BLOCK_C, num_stages=1):
            token = start + tl.arange(0, BLOCK_C)
            flags = mask_flags(key_mask, mask_mode, token, token < high)
            tl.store(offsets + token, -flags * (MASKED * LOG2E), mask=token < high)
    if hot > 0:
        sums = tl.zeros([BLOCK_D], tl.float32)
        if step <= 1:
            sums = _query_sum(query, stride_n, low, high, head_size, BLOCK_N, BLOCK_D)
            if step == 1:
                tl.store(query_sums + split * BLOCK_D + column, sums)
        elif step == 2:
            for part in tl.range(0, splits, num_stages=1):
                sums += tl.load(query_sums + part * BLOCK_D + column)
        if step % 2 == 0:
            mean = sums * (scale / (tokens - prefix))
            _score_keys(key, stride_n, mean, key_mask, mask_mode, hot_scores, low, high, head_size, BLOCK_N, BLOCK_D)
        if step % 3 == 0:
            tl.debug_barrier()
            _select(hot_scores, candidates + bh * tokens, hot_values + bh * HOT, hot_tokens, prefix, tokens, hot,
                    BLOCK_N, BLOCK_C, BLOCK_R)  # fmt: skip
            slot = tl.arange(0, HOT)
            token = tl.load(hot_tokens + slot)
            taken = slot < hot
            flags = mask_flags(key_mask, mask_mode, token, taken)
            tl.store(offsets + tokens + slot, -flags * (MASKED * LOG2E), mask=taken)
            tl.store(offsets + token, tl.full([HOT], HIDDEN, tl.float32), mask=taken)


@triton.jit
def _prefix_row(
    query, key, value, out, own, stride_n, out_n, key_mask, mask_mode, tokens, head_size, scale,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of query `own` to all keys: each of BLOCK_P places adds up its own keys, under one running maximum."""
    row, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    in_head = column < head_size
    asked = tl.load(query + own.to(tl.int64) * stride_n + column, mask=in_head, other=0.0).to(tl.float32) * (
        scale * LOG2E
    )
    maximum = HIDDEN
    total = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    offset = row.to(tl.int64)[:, None] * stride_n + column[None, :]
    for start in tl.range(0, tokens, BLOCK_P, num_stages=1):
        inside = row < tokens - start
        keys = tl.load(key + offset, mask=inside[:, None] & in_head[None, :], other=0.0)
        values = tl.load(value + offset, mask=inside[:, None] & in_head[None, :], other=0.0)
        offset += BLOCK_P * stride_n.to(tl.int64)
        score = tl.sum(keys.to(tl.float32) * asked[None, :], 1)
        if mask_mode != 0:
            score -= mask_flags(key_mask, mask_mode, start + row, inside) * (MASKED * LOG2E)
        score = tl.where(inside, score, 2 * HIDDEN)
        larger = tl.max(score, 0)
        if larger > maximum:
            shrink = tl.exp2(maximum - larger)
            total *= shrink
            acc *= shrink
            maximum = larger
        weight = tl.exp2(score - maximum)
        total += weight
        acc += weight[:, None] * values.to(tl.float32)
    result = tl.sum(acc, 0) / tl.sum(total, 0)
    tl.store(out + own.to(tl.int64) * out_n + column, result.to(out.dtype.element_ty), mask=in_head)


@triton.jit
def _prepare_list(tile_keys, tile_bias, hot_tokens, offsets, listed, biases, tokens, stride_n, hot, list_length, row_length,
                  has_offsets, BLOCK_L: tl.constexpr):  # fmt: skip
    """Write the keys of a tile, hot ones first, and what is added to their scores (base 2); return how many there are."""
    length = 1
    for start in tl.range(0, hot + list_length, BLOCK_L, num_stages=1):
        slot = start + tl.arange(0, BLOCK_L)
        place = slot - hot
        is_hot = slot < hot
        in_list = (place >= 0) & (place < list_length)
        bias = tl.load(tile_bias + place, mask=in_list, other=HIDDEN)
        token = tl.load(tile_keys + place, mask=in_list, other=0)
        hottest = tl.load(hot_tokens + slot, mask=is_hot, other=0)
        length = tl.maximum(length, tl.max(tl.where(is_hot | (bias > HIDDEN), slot + 1, 1), 0))
        token = tl.minimum(tl.maximum(tl.where(is_hot, hottest, token), 0), tokens - 1)
        added = tl.load(
            offsets + tl.where(is_hot, tokens + slot, token),
            mask=tl.where(is_hot | in_list, has_offsets, 0) != 0,
            other=0.0,
        )
        tl.store(listed + slot, token * (stride_n // UNIT), mask=slot < row_length)
        tl.store(biases + slot, tl.where(is_hot, 0.0, bias * LOG2E) + added, mask=slot < row_length)
    tl.debug_barrier()
    return length


@triton.jit(do_not_specialize=[*_SIZES, *_LISTS])
def focal_kernel(
    query, key, value, tile_queries, tile_keys, tile_bias, key_mask, hot_tokens, offsets, listed, biases, out,
    heads, tokens, prefix, hot, head_size, stride_b, stride_h, stride_n, out_b, out_h, out_n, mask_stride, mask_mode,
    row_blocks, tile_rows, list_length, row_length, has_offsets, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Attention of a tile's queries to the hot keys and its own list of keys, online softmax; and the prefix rows.

    Grid: (B * H, prefix + T * row_blocks). The first programs of a head attend from one prefix token each to all keys, the others
    from BLOCK_M queries of a tile each. For fp32; 16-bit inputs have `fna.plugins.kernels.focal_tiles`, which the interpreter cannot
    run, so it runs this for them too.
    """
    bh = tl.program_id(0).to(tl.int64)
    job = tl.program_id(1)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    value += head
    out += item * out_b + (bh % heads) * out_h
    key_mask += item * mask_stride
    if job < prefix:
        _prefix_row(query, key, value, out, job, stride_n, out_n, key_mask, mask_mode, tokens, head_size, scale,
                    BLOCK_P, BLOCK_D)  # fmt: skip
    else:
        job -= prefix
        tile = job // row_blocks
        mine = (bh * (tl.num_programs(1) - prefix) + job) * row_length
        listed += mine
        biases += mine
        tile_queries += tile * tile_rows
        length = _prepare_list(
            tile_keys + tile * list_length, tile_bias + tile * list_length, hot_tokens + bh * HOT, offsets + bh * (tokens + HOT),
            listed, biases, tokens, stride_n, hot, list_length, row_length, has_offsets, BLOCK_L,
        )  # fmt: skip
        column = tl.arange(0, BLOCK_D)
        row = (job % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        # Shorter tiles repeat their first query.
        own = tl.load(tile_queries + row, mask=row < tile_rows, other=0)
        written = (row < tile_rows) & ((row == 0) | (own != tl.load(tile_queries)))
        own = tl.minimum(tl.maximum(own, 0), tokens - 1)
        asked = own * (stride_n // UNIT)
        maximum = tl.full([BLOCK_M], HIDDEN, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, length, BLOCK_N, num_stages=4):
            slot = start + tl.arange(0, BLOCK_N)
            at = tl.load(listed + slot)
            scores = deep_scores(query, key, asked, at, own >= 0, at >= 0, UNIT, head_size, BLOCK_M, BLOCK_N, BLOCK_D)
            scores = scores * (scale * LOG2E) + tl.load(biases + slot)[None, :]
            values = gather_rows(value, UNIT, at, head_size, BLOCK_D).to(tl.float32)
            maximum, total, acc = attend_further(scores, values, maximum, total, acc, False)
        result = acc / total[:, None]
        pointer = out + own.to(tl.int64)[:, None] * out_n + column[None, :]
        tl.store(pointer, result.to(out.dtype.element_ty), mask=written[:, None] & (column < head_size)[None, :])
