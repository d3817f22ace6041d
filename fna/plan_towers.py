"""Numbers of a plan's blocks where the model has several towers: a file counts tower by tower, the program through all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fna.block_numbers import parse_layers
from fna.errors import InvalidPlanError

BLOCK_LISTS = ("blocks", "focal")
"""The fields of a plan whose blocks name their tower in a file."""


def name_towers_of_blocks(
    blocks: Iterable[Mapping[str, Any]], towers: Mapping[str, str], num_blocks: int
) -> list[dict[str, Any]]:
    """Return a plan's blocks as a file has them: with their tower, and the number in it."""
    places = _places(towers, num_blocks)
    return [{**block, "tower": tower, "block": place} for block in blocks for tower, place in [places[block["block"]]]]


def number_through(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a file's plan with the blocks' numbers in the whole model; what is malformed is left for the plan's own checks.

    Raises:
        ValueError: if towers cannot be read, or do not hold a block that is listed.
    """
    towers, count = plan.get("towers"), plan.get("num_blocks")
    if (
        not isinstance(towers, dict)
        or not isinstance(count, int)
        or not all(isinstance(blocks, str) for blocks in towers.values())
    ):
        return plan
    try:
        numbers = {place: number for number, place in _places(towers, count).items()}
    except InvalidPlanError as error:
        raise ValueError(f"towers: {error}") from None
    for key in BLOCK_LISTS:
        blocks = []
        for block in plan.get(key, ()):
            if not isinstance(block, dict):
                return plan
            place = (block.get("tower"), block.get("block"))
            if place not in numbers:
                raise ValueError(f"{key} name block {place[1]} of tower {place[0]}, which towers do not hold")
            settings = {name: value for name, value in block.items() if name != "tower"}
            blocks.append({**settings, "block": numbers[place]})
        if blocks:
            plan = {**plan, key: sorted(blocks, key=lambda block: block["block"])}
    return plan


def check_towers(towers: Mapping[str, str], num_blocks: int) -> None:
    """Refuse towers that do not hold each block of the model once.

    Raises:
        ValueError: saying which blocks they hold.
    """
    numbers = sorted(number for blocks in towers.values() for number in parse_layers(blocks, num_blocks))
    if numbers != list(range(num_blocks)):
        raise ValueError(f"towers must hold each of the {num_blocks} blocks once, but they hold {numbers}")


def _places(towers: Mapping[str, str], num_blocks: int) -> dict[int, tuple[str, int]]:
    """The tower of each block of the whole model, and its number there."""
    numbers = {name: parse_layers(blocks, num_blocks) for name, blocks in towers.items()}
    return {number: (name, place) for name, own in numbers.items() for place, number in enumerate(own)}
