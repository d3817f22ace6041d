"""Counted programs: order on the multiprocessors, what a plan's launches hold, and costs by length."""

from __future__ import annotations

import heapq
import random

import pytest

from fna.plugins.launch_plan import AttentionShape, attention_plan
from fna.plugins.programs import (
    LAUNCH_CYCLES,
    CtaCount,
    Multiprocessors,
    ProgramCost,
    Programs,
    attention_programs,
    counted_programs,
    critical_path,
    exact_programs,
    launch_cycles,
)


def test_the_critical_path_is_list_scheduling() -> None:
    assert critical_path([(1, 5), (2, 3)], 2) == 6 + LAUNCH_CYCLES
    assert critical_path([(4, 1)], 4) == 1 + LAUNCH_CYCLES
    assert critical_path([(2, 2), (1, 8)], 1) == 12 + LAUNCH_CYCLES


def test_whole_rounds_at_once_change_nothing() -> None:
    random_numbers = random.Random(0)
    for _ in range(200):
        groups = [(random_numbers.randint(1, 40), random_numbers.randint(1, 30)) for _ in range(3)]
        count = random_numbers.randint(1, 7)
        free = [0.0] * count
        for each, cycles in groups:
            for _ in range(each):
                heapq.heapreplace(free, free[0] + cycles)
        assert critical_path(groups, count) == max(free) + LAUNCH_CYCLES


@pytest.mark.parametrize("landmarks", [64, 100, 256])
def test_the_programs_of_a_plan_are_its_grid(landmarks: int) -> None:
    shape = AttentionShape("fp16", 1, 3, 1370, 64, landmarks)
    plan = attention_plan(shape, scale=0.125, iterations=6, exact_rows=True, multiprocessors=16)
    launches = attention_programs(plan, shape, 16, 6)
    for launch, parts in zip(plan.launches, launches, strict=True):
        x, y, z = launch.grid
        assert sum(programs.count for programs in parts) == x * y * z
        assert all(programs.first < x * y * z for programs in parts)
    keys = sum(
        programs.count * programs.lengths["keys"] for parts in launches for programs in parts if "split" in programs.key
    )
    assert keys == 3 * -(-1370 // 64) * (2 if landmarks > 128 else 1)  # every block of keys once, by each tile of rows


def test_exact_attention_grows_with_the_square_of_the_tokens() -> None:
    on, costs = Multiprocessors(16), counted_programs()
    few, many = (launch_cycles(exact_programs("fp16", tokens, 12, 64), costs, on) for tokens in (4096, 16384))
    assert many / few == pytest.approx(16, rel=0.05)


def test_slower_tensor_cores_bound_what_they_bound() -> None:
    costs = {"a": ProgramCost(CtaCount(tensor=100, issue=60), {"keys": CtaCount(tensor=10)})}
    launch = [Programs("a", 1, 0, {"keys": 2})]
    assert launch_cycles(launch, costs, Multiprocessors(1)) == 120 + LAUNCH_CYCLES
    assert launch_cycles(launch, costs, Multiprocessors(1, 512)) == 240 + LAUNCH_CYCLES
    assert launch_cycles(launch, costs, Multiprocessors(1, 4096)) == 60 + LAUNCH_CYCLES
