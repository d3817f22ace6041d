"""`FocalAttention`'s `focal` launch for 16-bit inputs, in Gluon: Triton with the layouts written out.

It computes what `fna.plugins.kernels.focal.focal_kernel` does, on the same arguments. Keys go from global memory straight into the
registers that tensor cores take them from, which Triton's own pipeline cannot: it would write each to shared memory once and read it
back in every warp, and shared memory bounds this kernel. An operand's eight channels of a lane lie side by side in memory, queries'
and keys' alike, so a row is read 16 bytes at a time and products do not notice the order. Values go through shared memory, where
they are transposed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fna.focal_keys import FAR_BELOW
from fna.plugins import focal_plan, launch_plan
from fna.special_tokens import MASKED_SCORE

LOG2E = gl.constexpr(1.4426950408889634)
MASKED = gl.constexpr(MASKED_SCORE)
HIDDEN = gl.constexpr(FAR_BELOW)
HOT = gl.constexpr(launch_plan.MAX_HOT)
CHANNELS = gl.constexpr(8)
"""Of a lane, 16 bytes."""
FIRST = gl.constexpr(focal_plan.FIRST_KEYS)
UNIT = gl.constexpr(launch_plan.HEAD_SIZE_STEP)
"""Elements that rows are counted in: every stride is a multiple."""


@gluon.jit
def _read_keys(key, listed, inside, head_size, COUNT: gl.constexpr, BLOCK_D: gl.constexpr, layout: gl.constexpr):
    """The keys whose rows are listed, `[BLOCK_D, COUNT]`."""
    at = gl.load(listed + gl.arange(0, COUNT, gl.SliceLayout(0, layout)), mask=inside, other=0).to(gl.int64) * UNIT
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(1, layout))[:, None]
    return gl.load(key + channel + at[None, :], mask=(channel < head_size) & inside, other=0.0)


@gluon.jit
def _copy_values(
    into, value, listed, inside, head_size, COUNT: gl.constexpr, BLOCK_D: gl.constexpr, rows: gl.constexpr
):
    """Begin to copy the values whose rows are listed to shared memory, `[COUNT, BLOCK_D]`."""
    at = gl.load(listed + gl.arange(0, COUNT, gl.SliceLayout(1, rows)), mask=inside, other=0).to(gl.int64) * UNIT
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows))[None, :]
    async_copy.async_load(into, value + channel + at[:, None], mask=(channel < head_size) & inside)
    async_copy.commit_group()


@gluon.jit
def _weigh(scores, biases, scale, maximum, total, COUNT: gl.constexpr):
    """Weights of a block of scores in an online softmax, what to shrink former sums by, and the new maximum and total."""
    bias = gl.load(biases + gl.arange(0, COUNT, gl.SliceLayout(0, scores.type.layout)))
    scores = scores * (scale * LOG2E) + bias[None, :]
    larger = gl.maximum(maximum, gl.max(scores, 1))
    weight = gl.exp2(scores - larger[:, None])
    shrink = gl.exp2(maximum - larger)
    return weight, shrink, larger, total * shrink + gl.sum(weight, 1)


@gluon.jit
def _prefix_row(
    query, key, value, out, own, stride_n, out_n, key_mask, mask_mode, tokens, head_size, scale,
    BLOCK_P: gl.constexpr, BLOCK_D: gl.constexpr, rows: gl.constexpr,
):  # fmt: skip
    """Attention of query `own` to all keys: each of BLOCK_P places adds up its own keys, under one running maximum."""
    row = gl.arange(0, BLOCK_P, gl.SliceLayout(1, rows))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows))
    in_head = column < head_size
    asked = gl.load(query + own.to(gl.int64) * stride_n + column, mask=in_head, other=0.0).to(gl.float32) * (
        scale * LOG2E
    )
    maximum = HIDDEN
    total = gl.zeros([BLOCK_P], gl.float32, gl.SliceLayout(1, rows))
    acc = gl.zeros([BLOCK_P, BLOCK_D], gl.float32, rows)
    offset = row.to(gl.int64)[:, None] * stride_n + column[None, :]
    for start in range(0, tokens, BLOCK_P):
        inside = row < tokens - start
        keys = gl.load(key + offset, mask=inside[:, None] & in_head[None, :], other=0.0)
        values = gl.load(value + offset, mask=inside[:, None] & in_head[None, :], other=0.0)
        offset += BLOCK_P * stride_n.to(gl.int64)
        score = gl.sum(keys.to(gl.float32) * asked[None, :], 1)
        if mask_mode != 0:
            flags = gl.load(key_mask + start + row, mask=inside, other=0)
            score -= gl.where(flags != 0, MASKED * LOG2E, 0.0)
        score = gl.where(inside, score, 2 * HIDDEN)
        larger = gl.max(score, 0)
        if larger > maximum:
            shrink = gl.exp2(maximum - larger)
            total *= shrink
            acc *= shrink
            maximum = larger
        weight = gl.exp2(score - maximum)
        total += weight
        acc += weight[:, None] * values.to(gl.float32)
    result = gl.sum(acc, 0) / gl.sum(total, 0)
    gl.store(out + own.to(gl.int64) * out_n + column, result.to(out.dtype.element_ty), mask=in_head)


@gluon.jit
def _prepare_list(tile_keys, tile_bias, hot_tokens, offsets, listed, biases, tokens, stride_n, hot, list_length, row_length,
                  has_offsets, BLOCK_L: gl.constexpr, lanes: gl.constexpr):  # fmt: skip
    """Write the keys of a tile, hot ones first, and what is added to their scores (base 2); return how many there are."""
    length = gl.full([BLOCK_L], 1, gl.int32, lanes)
    for start in range(0, hot + list_length + FIRST, BLOCK_L):
        slot = start + gl.arange(0, BLOCK_L, lanes)
        place = slot - hot
        is_hot = slot < hot
        in_list = (place >= 0) & (place < list_length)
        bias = gl.load(tile_bias + place, mask=in_list, other=HIDDEN)
        token = gl.load(tile_keys + place, mask=in_list, other=0)
        hottest = gl.load(hot_tokens + slot, mask=is_hot, other=0)
        length = gl.maximum(length, gl.where(is_hot | (bias > HIDDEN), slot + 1, 1))
        token = gl.minimum(gl.maximum(gl.where(is_hot, hottest, token), 0), tokens - 1)
        offset = gl.load(
            offsets + gl.where(is_hot, tokens + slot, token), mask=(is_hot | in_list) & (has_offsets != 0), other=0.0
        )
        bias = gl.where(is_hot, 0.0, bias * LOG2E) + offset
        gl.store(listed + slot, token * (stride_n // UNIT), mask=slot < row_length)
        gl.store(biases + slot, bias, mask=slot < row_length)
    gl.barrier()
    return gl.max(length, 0)


@gluon.jit
def _attend_tile(
    query, key, value, own, listed, biases, stride_n, length, head_size, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, rows: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Attention of the queries `own` to the listed keys, online softmax."""
    query_layout: gl.constexpr = gl.DotOperandLayout(0, mma, CHANNELS)
    key_layout: gl.constexpr = gl.DotOperandLayout(1, mma, CHANNELS)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    value_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    dtype: gl.constexpr = query.dtype.element_ty

    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(0, query_layout))[None, :]
    asked = gl.convert_layout(own, gl.SliceLayout(1, query_layout))[:, None]
    queries = gl.load(query + asked.to(gl.int64) * stride_n + channel, mask=channel < head_size, other=0.0)

    shared: gl.constexpr = gl.SwizzledSharedLayout(CHANNELS, 1, 8, [1, 0])
    first = gl.allocate_shared_memory(dtype, [FIRST, BLOCK_D], shared)
    held = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_D], shared)
    # While a block is worked on, the next one's keys and values are on their way.
    first_keys = _read_keys(key, listed, True, head_size, FIRST, BLOCK_D, key_layout)
    _copy_values(first, value, listed, True, head_size, FIRST, BLOCK_D, rows)
    first_scores = mma_v2(queries, first_keys, gl.zeros([BLOCK_M, FIRST], gl.float32, mma))
    more = length > FIRST
    keys = _read_keys(key, listed + FIRST, more, head_size, BLOCK_N, BLOCK_D, key_layout)
    _copy_values(held.index(0), value, listed + FIRST, more, head_size, BLOCK_N, BLOCK_D, rows)
    maximum = gl.full([BLOCK_M], HIDDEN, gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, mma))
    first_weight, _, maximum, total = _weigh(first_scores, biases, scale, maximum, total, FIRST)
    async_copy.wait_group(1)
    acc = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, mma)
    acc = mma_v2(gl.convert_layout(first_weight.to(dtype), weight_layout), first.load(value_layout), acc)
    buffer = 0
    for start in range(FIRST, length, BLOCK_N):
        following = start + BLOCK_N
        more = following < length
        scores = mma_v2(queries, keys, gl.zeros([BLOCK_M, BLOCK_N], gl.float32, mma))
        keys = _read_keys(key, listed + following, more, head_size, BLOCK_N, BLOCK_D, key_layout)
        weight, shrink, maximum, total = _weigh(scores, biases + start, scale, maximum, total, BLOCK_N)
        async_copy.wait_group(0)
        values = held.index(buffer).load(value_layout)
        buffer = 1 - buffer
        _copy_values(held.index(buffer), value, listed + following, more, head_size, BLOCK_N, BLOCK_D, rows)
        acc = mma_v2(gl.convert_layout(weight.to(dtype), weight_layout), values, acc * shrink[:, None])
    async_copy.wait_group(0)
    return acc / total[:, None]


@gluon.jit(do_not_specialize=[
    "heads", "tokens", "prefix", "hot", "mask_stride", "mask_mode", "row_blocks", "tile_rows", "list_length", "row_length",
    "has_offsets",
])  # fmt: skip
def focal_kernel(
    query, key, value, tile_queries, tile_keys, tile_bias, key_mask, hot_tokens, offsets, listed, biases, out,
    heads, tokens, prefix, hot, head_size, stride_b, stride_h, stride_n, out_b, out_h, out_n, mask_stride, mask_mode,
    row_blocks, tile_rows, list_length, row_length, has_offsets, scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_L: gl.constexpr,
):  # fmt: skip
    """As `fna.plugins.kernels.focal.focal_kernel`."""
    warps: gl.constexpr = gl.num_warps()
    rows: gl.constexpr = gl.BlockedLayout(
        [1, CHANNELS], [32 * CHANNELS // BLOCK_D, BLOCK_D // CHANNELS], [warps, 1], [1, 0]
    )
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [warps], [0])
    bh = gl.program_id(0).to(gl.int64)
    job = gl.program_id(1)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    value += head
    out += item * out_b + (bh % heads) * out_h
    key_mask += item * mask_stride
    if job < prefix:
        _prefix_row(query, key, value, out, job, stride_n, out_n, key_mask, mask_mode, tokens, head_size, scale,
                    BLOCK_P, BLOCK_D, rows)  # fmt: skip
    else:
        job -= prefix
        tile = job // row_blocks
        mine = (bh * (gl.num_programs(1) - prefix) + job) * row_length
        listed += mine
        biases += mine
        tile_queries += tile * tile_rows
        length = _prepare_list(
            tile_keys + tile * list_length, tile_bias + tile * list_length, hot_tokens + bh * HOT, offsets + bh * (tokens + HOT),
            listed, biases, tokens, stride_n, hot, list_length, row_length, has_offsets, BLOCK_L, lanes,
        )  # fmt: skip
        row = (job % row_blocks) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, mma))
        # Shorter tiles repeat their first query.
        own = gl.load(tile_queries + row, mask=row < tile_rows, other=0)
        written = (row < tile_rows) & ((row == 0) | (own != gl.load(tile_queries)))
        own = gl.minimum(gl.maximum(own, 0), tokens - 1)
        result = _attend_tile(query, key, value, own, listed, biases, stride_n, length, head_size, scale,
                              BLOCK_M, BLOCK_N, BLOCK_D, rows, mma)  # fmt: skip
        column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, mma))[None, :]
        pointer = out + own.to(gl.int64)[:, None] * out_n + column
        gl.store(pointer, result.to(out.dtype.element_ty), mask=written[:, None] & (column < head_size))
