"""Losses to first order give way to those of blocks that are really run alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fna.validate.planning.alone import with_losses_run_alone
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate
from fna.validate.planning.planner import PickedHeads
from fna.validate.planning.search import BlockOption, find_front

FEW, MANY = (PickedHeads(Candidate(count, "grid", False, 6), (0, 1)) for count in (16, 64))
NEAR, FAR = (PickedHeads(FocalCandidate(4, levels, 2), (0, 1)) for levels in (((1, 0), (2, 1)), ((1, 0), (2, 2))))
EXACT = PickedHeads()
ALLOWED = 0.01
BINS = 2000


def block(
    few: float = 0.005, many: float = 0.004, far: float = 0.008, near: float = 0.001
) -> list[BlockOption[PickedHeads]]:
    """Options by their loss; FNA with few landmarks costs least, then with many, then focal attention with far keys and near ones."""
    named = ((1.0, few, FEW), (2.0, many, MANY), (3.0, near, NEAR), (4.0, far, FAR))
    return [*(BlockOption(cost, loss, pick) for cost, loss, pick in named), BlockOption(10.0, 0.0, EXACT)]


@dataclass
class RealLosses:
    """Stands in for a planner whose model is known: a run of one block alone loses its first-order loss times a factor."""

    factors: dict[AnyCandidate | None, float]
    options: list[list[BlockOption[PickedHeads]]]
    asked: list[tuple[int, PickedHeads]] = field(default_factory=list)

    def say(self, _text: str) -> None:
        pass

    def run_alone(self, number: int, pick: PickedHeads, _fits: Any) -> SimpleNamespace:
        self.asked.append((number, pick))
        predicted = next(option.loss for option in self.options[number] if option.choice == pick)
        return SimpleNamespace(loss=predicted * self.factors.get(pick.candidate, 1.0))


def corrected(factors: dict[AnyCandidate | None, float], options: list[list[BlockOption[PickedHeads]]]) -> RealLosses:
    planner = RealLosses(factors, options)
    planner.options = with_losses_run_alone(planner, options, {}, ALLOWED, BINS)
    return planner


def test_the_choices_near_what_is_allowed_have_the_losses_that_were_run() -> None:
    options = [block(), block()]
    planner = corrected({FEW.candidate: 3.0, MANY.candidate: 2.0, NEAR.candidate: 1.5}, options)
    assert planner.asked
    assert len(set(planner.asked)) == len(planner.asked)
    assert all(pick.candidate is not None for _, pick in planner.asked)
    for number, pick in planner.asked:
        first = next(option.loss for option in options[number] if option.choice == pick)
        known = next(option.loss for option in planner.options[number] if option.choice == pick)
        assert known == pytest.approx(first * {FEW: 3.0, MANY: 2.0, NEAR: 1.5}.get(pick, 1.0))


def test_choices_that_were_not_run_are_scaled_with_those_of_their_block_and_kind() -> None:
    planner = corrected({FEW.candidate: 1.5}, [block(many=0.012)])
    assert (0, FEW) in planner.asked
    assert (0, MANY) not in planner.asked
    known = {option.choice: option.loss for option in planner.options[0]}
    assert known[FEW] == pytest.approx(1.5 * 0.005)
    assert known[MANY] == pytest.approx(1.5 * 0.012)
    assert known[FAR] == pytest.approx(0.008)


def test_a_block_that_loses_more_than_predicted_becomes_what_loses_less() -> None:
    options = [block(near=0.003)]
    chosen = {}
    for factor in (1.0, 5.0):
        planner = corrected({FEW.candidate: factor, MANY.candidate: factor}, options)
        front = find_front(planner.options, largest_loss=2 * ALLOWED, bins=BINS)
        within = [choice for choice in front if choice.loss <= ALLOWED]
        chosen[factor] = min(within, key=lambda choice: choice.cost).choices[0]
    assert chosen == {1.0: FEW, 5.0: NEAR}
