"""The launches of FocalAttention: the same contract as `fna.plugins.launch_plan`, whose parts it uses."""

from __future__ import annotations

from dataclasses import dataclass

from fna.errors import InvalidArgumentError, InvalidShapeError
from fna.plugins.launch_plan import (
    DTYPES,
    HEAD_SIZE_STEP,
    MASK_ALL,
    MAX_GRID_Y,
    MAX_HEAD_SIZE,
    MAX_HOT,
    MAX_MULTIPROCESSORS,
    MAX_STRIDE,
    NO_MASK,
    Buffer,
    Dtype,
    KernelVariant,
    Launch,
    LaunchPlan,
    Strides,
    aligned,
    lay_out,
    padded_head_size,
)

FOCAL_ROWS = 64
"""Queries of a tile per program."""

KEY_BLOCK: dict[Dtype, int] = {"fp32": 16, "fp16": 32, "bf16": 32}
"""Keys of a list per step."""

FIRST_KEYS = 16
"""Of a list, before whole steps, with 16-bit inputs: so fewer keys at its end are padding."""

LIST_STEP = max(KEY_BLOCK.values())
"""What the room for a list is a multiple of."""

PREFIX_BLOCK, LIST_BLOCK = 64, 128
"""Keys per step of a prefix row, and keys of a list that are prepared at a time."""

SCAN_BLOCK, RANK_BLOCK = 1024, 32
"""Scores that are held against the threshold, and candidates that are ranked, at a time."""

HOT_SPLIT_TOKENS = 256
"""Patches that one of several programs of a head sums and scores, at least."""

FEWEST_HOT_SPLITS = 3
"""Fewer do not make up for the two launches more."""

ALL_STEPS, SUM, SCORE, SELECT = 0, 1, 2, 3
"""The kernel's `step`."""


@dataclass(frozen=True)
class FocalShape:
    """Sizes of one call: B, H, N, D; tiles T, queries of each Q, keys of each K; whether there is a mask, and one for all items."""

    dtype: Dtype
    batch: int
    heads: int
    tokens: int
    head_size: int
    tiles: int
    tile_rows: int
    list_length: int
    masked: bool = False
    shared_mask: bool = False

    @property
    def row_blocks(self) -> int:
        """Programs of one tile and head."""
        return -(-self.tile_rows // FOCAL_ROWS)

    @property
    def row_length(self) -> int:
        """Room for the hot keys and the list of one program."""
        return FIRST_KEYS - (-(MAX_HOT + self.list_length) // LIST_STEP) * LIST_STEP


def check_focal_shape(shape: FocalShape, prefix_tokens: int, hot: int) -> None:
    """Refuse, naming the value, what the kernels do not cover."""
    if shape.dtype not in DTYPES:
        raise InvalidArgumentError(f"the kernels take fp32, fp16 and bf16, but {shape.dtype} was given")
    sizes = (
        ("B", shape.batch), ("H", shape.heads), ("N", shape.tokens), ("T", shape.tiles), ("Q", shape.tile_rows),
        ("K", shape.list_length),
    )  # fmt: skip
    for name, value in sizes:
        if value < 1:
            raise InvalidShapeError(f"{name} is {value}, but at least 1 is needed")
    if shape.head_size < 1 or shape.head_size > MAX_HEAD_SIZE or shape.head_size % HEAD_SIZE_STEP:
        raise InvalidShapeError(
            f"head size D is {shape.head_size}, but the kernels take multiples of {HEAD_SIZE_STEP} up to {MAX_HEAD_SIZE}"
        )
    if not 0 <= prefix_tokens < shape.tokens:
        raise InvalidArgumentError(f"prefix_tokens is {prefix_tokens}, but 0 to {shape.tokens - 1} is needed")
    most = min(MAX_HOT, shape.tokens - prefix_tokens)
    if not 0 <= hot <= most:
        raise InvalidArgumentError(f"hot is {hot}, but the kernels take 0 to {most}")
    for name, elements in (
        ("H * N * D", shape.heads * shape.tokens * shape.head_size),
        ("T * Q", shape.tiles * shape.tile_rows),
        ("T * K", shape.tiles * shape.list_length),
    ):
        if elements > MAX_STRIDE:
            raise InvalidShapeError(f"{name} is {elements} elements, but the kernels take at most {MAX_STRIDE}")
    programs = prefix_tokens + shape.tiles * shape.row_blocks
    if programs > MAX_GRID_Y:
        raise InvalidShapeError(f"{programs} programs a head are needed, but the kernels take at most {MAX_GRID_Y}")
    if shape.batch * shape.heads > MAX_GRID_Y:
        raise InvalidShapeError(f"B * H is {shape.batch * shape.heads}, but the kernels take at most {MAX_GRID_Y}")


def hot_splits(shape: FocalShape, prefix_tokens: int, multiprocessors: int) -> int:
    """Programs of a head that look for hot keys: one, or as many as there are multiprocessors for and work is worth a launch."""
    patches = shape.tokens - prefix_tokens
    wanted = min(multiprocessors, MAX_MULTIPROCESSORS) // (shape.batch * shape.heads)
    splits = min(wanted, -(-patches // HOT_SPLIT_TOKENS))
    return splits if splits >= FEWEST_HOT_SPLITS else 1


def focal_buffers(shape: FocalShape, splits: int) -> dict[str, Buffer]:
    """Scratch of one call; see `fna.plugins.kernels.focal` for the layouts."""
    return _focal_buffers(shape, shape.batch * shape.heads * splits)


def focal_workspace_bound(shape: FocalShape) -> int:
    """Scratch that is enough for `shape`, every smaller B, H, N and D of it, and every GPU, in bytes."""
    buffers = _focal_buffers(shape, max(MAX_MULTIPROCESSORS, shape.batch * shape.heads))
    return max(aligned(b.offset + b.size) for b in buffers.values())


def _focal_buffers(shape: FocalShape, head_splits: int) -> dict[str, Buffer]:
    heads = shape.batch * shape.heads
    every, best = heads * shape.tokens * 4, heads * MAX_HOT * 4
    lists = heads * shape.tiles * shape.row_blocks * shape.row_length * 4
    sizes = {
        "query_sums": head_splits * padded_head_size(shape.head_size) * 4, "hot_scores": every, "candidates": every,
        "hot_values": best, "hot_tokens": best, "offsets": every + best, "listed": lists, "biases": lists,
    }  # fmt: skip
    return lay_out(sizes)


def focal_plan(
    shape: FocalShape,
    *,
    prefix_tokens: int,
    hot: int,
    scale: float,
    multiprocessors: int,
    strides: Strides | None = None,
    out_strides: Strides | None = None,
) -> LaunchPlan:
    """Plan one call of FocalAttention.

    Args:
        shape: the sizes; checked.
        prefix_tokens: class and register tokens at the front.
        hot: keys that score highest against the mean patch query.
        scale: factor on the scores.
        multiprocessors: of the GPU, which decides how many programs look for hot keys.
        strides: of query, key and value (one for all three); linear `[B, H, N, D]` if None.
        out_strides: of the output; linear if None.
    """
    check_focal_shape(shape, prefix_tokens, hot)
    linear = Strides(shape.heads * shape.tokens * shape.head_size, shape.tokens * shape.head_size, shape.head_size)
    taken, written = strides or linear, out_strides or linear
    bh, block_d = shape.batch * shape.heads, padded_head_size(shape.head_size)
    mask = (shape.tokens if shape.masked and not shape.shared_mask else 0, MASK_ALL if shape.masked else NO_MASK)
    sizes = (shape.heads, shape.tokens, prefix_tokens, hot, shape.head_size, taken.batch, taken.head, taken.token)
    splits = hot_splits(shape, prefix_tokens, multiprocessors) if hot else 1
    split_tokens = -(-(shape.tokens - prefix_tokens) // splits)
    prepared = hot > 0 or shape.masked
    launches = [
        Launch(
            KernelVariant("focal_hot", shape.dtype, 0, block_d),
            (bh, splits if step < SELECT else 1, 1),
            (
                "query",
                "key",
                "key_mask",
                "query_sums",
                "hot_scores",
                "candidates",
                "hot_values",
                "hot_tokens",
                "offsets",
            )
            + (*sizes, *mask, splits, split_tokens, step, scale),
        )
        for step in ((ALL_STEPS,) if splits == 1 else (SUM, SCORE, SELECT))
        if prepared
    ]
    launches.append(
        Launch(
            KernelVariant("focal", shape.dtype, 0, block_d),
            (bh, prefix_tokens + shape.tiles * shape.row_blocks, 1),
            (
                "query",
                "key",
                "value",
                "tile_queries",
                "tile_keys",
                "tile_bias",
                "key_mask",
                "hot_tokens",
                "offsets",
                "listed",
                "biases",
            )
            + ("out", *sizes, written.batch, written.head, written.token, *mask)
            + (shape.row_blocks, shape.tile_rows, shape.list_length, shape.row_length, int(prepared), scale),
        )
    )
    return LaunchPlan(tuple(launches), focal_buffers(shape, splits))
