"""The search finds what trying everything finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fna.validate.planning.search import BlockOption, drop_dominated, find_front


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_trying_everything_gives(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = [
        [
            BlockOption(10.0, 0.0, "exact"),
            *(BlockOption(float(c), float(k) / 100, f"{c}") for c, k in random.integers(1, 10, (3, 2))),
        ]
        for _ in range(4)
    ]
    front = find_front(blocks, largest_loss=0.3, bins=30)
    for budget in range(31):
        allowed = budget / 100 + 1e-9
        fitting = [c for c in itertools.product(*blocks) if sum(o.loss for o in c) <= allowed]
        cheapest = min(sum(option.cost for option in choice) for choice in fitting)
        found = min(choice.cost for choice in front if choice.loss <= allowed)
        assert found == pytest.approx(cheapest)


def test_points_of_the_front_get_cheaper_and_worse() -> None:
    blocks = [[BlockOption(5.0, 0.0, 0), BlockOption(3.0, 0.1, 1), BlockOption(1.0, 0.4, 2)]] * 3
    front = find_front(blocks, largest_loss=2.0)
    assert [choice.cost for choice in front] == sorted((choice.cost for choice in front), reverse=True)
    assert [choice.loss for choice in front] == sorted(choice.loss for choice in front)
    assert front[0].choices == (0, 0, 0)
    assert front[-1].choices == (2, 2, 2)
    for choice in front:
        assert choice.loss == pytest.approx(sum(blocks[0][pick].loss for pick in choice.choices))


def test_an_option_that_is_dearer_and_worse_is_dropped() -> None:
    options = [
        BlockOption(2.0, 0.2, "a"),
        BlockOption(3.0, 0.3, "b"),
        BlockOption(3.0, 0.1, "c"),
        BlockOption(5.0, 0.0, "d"),
    ]
    assert [option.choice for option in drop_dominated(options)] == ["a", "c", "d"]
