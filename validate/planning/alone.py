"""Losses of blocks that are really run alone, for plans whose blocks cost a time.

To first order a loss is known to within a few times (docs/notes/planning.md). A plan near what is allowed rests on twelve of them, so
the twelve are run, those of the same block and kind are scaled by what that showed, and the search begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fna.validate.planning.planner import Fits, PickedHeads, Planner
from fna.validate.planning.search import BlockOption, find_front

AIMS = (0.5, 0.8)
"""Parts of the loss allowed; the choices of the plans predicted to lose so much are run."""

ROUNDS = 3
"""So many times plans are searched and their choices run, at most: what was run changes what is chosen."""

SMALLEST_LOSS = 1e-7
"""Below it a loss is rounding, of which no factor is taken."""

Options = Sequence[Sequence[BlockOption[PickedHeads]]]
Run = dict[tuple[int, PickedHeads], float]
"""Losses of blocks run alone."""


def with_losses_run_alone(
    planner: Planner, options: Options, fits: Fits, allowed: float, bins: int
) -> list[list[BlockOption[PickedHeads]]]:
    """Return the options with losses as real runs of single blocks on a few of the planning images have them.

    Args:
        planner: runs the blocks.
        options: of each block, with losses to first order.
        fits: of all candidates.
        allowed: mean loss of a plan.
        bins: resolution of the search.
    """
    real: Run = {}
    corrected = [list(block_options) for block_options in options]
    for _ in range(ROUNDS):
        front = find_front(corrected, largest_loss=2 * allowed, bins=bins)
        near = [min(front, key=lambda choice: abs(choice.loss - aim * allowed)) for aim in AIMS]
        chosen = dict.fromkeys((number, pick) for choice in near for number, pick in enumerate(choice.choices))
        new = [(number, pick) for number, pick in chosen if pick.candidate is not None and (number, pick) not in real]
        if not new:
            break
        for number, pick in new:
            planner.say(f"running block {number} alone, {pick.kind}")
            real[number, pick] = planner.run_alone(number, pick, fits).loss
        corrected = [_corrected(number, block_options, real) for number, block_options in enumerate(options)]
    return corrected


def _corrected(
    number: int, block_options: Sequence[BlockOption[PickedHeads]], real: Run
) -> list[BlockOption[PickedHeads]]:
    """Options of one block: with the losses that were run, and others of the same kind by the geometric mean of their factors."""
    factors: dict[str, list[float]] = {}
    for option in block_options:
        if (number, option.choice) in real:
            factor = max(real[number, option.choice], SMALLEST_LOSS) / max(option.loss, SMALLEST_LOSS)
            factors.setdefault(option.choice.kind, []).append(factor)
    scales = {kind: float(np.exp(np.log(found).mean())) for kind, found in factors.items()}
    return [
        replace(option, loss=real.get((number, option.choice), option.loss * scales.get(option.choice.kind, 1.0)))
        for option in block_options
    ]
