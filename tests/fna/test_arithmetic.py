"""Counts of multiplications, against what PyTorch counts while it computes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fna.arithmetic import (
    block_products,
    correction_products,
    exact_bytes,
    exact_products,
    head_split_bytes,
    nystrom_bytes,
    nystrom_products,
    plan_bytes,
    plan_products,
    saved_part,
)
from fna.attention import nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps
from fna.correction import Correction
from fna.plan import BlockPlan, Plan
from fna.samplers.grid import grid_landmarks


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_fna_multiplies_as_often_as_is_counted(iterations: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 16)
    with FlopCounterMode(display=False) as counter:
        nystrom_attention_reference(query, key, value, grid_landmarks(50, 8, 1), None, 0.25, iterations, False)
    assert counter.get_total_flops() == 2 * nystrom_products(50, 8, 2, 16, iterations)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_fna_with_the_cheaper_core_multiplies_as_often_as_is_counted(steps: int) -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 16)
    core = ChebyshevSteps(steps, 0.05)
    with FlopCounterMode(display=False) as counter:
        nystrom_attention_reference(query, key, value, grid_landmarks(50, 8, 1), None, 0.25, 6, False, chebyshev=core)
    assert counter.get_total_flops() == 2 * nystrom_products(50, 8, 2, 16, 6, core)
    plan = Plan(num_blocks=1, blocks=(BlockPlan(block=0, landmarks=8),), core="chebyshev", steps=steps, low=0.05)
    assert block_products(plan, 0, 50, 2, 16) == nystrom_products(50, 8, 2, 16, 6, core)


def test_exact_attention_multiplies_as_often_as_is_counted() -> None:
    query, key, value = torch.randn(3, 1, 2, 50, 16)
    with FlopCounterMode(display=False) as counter:
        torch.softmax(query @ key.mT, -1) @ value
    assert counter.get_total_flops() == 2 * exact_products(50, 2, 16)


def test_heads_that_stay_exact_count_in_full() -> None:
    correction = Correction(size=3, kernels=((0.0,) * 9,), gains=(1.0,))
    entry = BlockPlan(block=0, landmarks=8, heads=(1,), correction=correction)
    plan = Plan(num_blocks=2, blocks=(entry,))
    taken = nystrom_products(50, 8, 1, 16, 6) + correction_products(50, 1, 16, 3) + exact_products(50, 2, 16)
    assert block_products(plan, 0, 50, 3, 16) == taken
    whole = exact_products(50, 3, 16)
    assert saved_part(plan, 50, 3, 16) == pytest.approx(1 - (taken + whole) / (2 * whole))


@pytest.mark.parametrize(("sampler", "products"), [("fps", 8 * 50 * 48), ("norm-grid", 50 * 48), ("grid", 0)])
@pytest.mark.parametrize(("resample", "times"), [(True, 2), (False, 1)], ids=["own", "shared"])
def test_choosing_landmarks_counts_once_for_blocks_that_share_them(
    sampler: str, products: int, resample: bool, times: int
) -> None:
    blocks = tuple(BlockPlan(block=number, landmarks=8, sampler=sampler) for number in range(2))
    plan = Plan(num_blocks=2, blocks=blocks, resample=resample)
    whole = 2 * exact_products(50, 3, 16)
    taken = 2 * nystrom_products(50, 8, 3, 16, 6) + times * products
    assert saved_part(plan, 50, 3, 16) == pytest.approx(1 - taken / whole, abs=1e-12)


def test_one_head_in_one_block_saves_what_it_saves() -> None:
    entry = BlockPlan(block=0, landmarks=64, heads=(0,), iterations=3)
    plan = Plan(num_blocks=12, blocks=(entry,))
    assert saved_part(plan, 1370, 6, 64) == pytest.approx(0.0124, abs=5e-4)


def test_bytes_of_heads_that_stay_exact_count_in_full_and_so_does_parting_them() -> None:
    plan = Plan(num_blocks=2, blocks=(BlockPlan(block=0, landmarks=8, heads=(1,)),))
    parted = nystrom_bytes(50, 8, 1, 16, 4) + head_split_bytes(50, 3, 16, 4) + exact_bytes(50, 2, 16, 4)
    assert plan_bytes(plan, 50, 3, 16, 4) == parted + exact_bytes(50, 3, 16, 4)


def focal_plan(**settings: object) -> Plan:
    return Plan.model_validate({"num_blocks": 2, "focal": [{"block": 1, "tile": 4, **settings}], "prefix_tokens": 1})


def test_focal_attention_over_single_patches_counts_as_exact_attention() -> None:
    assert plan_products(focal_plan(levels=[[1, 0]], hot=0), 37, 3, 8) == 2 * exact_products(37, 3, 8)


def test_focal_attention_counts_queries_times_keys_of_each_tile() -> None:
    """6 x 6 patches in nine tiles of 2 x 2. A tile in a corner has 5 cells a patch or more away, one at an edge 3, the middle none."""
    corner, edge, middle = 1 + 4 * 4 + 5, 1 + 6 * 4 + 3, 1 + 36
    pairs = 4 * (4 * corner + 4 * edge + middle)
    assert block_products(focal_plan(tile=2, levels=[[1, 0], [2, 1]], hot=0), 1, 37, 1, 1) == 2 * (pairs + 37)
    hot = block_products(focal_plan(tile=2, levels=[[1, 0], [2, 1]], hot=3), 1, 37, 1, 1)
    assert hot == 2 * (pairs + 37) + 2 * 36 * 3 + 36


def test_a_plan_with_focal_blocks_saves_products_and_bytes() -> None:
    plan = Plan.model_validate({"num_blocks": 1, "focal": [{"block": 0}]})
    assert 0.6 < saved_part(plan, 1370, 6, 64) < 0.7
    assert plan_bytes(plan, 1370, 6, 64, 4) < exact_bytes(1370, 6, 64, 4)
