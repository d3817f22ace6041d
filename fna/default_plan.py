"""The plan of commands that are given none: the best setting that needs no photographs, by measurements on one model."""

from __future__ import annotations

from fna.focal_keys import Levels
from fna.plan import FocalBlockPlan, Plan

FEWEST_PATCHES = 900
"""Fewer leave the model exact: at 256 patches focal attention saves little and is no faster."""

MANY_PATCHES = 3000
"""From here on far cells of 4 x 4 patches lose as little as those of 2 x 2 do at 1369 patches."""

TILE = 8
LEVELS: tuple[Levels, Levels] = (((1, 0), (2, 2)), ((1, 0), (2, 2), (4, 12)))
HOT = (16, 32)
"""Levels and hot keys of every block, with fewer and with at least `MANY_PATCHES`. Measured on DINOv2-S at 224, 518 and 1022
pixels: docs/plan.md."""


def plan_without_photographs(
    num_blocks: int, refused: set[int], patches: tuple[int, int] | None, prefix_tokens: int
) -> tuple[Plan, str]:
    """Return a plan for a model that nothing else is known of, and a line that says what it is and why.

    Args:
        num_blocks: attention blocks of the model.
        refused: of those, the ones that stay as they are.
        patches: rows and columns of patches; None where they are not on a grid that is known.
        prefix_tokens: class and register tokens.
    """
    exact = Plan(num_blocks=num_blocks, prefix_tokens=prefix_tokens)
    if patches is None:
        return (
            exact,
            "the model stays exact: its tokens are not on a grid that is known; choose --layers and --landmarks",
        )
    count = patches[0] * patches[1]
    if count < FEWEST_PATCHES:
        return exact, (
            f"the model stays exact: at {count} patches nothing pays (from {FEWEST_PATCHES} on it does); choose --layers and "
            "--landmarks, or a plan by fna plan"
        )
    many = count >= MANY_PATCHES
    focal = tuple(
        FocalBlockPlan(block=number, tile=TILE, levels=LEVELS[many], hot=HOT[many], seed=number)
        for number in range(num_blocks)
        if number not in refused
    )
    made = Plan(num_blocks=num_blocks, focal=focal, prefix_tokens=prefix_tokens, patches=patches)
    return made, "all blocks focal, as no plan and no setting was given; fna plan finds what keeps more, or costs less"
