"""Triton kernels that choose landmarks: farthest point sampling in one launch or in one launch per step.

Squared Euclidean distances in fp32. Every token's distance is summed in the same order, so equal tokens tie exactly, and a
tie goes to the lowest index, as in `fna.samplers.fps.farthest_points_reference`. Features are [B, N, C], contiguous.
"""

import triton
import triton.language as tl

NO_INDEX = tl.constexpr(2147483647)
CHUNK = tl.constexpr(256)


@triton.jit
def _lowest_maximum(value, index):
    """(maximum, the lowest index that has it) of two vectors of equal length."""
    maximum = tl.max(value, 0)
    return maximum, tl.min(tl.where(value == maximum, index, NO_INDEX), 0)


@triton.jit(do_not_specialize=["tokens", "steps"])
def fps_kernel(features, landmarks, tokens, channels, steps, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """All steps for one batch item in one program, distances in registers. N <= BLOCK_N. Grid: (B)."""
    item = tl.program_id(0).to(tl.int64)
    features += item * tokens * channels
    landmarks += item * steps
    token = tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_C)
    row = token.to(tl.int64)[:, None] * channels
    distance = tl.where(token < tokens, float("inf"), float("-inf"))
    index = tl.full([], 0, tl.int32)
    for step in tl.range(0, steps, num_stages=1):
        tl.store(landmarks + step, index)
        sums = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(0, channels, BLOCK_C, num_stages=1):
            channel = start + lane
            inside = channel < channels
            point = tl.load(features + index.to(tl.int64) * channels + channel, mask=inside, other=0.0)
            mask = (token < tokens)[:, None] & inside[None, :]
            x = tl.load(features + row + channel[None, :], mask=mask, other=0.0)
            difference = x.to(tl.float32) - point.to(tl.float32)[None, :]
            sums += tl.sum(difference * difference, 1)
        distance = tl.minimum(distance, sums)
        distance = tl.where(token == index, float("-inf"), distance)
        _, index = _lowest_maximum(distance, token)
        index = tl.minimum(index, tokens - 1)


@triton.jit(do_not_specialize=["tokens", "steps", "step"])
def fps_step_kernel(
    features, landmarks, distance, best, best_index, tokens, channels, steps, step,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One step, spread over the tokens. Grid: (ceil(N / BLOCK_N), B); launched once for each of the S steps.

    Every program first finds the index that the step before left behind (the best of all tiles), then updates its own
    distances and leaves its own best. Tiles' bests alternate between two halves, so that no program overwrites what
    another still reads: best, best_index are [B, 2, tiles]; distance is [B, N].
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    item = tl.program_id(1).to(tl.int64)
    features += item * tokens * channels
    distance += item * tokens
    best += item * 2 * tiles
    best_index += item * 2 * tiles
    index = tl.full([], 0, tl.int32)
    if step > 0:
        maximum = tl.full([], float("-inf"), tl.float32)
        index = tl.full([], NO_INDEX, tl.int32)
        for start in tl.range(0, tiles, CHUNK, num_stages=1):
            slot = start + tl.arange(0, CHUNK)
            before = ((step + 1) % 2) * tiles + slot
            value = tl.load(best + before, mask=slot < tiles, other=float("-inf"))
            place = tl.load(best_index + before, mask=slot < tiles, other=NO_INDEX)
            part, part_index = _lowest_maximum(value, place)
            # Tiles ascend, so an equal value further on never has a lower index.
            index = tl.where(part > maximum, part_index, index)
            maximum = tl.maximum(part, maximum)
        index = tl.minimum(index, tokens - 1)
    if tile == 0:
        tl.store(landmarks + item * steps + step, index)
    if step + 1 < steps:
        token = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row = token.to(tl.int64)[:, None] * channels
        sums = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = channel < channels
            point = tl.load(features + index.to(tl.int64) * channels + channel, mask=inside, other=0.0)
            mask = (token < tokens)[:, None] & inside[None, :]
            x = tl.load(features + row + channel[None, :], mask=mask, other=0.0)
            difference = x.to(tl.float32) - point.to(tl.float32)[None, :]
            sums += tl.sum(difference * difference, 1)
        # At step 0 there are no stored distances yet.
        known = tl.load(distance + token, mask=tl.where(step > 0, token, tokens) < tokens, other=float("inf"))
        nearest = tl.where(token == index, float("-inf"), tl.minimum(known, sums))
        nearest = tl.where(token < tokens, nearest, float("-inf"))
        tl.store(distance + token, nearest, mask=token < tokens)
        top, top_index = _lowest_maximum(nearest, token)
        own = (step % 2) * tiles + tile
        tl.store(best + own, top)
        tl.store(best_index + own, top_index)
