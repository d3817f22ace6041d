"""The search: one choice per block, so that the sum of losses stays within a budget at the least cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Choice = TypeVar("Choice")

BINS = 2000
"""Steps of the loss budget; a loss is rounded up to the next, so that a front never promises more than the sums say."""


@dataclass(frozen=True)
class BlockOption(Generic[Choice]):
    """What one block could be.

    Attributes:
        cost: what is to be small: predicted seconds, or products.
        loss: first-order loss of fidelity, `1 - cosine`, that this block's choice alone causes.
        choice: what it is.
    """

    cost: float
    loss: float
    choice: Choice


@dataclass(frozen=True)
class BlockChoices(Generic[Choice]):
    """One option for every block."""

    cost: float
    loss: float
    choices: tuple[Choice, ...]


def find_front(
    blocks: Sequence[Sequence[BlockOption[Choice]]],
    largest_loss: float,
    bins: int = BINS,
) -> list[BlockChoices[Choice]]:
    """Return the Pareto front of total cost against total loss, cheapest last, by dynamic programming over the loss.

    Losses of blocks are added: to first order their errors are independent. Each is rounded up to a `bins`-th of `largest_loss`.

    Args:
        blocks: the options of each block; each needs one of loss 0 (exact attention), or some front points are missing.
        largest_loss: the largest total loss of interest.
        bins: resolution of the loss.
    """
    step = largest_loss / bins
    best: NDArray[np.float64] = np.zeros(bins + 1)
    picks: list[NDArray[np.int64]] = []
    for options in blocks:
        table = np.full((len(options), bins + 1), np.inf)
        for row, option in enumerate(options):
            used = int(np.ceil(option.loss / step - 1e-9))
            if used <= bins:
                table[row, used:] = best[: bins + 1 - used] + option.cost
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    front: list[BlockChoices[Choice]] = []
    for budget in range(bins + 1):
        if not np.isfinite(best[budget]) or (front and best[budget] >= front[-1].cost * (1 - 1e-9)):
            continue
        front.append(_trace_back(blocks, picks, budget, step))
    return front


def _trace_back(
    blocks: Sequence[Sequence[BlockOption[Choice]]], picks: Sequence[NDArray[np.int64]], budget: int, step: float
) -> BlockChoices[Choice]:
    chosen: list[BlockOption[Choice]] = []
    for options, pick in zip(reversed(blocks), reversed(picks), strict=True):
        option = options[int(pick[budget])]
        chosen.append(option)
        budget -= int(np.ceil(option.loss / step - 1e-9))
    chosen.reverse()
    return BlockChoices(sum(o.cost for o in chosen), sum(o.loss for o in chosen), tuple(o.choice for o in chosen))


def drop_dominated(options: Sequence[BlockOption[Choice]]) -> list[BlockOption[Choice]]:
    """Keep the options that are not both dearer and worse than another, cheapest first."""
    kept: list[BlockOption[Choice]] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
