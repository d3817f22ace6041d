"""Plans for one tower, for each in turn, and for several images at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from called_models import SIDE, make_scene, make_towers

import fna
from fna.arithmetic import exact_products
from fna.errors import InvalidArgumentError
from fna.export.sources.loading import LoadedModel, wrap_model
from fna.plan import BlockPlan, FocalBlockPlan, Plan
from fna.validate.planning.best_plan import make_best_plan
from fna.validate.planning.candidates import SearchRange
from fna.validate.planning.cost import ProductCost
from fna.validate.planning.planner import Planner
from fna.validate.planning.result import Planned
from fna.validate.planning.subject import TorchSubject
from fna.validate.planning.towers import check_grids, join_plans, leave_out_small, share_wish, towers_to_plan
from fna.validate.planning.wish import Wish

TRIED = SearchRange(samplers=("grid",), landmarks=(8, 64), iterations=(6,), shared=False, focal=(), corrections=False)
TOWERS = {"vision": "0-1", "depth": "2-4"}


def plan_for(model: LoadedModel, tower: str) -> Planned:
    subject = TorchSubject(model, SIDE, SIDE, tower)
    pixels = list(np.random.default_rng(0).standard_normal((2, *model.input_shape(SIDE, SIDE)), np.float32))
    wish = Wish(min_cosine=0.3, tried=TRIED)
    return make_best_plan(Planner(subject, wish, ProductCost(subject.layout), pixels[:1], pixels[1:]))


def test_one_tower_is_planned_for_and_the_others_stay_exact() -> None:
    model = wrap_model("tests:towers", make_towers())
    assert towers_to_plan(model, None) == ["vision", "depth"]
    planned = plan_for(model, "vision")
    assert planned.plan.towers == TOWERS
    assert planned.plan.blocks
    assert {block.block for block in planned.plan.blocks} <= {0, 1}
    assert planned.point.measured is not None
    layout = TorchSubject(model, SIDE, SIDE, "vision").layout
    assert layout.own_blocks == [0, 1]
    # What is saved is a part of its own two blocks' products, not of all five.
    assert planned.exact_cost == 2 * exact_products(layout.tokens, layout.heads, layout.head_size)
    assert planned.point.saved == pytest.approx(1 - planned.point.cost / planned.exact_cost)
    depth = plan_for(model, "depth")  # whose tokens are the second output
    assert depth.plan.blocks
    assert {block.block for block in depth.plan.blocks} <= {2, 3, 4}
    assert depth.point.measured is not None
    assert depth.point.measured.mean < 1
    fna.patch(model.module, planned.plan)
    with pytest.raises(InvalidArgumentError, match=r"all towers at once .*vision, depth"):
        TorchSubject(model, SIDE, SIDE)


def test_a_tower_where_nothing_pays_stays_exact_and_is_said() -> None:
    model = wrap_model("tests:towers", make_towers())
    wish = Wish(min_cosine=0.3, tried=TRIED)
    subjects = [TorchSubject(model, SIDE, SIDE, tower) for tower in TOWERS]
    assert leave_out_small(subjects, wish) == (subjects, [])
    subjects[0].layout = replace(subjects[0].layout, tokens=9)
    assert leave_out_small(subjects, wish) == (
        subjects[1:],
        ["tower vision stays exact: nothing is cheaper at its 9 tokens"],
    )
    assert leave_out_small(subjects[:1], wish) == (subjects[:1], [])  # planning then says why


def test_towers_of_different_grids_that_are_no_squares_are_refused() -> None:
    layout = TorchSubject(wrap_model("tests:towers", make_towers()), SIDE, SIDE, "vision").layout
    square, wide = replace(layout, patches=(4, 4)), replace(layout, patches=(4, 6))
    check_grids([layout, square])
    check_grids([wide, wide])
    with pytest.raises(InvalidArgumentError, match="patches on grids of 8x8 and 4x6"):
        check_grids([layout, wide])


def test_sixteen_images_at_once_are_planned_for() -> None:
    model = wrap_model("tests:scene", make_scene(frames=16, depth=1))
    planned = plan_for(model, "global_blocks")
    assert [block.block for block in planned.plan.blocks] == [1]
    assert planned.point.saved > 0.2
    assert planned.point.measured is not None


def test_plans_of_towers_are_joined_and_each_is_given_a_share_of_the_loss() -> None:
    plans = [
        Plan(num_blocks=5, towers=TOWERS, blocks=(BlockPlan(block=4, landmarks=16),), resolution=(32, 32)),
        Plan(num_blocks=5, towers=TOWERS, focal=(FocalBlockPlan(block=1),), patches=(8, 8), resolution=(32, 32)),
    ]
    joined = join_plans(plans)
    assert ([block.block for block in joined.blocks], [block.block for block in joined.focal]) == ([4], [1])
    assert (joined.towers, joined.resolution, joined.patches) == (TOWERS, (32, 32), (8, 8))
    assert Plan.model_validate_json(joined.dump_json()) == joined
    shared = share_wish(Wish(0.98, 0.9), 2)
    assert (shared.min_cosine, shared.min_p5) == (pytest.approx(0.99), pytest.approx(0.95))
