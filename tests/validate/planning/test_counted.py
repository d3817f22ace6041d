"""Seconds by count: what they grow with, and what bounds them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fna.chebyshev import ChebyshevSteps
from fna.engines.targets import find_target
from fna.errors import InvalidArgumentError, InvalidLandmarksError, InvalidShapeError
from fna.focal_keys import Levels
from fna.plugins.programs import Multiprocessors
from fna.validate.planning.cost import device_of
from fna.validate.planning.counted import NystromSetting, counted_focal_seconds, counted_seconds

ORIN = device_of(find_target("jetson-agx-orin"))
CHEBYSHEV = ChebyshevSteps(8, 0.05)


def test_nystrom_pays_more_with_more_tokens() -> None:
    over = [
        counted_seconds(ORIN, tokens, 12, 64, NystromSetting(64)) / counted_seconds(ORIN, tokens, 12, 64)
        for tokens in (257, 577, 1370, 5330)
    ]
    assert over == sorted(over, reverse=True)
    assert over[-1] < 0.2 < 0.5 < over[0]


def test_the_cheaper_core_is_cheaper_at_128_landmarks() -> None:
    newton, chebyshev = (
        counted_seconds(ORIN, 1370, 12, 64, NystromSetting(128, chebyshev=core)) for core in (None, CHEBYSHEV)
    )
    assert chebyshev < newton / 2
    fewer = counted_seconds(ORIN, 1370, 12, 64, NystromSetting(128, chebyshev=ChebyshevSteps(4, 0.05)))
    assert fewer < chebyshev


@pytest.mark.parametrize("setting", [None, NystromSetting(64)])
def test_a_faster_clock_more_multiprocessors_and_a_wider_type_change_it(setting: NystromSetting | None) -> None:
    device = replace(ORIN, bandwidth=1e15)
    usual = counted_seconds(device, 1370, 6, 64, setting)
    assert counted_seconds(replace(device, clock=2 * device.clock), 1370, 6, 64, setting) == pytest.approx(usual / 2)
    assert counted_seconds(replace(device, on=Multiprocessors(64)), 1370, 6, 64, setting) < usual
    assert counted_seconds(replace(device, dtype="fp32"), 1370, 6, 64, setting) > usual


def test_bytes_bound_it_where_memory_is_slow() -> None:
    slow = replace(ORIN, bandwidth=7e6)
    moved = 4 * 1370 * 6 * 64 * 2
    assert counted_seconds(slow, 1370, 6, 64) == pytest.approx(moved / (0.7 * 7e6))


def test_what_the_kernels_do_not_take_is_named() -> None:
    with pytest.raises(InvalidShapeError, match="head size D is 160"):
        counted_seconds(ORIN, 1370, 6, 160)
    with pytest.raises(InvalidLandmarksError, match="64 landmarks were given for 50 tokens"):
        counted_seconds(ORIN, 50, 6, 64, NystromSetting(64))


def test_focal_attention_pays_more_with_more_tokens_and_less_with_more_keys() -> None:
    device = replace(ORIN, bandwidth=1e15)

    def over(side: int, levels: Levels, hot: int = 16) -> float:
        focal = counted_focal_seconds(device, (side, side), 1, 12, 64, tile=8, levels=levels, hot=hot)
        return focal / counted_seconds(device, side * side + 1, 12, 64)

    few, many = ((1, 0), (2, 2), (4, 6)), ((1, 0), (2, 2))
    assert over(73, few) < 0.25 < over(37, few) < 0.4
    assert over(37, few) < over(37, few, hot=64) < over(37, many, hot=64) < 1


def test_bytes_bound_focal_attention_where_memory_is_slow() -> None:
    slow = replace(ORIN, bandwidth=7e6)
    seconds = counted_focal_seconds(slow, (37, 37), 1, 6, 64, tile=8, levels=((1, 0), (2, 2)), hot=16)
    assert seconds == pytest.approx(
        6 * 1370 * 6 * 64 * 2 / (0.7 * 7e6)
    )  # two tensors for the hot keys, four for the tiles


def test_focal_settings_that_the_kernels_do_not_take_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="hot is 65"):
        counted_focal_seconds(ORIN, (37, 37), 1, 12, 64, tile=8, levels=((1, 0),), hot=65)
