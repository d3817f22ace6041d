"""The programs of a call of FocalAttention, for `fna.plugins.programs`: what the cost of each grows with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fna.plugins.focal_plan import (
    FIRST_KEYS,
    KEY_BLOCK,
    PREFIX_BLOCK,
    RANK_BLOCK,
    FocalShape,
)
from fna.plugins.launch_plan import Launch, LaunchPlan
from fna.plugins.programs import Programs

_STEP, _SPLIT_TOKENS, _SPLITS = -2, -3, -4
"""Where the arguments of `focal_hot` have them."""


USUAL_EXCESS = 3
"""Patches that reach the threshold beside the hot ones, as counted on random keys."""


def focal_programs(
    plan: LaunchPlan, shape: FocalShape, key_counts: Sequence[int], prefix_tokens: int, hot: int
) -> list[list[Programs]]:
    """The programs of each launch, in the order of its grid.

    Args:
        plan: from `focal_plan`.
        shape: that it was made for.
        key_counts: keys of each tile, `[T]`.
        prefix_tokens: that it was made for.
        hot: likewise.
    """
    *preparing, attending = plan.launches
    return [[_hot_programs(launch, hot)] for launch in preparing] + [
        _attending_programs(attending, shape, key_counts, prefix_tokens, hot)
    ]


def _hot_programs(launch: Launch, hot: int) -> Programs:
    splits, tokens, step = (launch.arguments[place] for place in (_SPLITS, _SPLIT_TOKENS, _STEP))
    heads, count, _ = launch.grid
    covered = int(tokens) * int(splits) if count == 1 else int(tokens)  # one program sees what all splits wrote
    lengths = {"tokens": -(-covered // PREFIX_BLOCK), "ranked": -(-(hot + USUAL_EXCESS) // RANK_BLOCK)}
    return Programs(f"{launch.variant.name} step {step}", heads * count, 0, lengths)


def _attending_programs(
    launch: Launch, shape: FocalShape, key_counts: Sequence[int], prefix_tokens: int, hot: int
) -> list[Programs]:
    name, heads = launch.variant.name, launch.grid[0]
    rows = {"keys": -(-shape.tokens // PREFIX_BLOCK)}
    found = [Programs(f"{name} prefix", heads * prefix_tokens, 0, rows)] if prefix_tokens else []
    first = 0 if shape.dtype == "fp32" else FIRST_KEYS
    blocks = [
        -(-(hot + int(count) - first) // KEY_BLOCK[shape.dtype])
        for count in key_counts
        for _ in range(shape.row_blocks)
    ]
    job = prefix_tokens
    for length, alike in groupby(blocks):
        count = len(list(alike))
        found.append(Programs(f"{name} tile", heads * count, job * heads, {"keys": length}))
        job += count
    return found
