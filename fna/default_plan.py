"""The plan of commands that are given none: the best setting that needs no photographs, by measurements on one model."""

from __future__ import annotations

from typing import Any

from fna.focal_keys import Levels
from fna.plan import FocalBlockPlan, Plan, uniform_plan

FEWEST_PATCHES = 900
"""Fewer leave the model exact: at 256 patches nothing saves much, and nothing is faster."""

MANY_PATCHES = 3000
"""From here on far cells of 4 x 4 patches lose as little as those of 2 x 2 do at 1369 patches."""

LANDMARKS = 128
"""Of the later half of the blocks, which become FNA. Attention is local in the first half, where FNA is weak and focal strong."""

TILE = 8
LEVELS: tuple[Levels, Levels] = (((1, 0), (2, 2)), ((1, 0), (2, 2), (4, 12)))
HOT = (16, 32)
"""Levels and hot keys of focal blocks, with fewer and with at least `MANY_PATCHES`. Measured on DINOv2-S at 224, 518 and 1022
pixels: docs/plan.md."""


def plan_without_photographs(
    num_blocks: int,
    refused: set[int],
    patches: tuple[int, int] | None,
    prefix_tokens: int | None,
    towers: dict[str, str] | None = None,
) -> tuple[Plan, str]:
    """Return a plan for a model that nothing else is known of, and a line that says what it is and why.

    Args:
        num_blocks: attention blocks of the model.
        refused: of those, the ones that stay as they are; in a model of several towers, all blocks of the others too.
        patches: rows and columns of patches; None where they are not on a grid that is known.
        prefix_tokens: class and register tokens; None has each tower's own.
        towers: the blocks of each tower, in a model of several.
    """
    settings: dict[str, Any] = {"num_blocks": num_blocks, "prefix_tokens": prefix_tokens, "towers": towers or {}}
    exact = Plan(**settings)
    if patches is None:
        return exact, "stays exact: its tokens are not on a grid that is known; choose --layers and --landmarks"
    count = patches[0] * patches[1]
    if count < FEWEST_PATCHES:
        return exact, (
            f"stays exact: at {count} patches nothing pays (from {FEWEST_PATCHES} on it does); choose --layers and --landmarks, or a "
            "plan by fna plan"
        )
    many = count >= MANY_PATCHES
    later = uniform_plan(num_blocks, landmarks=LANDMARKS, towers=towers)
    focal = tuple(
        FocalBlockPlan(block=number, tile=TILE, levels=LEVELS[many], hot=HOT[many], seed=number)
        for number in range(num_blocks)
        if number not in refused and number not in later.replaced_blocks
    )
    blocks = tuple(block for block in later.blocks if block.block not in refused)
    core: dict[str, Any] = {"core": later.core, "steps": later.steps, "low": later.low} if blocks else {}
    return Plan(**settings, blocks=blocks, focal=focal, patches=patches, **core), (
        f"has the first half of its blocks focal, the later half FNA with {LANDMARKS} landmarks, as no plan and no setting was "
        "given; fna plan finds what keeps more, or costs less"
    )
