"""`FastNystromAttention`'s `landmark` launch for 16-bit inputs, up to 64 landmarks and 64 channels, in Gluon.

It computes what `fna.plugins.kernels.attention.landmark_kernel` does there, on the same arguments, with the same scratch and the same
roundings. As in `focal_tiles.py`, queries and keys go from global memory straight into the registers that tensor cores take them from,
a lane's eight channels side by side in memory, and values through shared memory: with two warps, of which each reads all keys and
values, reads from shared memory would take longer than the tensor cores.

The matrices of Newton-Schulz stay in registers, as accumulators. What a product takes on its left is made of them there; what it takes
on its right, both warps read whole from shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from fna.special_tokens import MASKED_SCORE

LOG2E = gl.constexpr(1.4426950408889634)
MASKED = gl.constexpr(MASKED_SCORE)
CHANNELS = gl.constexpr(8)
"""Of a lane, 16 bytes."""


@gluon.jit
def _landmark_index(landmarks, row, count, tokens):
    """As `fna.plugins.kernels.tiles.landmark_index`."""
    index = gl.load(landmarks + row, mask=row < count, other=0)
    return gl.minimum(gl.maximum(index, 0), tokens - 1)


@gluon.jit
def _mask_flags(key_mask, wanted, index, inside):
    """As `fna.plugins.kernels.tiles.mask_flags`."""
    flags = gl.load(key_mask + index, mask=inside & (wanted != 0), other=0)
    return gl.where(flags != 0, 1.0, 0.0)


@gluon.jit
def _read_queries(query, index, stride_n, head_size, BLOCK_D: gl.constexpr, layout: gl.constexpr):
    """The rows of some tokens as a product's left side, `[len(index), BLOCK_D]`."""
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))[None, :]
    return gl.load(query + index.to(gl.int64)[:, None] * stride_n + channel, mask=channel < head_size, other=0.0)


@gluon.jit
def _read_keys(key, index, inside, stride_n, head_size, BLOCK_D: gl.constexpr, layout: gl.constexpr):
    """The rows of some tokens as a product's right side, `[BLOCK_D, len(index)]`; zero where they are not `inside`."""
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(1, layout))[:, None]
    at = key + channel + index.to(gl.int64)[None, :] * stride_n
    return gl.load(at, mask=(channel < head_size) & inside[None, :], other=0.0)


@gluon.jit
def _copy_values(into, value, index, inside, stride_n, head_size, BLOCK_D: gl.constexpr, rows: gl.constexpr):
    """Begin to copy the rows of some tokens to shared memory, `[len(index), BLOCK_D]`; zero where they are not `inside`."""
    channel = gl.arange(0, BLOCK_D, gl.SliceLayout(0, rows))[None, :]
    at = value + channel + index.to(gl.int64)[:, None] * stride_n
    async_copy.async_load(into, at, mask=(channel < head_size) & inside[:, None])
    async_copy.commit_group()


@gluon.jit
def _exact_split(query, key, value, stride_n, landmarks, key_mask, mask_mode, partial, stats, split, split_tokens, tokens, count,
                 head_size, scale, S_PAD: gl.constexpr, STEP: gl.constexpr, BLOCK_D: gl.constexpr,
                 mma: gl.constexpr, shared: gl.constexpr):  # fmt: skip
    """Attention of the landmark queries over one stretch of keys, online softmax; STEP keys at a time."""
    dtype: gl.constexpr = query.dtype.element_ty
    query_layout: gl.constexpr = gl.DotOperandLayout(0, mma, CHANNELS)
    key_layout: gl.constexpr = gl.DotOperandLayout(1, mma, CHANNELS)
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    value_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    rows: gl.constexpr = gl.BlockedLayout(
        [1, CHANNELS], [32 * CHANNELS // BLOCK_D, BLOCK_D // CHANNELS], [gl.num_warps(), 1], [1, 0]
    )
    asked = _landmark_index(landmarks, gl.arange(0, S_PAD, gl.SliceLayout(1, query_layout)), count, tokens)
    queries = _read_queries(query, asked, stride_n, head_size, BLOCK_D, query_layout)
    row = gl.arange(0, S_PAD, gl.SliceLayout(1, mma))
    ordinary = 1.0 - _mask_flags(key_mask, mask_mode // 2, _landmark_index(landmarks, row, count, tokens), row < count)
    low = split * split_tokens
    high = gl.minimum(low + split_tokens, tokens)
    key_place = gl.arange(0, STEP, gl.SliceLayout(0, key_layout))
    value_place = gl.arange(0, STEP, gl.SliceLayout(1, rows))
    place = gl.arange(0, STEP, gl.SliceLayout(0, mma))

    held = gl.allocate_shared_memory(dtype, [2, STEP, BLOCK_D], shared)
    # While a block is worked on, the next one's keys and values are on their way.
    keys = _read_keys(key, low + key_place, low + key_place < high, stride_n, head_size, BLOCK_D, key_layout)
    _copy_values(held.index(0), value, low + value_place, low + value_place < high, stride_n, head_size, BLOCK_D, rows)
    maximum = gl.full([S_PAD], float("-inf"), gl.float32, gl.SliceLayout(1, mma))
    total = gl.zeros([S_PAD], gl.float32, gl.SliceLayout(1, mma))
    acc = gl.zeros([S_PAD, BLOCK_D], gl.float32, mma)
    buffer = 0
    for start in range(low, high, STEP):
        following = start + STEP
        scores = mma_v2(queries, keys, gl.zeros([S_PAD, STEP], gl.float32, mma))
        keys = _read_keys(
            key, following + key_place, following + key_place < high, stride_n, head_size, BLOCK_D, key_layout
        )
        token = start + place
        scores = scores * (scale * LOG2E) + gl.where(token < high, 0.0, float("-inf"))[None, :]
        if mask_mode != 0:
            hidden = _mask_flags(key_mask, 1, token, token < high) * (MASKED * LOG2E)
            scores -= ordinary[:, None] * hidden[None, :]
        larger = gl.maximum(maximum, gl.max(scores, 1))
        weight = gl.exp2(scores - larger[:, None])
        shrink = gl.exp2(maximum - larger)
        maximum, total = larger, total * shrink + gl.sum(weight, 1)
        async_copy.wait_group(0)
        values = held.index(buffer).load(value_layout)
        buffer = 1 - buffer
        _copy_values(
            held.index(buffer), value, following + value_place, following + value_place < high, stride_n, head_size, BLOCK_D, rows
        )  # fmt: skip
        acc = mma_v2(gl.convert_layout(weight.to(dtype), weight_layout), values, acc * shrink[:, None])
    async_copy.wait_group(0)
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, mma))
    gl.store(partial + (split * S_PAD + row)[:, None] * BLOCK_D + column[None, :], acc)
    gl.store(stats + split * 2 * S_PAD + row, maximum)
    gl.store(stats + (split * 2 + 1) * S_PAD + row, total)


@gluon.jit
def _core(query, key, stride_n, landmarks, bias, key_mask, mask_mode, tokens, count, head_size, scale,
          S_PAD: gl.constexpr, BLOCK_D: gl.constexpr, mma: gl.constexpr):  # fmt: skip
    """A, the softmax among landmarks, `[S_PAD, S_PAD]`; rows and columns of padding are zero."""
    query_layout: gl.constexpr = gl.DotOperandLayout(0, mma, CHANNELS)
    key_layout: gl.constexpr = gl.DotOperandLayout(1, mma, CHANNELS)
    asked = _landmark_index(landmarks, gl.arange(0, S_PAD, gl.SliceLayout(1, query_layout)), count, tokens)
    queries = _read_queries(query, asked, stride_n, head_size, BLOCK_D, query_layout)
    slot = gl.arange(0, S_PAD, gl.SliceLayout(0, key_layout))
    keys = _read_keys(
        key, _landmark_index(landmarks, slot, count, tokens), slot < S_PAD, stride_n, head_size, BLOCK_D, key_layout
    )
    scores = mma_v2(queries, keys, gl.zeros([S_PAD, S_PAD], gl.float32, mma))
    column = gl.arange(0, S_PAD, gl.SliceLayout(0, mma))
    row = gl.arange(0, S_PAD, gl.SliceLayout(1, mma))
    scores = (scores * scale + gl.load(bias + column, mask=column < count, other=0.0)[None, :]) * LOG2E
    if mask_mode != 0:
        there = _landmark_index(landmarks, column, count, tokens)
        hidden = _mask_flags(key_mask, 1, there, column < count) * (MASKED * LOG2E)
        own = _landmark_index(landmarks, row, count, tokens)
        ordinary = 1.0 - _mask_flags(key_mask, mask_mode // 2, own, row < count)
        scores -= ordinary[:, None] * hidden[None, :]
    scores = gl.where((column < count)[None, :], scores, float("-inf"))
    weight = gl.exp2(scores - gl.max(scores, 1)[:, None])
    weight = weight / gl.sum(weight, 1)[:, None]
    return gl.where((row < count)[:, None], weight, 0.0)


@gluon.jit
def _turned(matrix, layout: gl.constexpr):
    """The transpose of a square matrix, in the same layout."""
    # Swizzled: without, the lanes that read a column would wait for one bank.
    turning: gl.constexpr = gl.SwizzledSharedLayout(CHANNELS, 1, 8, [1, 0])
    held = gl.allocate_shared_memory(gl.float32, matrix.shape, turning, matrix)
    return held.permute((1, 0)).load(layout)


@gluon.jit
def _newton(a, matrices, full_iterations, nothing, S_PAD: gl.constexpr, mma: gl.constexpr, shared: gl.constexpr):
    """As `fna.plugins.kernels.newton_schulz.newton_registers`."""
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    row = gl.arange(0, S_PAD, gl.SliceLayout(1, mma))
    column = gl.arange(0, S_PAD, gl.SliceLayout(0, mma))
    cell = row[:, None] * S_PAD + column[None, :]
    half = matrices.to(gl.pointer_type(gl.float16))
    high = a.to(gl.float16)
    # What fp16 leaves of A waits in scratch, where R goes in the end: each thread reads back what it wrote.
    gl.store(half + S_PAD * S_PAD + cell, (a - high.to(gl.float32)).to(gl.float16))
    z = _turned(a, mma) / gl.max(gl.sum(a, 0), 0)
    held = gl.allocate_shared_memory(gl.float16, [3, S_PAD, S_PAD], shared)
    held.index(0).store(high)
    zero = gl.zeros([S_PAD, S_PAD], gl.float32, mma)
    for _ in range(full_iterations):
        held.index(1).store(z.to(gl.float16))
        w = mma_v2(held.index(0).load(left), held.index(1).load(right), zero).to(gl.float16)
        held.index(2).store(w)
        # W is read twice rather than held, since registers are short.
        t = mma_v2(gl.convert_layout(w, left), held.index(2).load(right), -7.0 * w.to(gl.float32)).to(gl.float16)
        held.index(1).store(t)
        y = mma_v2(gl.convert_layout(z.to(gl.float16), left), held.index(2).load(right), zero)
        z = -0.25 * mma_v2(gl.convert_layout(y.to(gl.float16), left), held.index(1).load(right), 15.0 * y - 13.0 * z)
    rounded = z.to(gl.float16)
    held.index(1).store(rounded)
    cell += nothing * S_PAD
    z_right = held.index(1).load(right)
    w = mma_v2(held.index(0).load(left), z_right, zero)
    low = gl.load(half + S_PAD * S_PAD + cell)
    w = mma_v2(gl.convert_layout(low, left), z_right, w)
    gl.store(half + cell, rounded)
    identity = gl.where(row[:, None] == column[None, :], 1.0, 0.0)
    gl.store(half + S_PAD * S_PAD + cell, (identity - w).to(gl.float16))


@gluon.jit(do_not_specialize=[
    "heads", "tokens", "count", "landmark_stride", "bias_stride", "mask_stride", "mask_mode", "splits", "split_tokens", "first_job",
    "step", "full_iterations",
])  # fmt: skip
def landmark_kernel(
    query, key, value, landmarks, bias, key_mask, partial, stats, matrices, colsum,
    heads, tokens, count, head_size, stride_b, stride_h, stride_n, landmark_stride, bias_stride, mask_stride, mask_mode,
    splits, split_tokens, first_job, step, full_iterations, scale,
    S_PAD: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, MATRICES: gl.constexpr,
    IN_REGISTERS: gl.constexpr, CHEBYSHEV: gl.constexpr, HALF: gl.constexpr, UPCAST: gl.constexpr,
):  # fmt: skip
    """As `fna.plugins.kernels.attention.landmark_kernel` with Newton-Schulz in registers. Grid: (B * H, 1 + splits)."""
    gl.static_assert(IN_REGISTERS and HALF and not CHEBYSHEV and not UPCAST and BLOCK_S == S_PAD)
    warps: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])
    shared: gl.constexpr = gl.SwizzledSharedLayout(CHANNELS, 1, 8, [1, 0])
    bh = gl.program_id(0).to(gl.int64)
    job = gl.program_id(1)
    item = bh // heads
    head = item * stride_b + (bh % heads) * stride_h
    query += head
    key += head
    landmarks += item * landmark_stride
    key_mask += item * mask_stride
    if job < 1:
        a = _core(query, key, stride_n, landmarks, bias + item * bias_stride, key_mask, mask_mode, tokens, count, head_size, scale,
                  S_PAD, BLOCK_D, mma)  # fmt: skip
        _newton(a, matrices + bh * MATRICES * S_PAD * S_PAD, full_iterations, step, S_PAD, mma, shared)
    else:
        partial += bh * splits * S_PAD * BLOCK_D
        stats += bh * splits * 2 * S_PAD
        _exact_split(query, key, value + head, stride_n, landmarks, key_mask, mask_mode, partial, stats, job - 1 + first_job,
                     split_tokens, tokens, count, head_size, scale, S_PAD, BLOCK_N // 2, BLOCK_D, mma, shared)  # fmt: skip
