"""Planning the towers of a model one by one, and joining their plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fna.errors import InvalidArgumentError
from fna.export.sources.loading import LoadedModel
from fna.patching import find_attention_blocks
from fna.plan import Plan
from fna.validate.planning.subject import Layout, Subject
from fna.validate.planning.wish import Wish


def towers_to_plan(model: LoadedModel, tower: str | None) -> list[str | None]:
    """The towers to plan for: the one asked for, else those that have blocks that can be FNA; `[None]` for a model of one tower."""
    if tower is not None or not model.towers:
        return [tower]
    blocks = find_attention_blocks(model.module)
    return list(dict.fromkeys(block.tower_name for block in blocks if block.refusal is None))


def check_grids(layouts: Sequence[Layout]) -> None:
    """Refuse to plan together for towers whose patches lie on different grids, where those are no squares.

    Raises:
        InvalidArgumentError: naming the grids.
    """
    grids = list(dict.fromkeys(layout.patches for layout in layouts if layout.patches is not None))
    if len(grids) > 1 and any(rows != columns for rows, columns in grids):
        named = " and ".join(f"{rows}x{columns}" for rows, columns in grids)
        raise InvalidArgumentError(
            f"its towers have patches on grids of {named}, and one plan tells one grid that is no square; make a plan with fna plan "
            "--tower, or take square images"
        )


def leave_out_small(subjects: Sequence[Subject], wish: Wish) -> tuple[list[Subject], list[str]]:
    """Leave out towers where nothing is cheaper than exact attention, and say so; where that is all of them, leave them in."""
    paying = [subject for subject in subjects if wish.tried.candidates(subject.layout)]
    if not paying:
        return list(subjects), []
    small = [subject.layout for subject in subjects if subject not in paying]
    return paying, [
        f"tower {layout.tower} stays exact: nothing is cheaper at its {layout.tokens} tokens" for layout in small
    ]


def share_wish(wish: Wish, count: int) -> Wish:
    """What to ask of each of several plans that are joined: an equal share of the loss, for losses add up."""
    if count == 1:
        return wish

    def share(minimum: float | None) -> float | None:
        return None if minimum is None else 1 - (1 - minimum) / count

    goals = tuple(replace(goal, minimum=1 - (1 - goal.minimum) / count) for goal in wish.goals)
    return replace(wish, min_cosine=share(wish.min_cosine), min_p5=share(wish.min_p5), goals=goals)


def join_plans(plans: Sequence[Plan]) -> Plan:
    """One plan of plans that each replace blocks of another tower."""
    if len(plans) == 1:
        return plans[0]
    first = next((plan for plan in plans if plan.blocks), plans[0])  # a core that it names is that of its blocks
    chosen: dict[str, Any] = {
        key: tuple(sorted((entry for plan in plans for entry in getattr(plan, key)), key=lambda entry: entry.block))
        for key in ("blocks", "focal")
    }
    grids = {plan.patches for plan in plans if plan.patches is not None}
    patches = grids.pop() if len(grids) == 1 else None
    # through the constructor, so that the plan's version fits what is in it
    settings = first.model_dump(exclude={"version", "patches", *chosen})
    return Plan(**settings, **chosen, patches=patches)
