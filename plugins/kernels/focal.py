"""Triton kernels of `FocalAttention`. Launches: `focal_hot` (where keys are hot or masked), then `focal`.

Names follow `fna.focal`. Scratch, per head (`bh` = batch item * heads + head):
    hot_scores  [bh, N]             scale * key . mean patch query, less what masking takes off
    candidates  [bh, N]             patch tokens that score at least as high as the threshold, ascending
    hot_values  [bh, HOT]           the best scores so far, highest first
    hot_tokens  [bh, HOT]           their tokens
    offsets     [bh, N + HOT]       added to each key's scores (base 2): 0, what masking takes off, or HIDDEN for keys that are
                                    hot, since no tile lists a hot key a second time; then the same for the hot keys themselves

Indices are clamped to the tokens that exist, so wrong lists give wrong rows but never a wild access.
"""

import triton
import triton.language as tl

from fna.focal_keys import FAR_BELOW
from fna.plugins import launch_plan
from fna.plugins.kernels.tiles import LOG2E, MASKED, deep_scores, dot_input, gather_rows, mask_flags

HIDDEN = tl.constexpr(FAR_BELOW)
HOT = tl.constexpr(launch_plan.MAX_HOT)

_SIZES = ["heads", "tokens", "prefix", "hot", "mask_stride", "mask_mode"]


@triton.jit
def _mean_query(query, stride_n, prefix, tokens, head_size, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean of the patches' queries, fp32 [BLOCK_D]."""
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(prefix, tokens, BLOCK_N, num_stages=1):
        token = start + tl.arange(0, BLOCK_N)
        inside = (token < tokens)[:, None] & (column < head_size)[None, :]
        sums += tl.load(query + token.to(tl.int64)[:, None] * stride_n + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    return tl.sum(sums, 0) / (tokens - prefix)


@triton.jit(do_not_specialize=_SIZES)
def focal_hot_kernel(
    query, key, key_mask, hot_scores, candidates, hot_values, hot_tokens, offsets,
    heads, tokens, prefix, hot, head_size, stride_b, stride_h, stride_n, mask_stride, mask_mode, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The `hot` patches whose keys score highest against the mean patch query, and what is added to the scores of each key.

    Grid: (B * H). No sort: of HOT groups of patches, the hot-th largest of the groups' best scores is a threshold that at least
    `hot` patches reach, and few more; those are ranked by counting, HOT at a time. Among equal scores the lower token is taken.
    """
    bh = tl.program_id(0).to(tl.int64)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    key_mask += item * mask_stride
    hot_scores += bh * tokens
    candidates += bh * tokens
    hot_values += bh * HOT
    hot_tokens += bh * HOT
    offsets += bh * (tokens + HOT)
    column = tl.arange(0, BLOCK_D)
    in_head = column < head_size
    slot = tl.arange(0, HOT)
    for start in tl.range(0, tokens, BLOCK_C, num_stages=1):
        token = start + tl.arange(0, BLOCK_C)
        flags = mask_flags(key_mask, mask_mode, token, token < tokens)
        tl.store(offsets + token, -flags * (MASKED * LOG2E), mask=token < tokens)
    if hot > 0:
        mean = _mean_query(query, stride_n, prefix, tokens, head_size, BLOCK_N, BLOCK_D) * scale
        best = tl.full([BLOCK_N], float("-inf"), tl.float32)
        for start in tl.range(prefix, tokens, BLOCK_N, num_stages=1):
            token = start + tl.arange(0, BLOCK_N)
            inside = (token < tokens)[:, None] & in_head[None, :]
            keys = tl.load(key + token.to(tl.int64)[:, None] * stride_n + column[None, :], mask=inside, other=0.0)
            score = tl.sum(keys.to(tl.float32) * mean[None, :], 1)
            score -= mask_flags(key_mask, mask_mode, token, token < tokens) * MASKED
            score = tl.where(token < tokens, score, float("-inf"))
            tl.store(hot_scores + token, score, mask=token < tokens)
            best = tl.maximum(best, score)
        reached = tl.sum((best[None, :] >= best[:, None]).to(tl.int32), 1)
        threshold = tl.max(tl.where(reached >= hot, best, float("-inf")), 0)
        tl.store(hot_values + slot, tl.full([HOT], float("-inf"), tl.float32))
        tl.store(hot_tokens + slot, tl.full([HOT], 0, tl.int32) + prefix)
        tl.debug_barrier()
        count = 0
        for start in tl.range(prefix, tokens, BLOCK_C, num_stages=1):
            token = start + tl.arange(0, BLOCK_C)
            score = tl.load(hot_scores + token, mask=token < tokens, other=float("-inf"))
            chosen = ((score >= threshold) & (token < tokens)).to(tl.int32)
            place = count + tl.cumsum(chosen, 0) - 1
            tl.store(candidates + place, token, mask=chosen != 0)
            count += tl.sum(chosen, 0)
        tl.debug_barrier()
        for start in tl.range(0, count, HOT, num_stages=1):
            # The candidates ascend, so those ranked before come first among equals.
            there = start + slot < count
            token = tl.load(candidates + start + slot, mask=there, other=0)
            score = tl.load(hot_scores + token, mask=there, other=float("-inf"))
            known, known_token = tl.load(hot_values + slot), tl.load(hot_tokens + slot)
            before = (score[None, :] > score[:, None]) | (
                (score[None, :] == score[:, None]) & (slot[None, :] < slot[:, None])
            )
            rank = tl.sum(before.to(tl.int32), 1) + tl.sum((known[None, :] >= score[:, None]).to(tl.int32), 1)
            known_rank = slot + tl.sum((score[None, :] > known[:, None]).to(tl.int32), 1)
            tl.debug_barrier()
            tl.store(hot_values + known_rank, known, mask=known_rank < HOT)
            tl.store(hot_tokens + known_rank, known_token, mask=known_rank < HOT)
            tl.store(hot_values + rank, score, mask=there & (rank < HOT))
            tl.store(hot_tokens + rank, token, mask=there & (rank < HOT))
            tl.debug_barrier()
        token = tl.load(hot_tokens + slot)
        taken = slot < hot
        flags = mask_flags(key_mask, mask_mode, token, taken)
        tl.store(offsets + tokens + slot, -flags * (MASKED * LOG2E), mask=taken)
        tl.store(offsets + token, tl.full([HOT], HIDDEN, tl.float32), mask=taken)


@triton.jit
def _prefix_row(
    query, key, value, out, row, stride_n, out_n, key_mask, mask_mode, tokens, head_size, scale,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of query `row` to all keys: every one of BLOCK_P places has its own running softmax, joined at the end."""
    column = tl.arange(0, BLOCK_D)
    in_head = column < head_size
    own = tl.load(query + row.to(tl.int64) * stride_n + column, mask=in_head, other=0.0).to(tl.float32) * (
        scale * LOG2E
    )
    maximum = tl.full([BLOCK_P], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    acc = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in tl.range(0, tokens, BLOCK_P, num_stages=1):
        token = start + tl.arange(0, BLOCK_P)
        inside = (token < tokens)[:, None] & in_head[None, :]
        offset = token.to(tl.int64)[:, None] * stride_n + column[None, :]
        keys = tl.load(key + offset, mask=inside, other=0.0)
        values = tl.load(value + offset, mask=inside, other=0.0)
        score = tl.sum(keys.to(tl.float32) * own[None, :], 1)
        score -= mask_flags(key_mask, mask_mode, token, token < tokens) * (MASKED * LOG2E)
        score = tl.where(token < tokens, score, HIDDEN)
        larger = tl.maximum(maximum, score)
        weight = tl.exp2(score - larger)
        shrink = tl.exp2(maximum - larger)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * values.to(tl.float32)
        maximum = larger
    share = tl.exp2(maximum - tl.max(maximum, 0))
    result = tl.sum(acc * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + row.to(tl.int64) * out_n + column, result.to(out.dtype.element_ty), mask=in_head)


@triton.jit
def _list_length(bias, list_stride, BLOCK_L: tl.constexpr):
    """Keys of a tile: its list ends with the last one that is not hidden."""
    length = 1
    for start in tl.range(0, list_stride, BLOCK_L, num_stages=1):
        slot = start + tl.arange(0, BLOCK_L)
        known = tl.load(bias + slot, mask=slot < list_stride, other=HIDDEN)
        length = tl.maximum(length, tl.max(tl.where(known > HIDDEN, slot + 1, 1), 0))
    return length


@triton.jit(do_not_specialize=[*_SIZES, "row_blocks", "tile_rows", "list_stride", "has_offsets"])
def focal_kernel(
    query, key, value, tile_queries, tile_keys, tile_bias, key_mask, hot_tokens, offsets, out,
    heads, tokens, prefix, hot, head_size, stride_b, stride_h, stride_n, out_b, out_h, out_n, mask_stride, mask_mode,
    row_blocks, tile_rows, list_stride, has_offsets, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attention of a tile's queries to its own list of keys and the hot keys after it, online softmax; and the prefix rows.

    Grid: (B * H, prefix + T * row_blocks). The first programs of a head attend from one prefix token each to all keys, the others
    from BLOCK_M queries of a tile each.
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
        _prefix_row(
            query,
            key,
            value,
            out,
            job,
            stride_n,
            out_n,
            key_mask,
            mask_mode,
            tokens,
            head_size,
            scale,
            BLOCK_P,
            BLOCK_D,
        )
    else:
        job -= prefix
        tile = job // row_blocks
        hot_tokens += bh * HOT
        offsets += bh * (tokens + HOT)
        tile_queries += tile * tile_rows
        tile_keys += tile * list_stride
        tile_bias += tile * list_stride
        length = _list_length(tile_bias, list_stride, BLOCK_L)
        column = tl.arange(0, BLOCK_D)
        in_head = column < head_size
        row = (job % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        # Shorter tiles repeat their first query.
        token = tl.load(tile_queries + row, mask=row < tile_rows, other=0)
        written = (row < tile_rows) & ((row == 0) | (token != tl.load(tile_queries)))
        token = tl.minimum(tl.maximum(token, 0), tokens - 1)
        if query.dtype.element_ty != tl.float32:
            queries = gather_rows(query, stride_n, token, head_size, BLOCK_D)
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, length + hot, BLOCK_N, num_stages=STAGES):
            slot = start + tl.arange(0, BLOCK_N)
            extra = slot - length
            listed = tl.load(tile_keys + slot, mask=extra < 0, other=0)
            index = listed + tl.load(hot_tokens + extra, mask=(extra >= 0) & (extra < hot), other=0)
            index = tl.minimum(tl.maximum(index, 0), tokens - 1)
            bias = tl.load(tile_bias + slot, mask=extra < 0, other=0.0) * LOG2E
            place = tl.where(extra < 0, index, tokens + extra)
            bias += tl.load(offsets + place, mask=tl.where(extra < hot, has_offsets, 0) != 0, other=0.0)
            bias = tl.where(extra < hot, bias, HIDDEN)
            if query.dtype.element_ty == tl.float32:
                inside = extra < hot
                scores = deep_scores(query, key, token, index, row < tile_rows, inside, stride_n, head_size,
                                      BLOCK_M, BLOCK_N, BLOCK_D)  # fmt: skip
            else:
                keys = gather_rows(key, stride_n, index, head_size, BLOCK_D)
                scores = dot_input(queries, tl.trans(keys), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
            values = gather_rows(value, stride_n, index, head_size, BLOCK_D)
            scores = scores * (scale * LOG2E) + bias[None, :]
            larger = tl.maximum(maximum, tl.max(scores, 1))
            weight = tl.exp2(scores - larger[:, None])
            shrink = tl.exp2(maximum - larger)
            acc = dot_input(weight.to(values.dtype), values, acc * shrink[:, None], UPCAST)
            total = total * shrink + tl.sum(weight, 1)
            maximum = larger
        result = acc / total[:, None]
        pointer = out + token.to(tl.int64)[:, None] * out_n + column[None, :]
        tl.store(pointer, result.to(out.dtype.element_ty), mask=written[:, None] & in_head[None, :])
