"""`fna plan` as a function: look, measure, search, check against real runs, verify."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from fna.errors import InvalidArgumentError
from fna.threads import one_thread
from fna.validate.planning.alone import with_losses_run_alone
from fna.validate.planning.cache import digest_pixels
from fna.validate.planning.clock import CpuCost
from fna.validate.planning.cost import MOST_TOKENS, TimeCost, find_break_even
from fna.validate.planning.fidelity import Fidelity
from fna.validate.planning.planner import FEW_TOKENS, Fits, PickedHeads, Planner, Scales
from fna.validate.planning.result import FrontPlan, Planned
from fna.validate.planning.search import BlockChoices, BlockOption, find_front

TYPICAL_COSINE = 0.99
"""Where the search starts if only a task metric is asked for."""

BINS, FINE_BINS = 16_000, 64_000
"""Steps of the largest loss in a search; finer where the losses of single blocks are real."""

ROUNDS = 8
SHOWN = (0.999, 0.995, 0.99, 0.98)
"""Mean cosines that points of the front are shown and really run for."""

CLOSE_ENOUGH = 0.9
"""A search ends when the loss is this much of what is allowed."""

MOST_REFINED = 4
"""So many more plans than are shown are run at most on the images held out, to find the cheapest that keeps what is asked for."""

KEEP_BELOW = 0.97
"""The search aims at this part of the loss allowed, for photographs differ."""


def make_best_plan(planner: Planner) -> Planned:
    """Plan: see `Planner`.

    Where there are few tokens PyTorch takes one thread, unless OMP_NUM_THREADS says how many: at 518 pixels two wait for one another
    longer than they save, at 1022 they halve the time (docs/notes/planning.md).
    """
    with one_thread(planner.layout.tokens <= FEW_TOKENS and "OMP_NUM_THREADS" not in os.environ):
        return _plan(planner)


def _plan(planner: Planner) -> Planned:
    say = planner.say
    measurement = planner.measure()
    fits = planner.with_dependence(planner.fits(measurement))
    if any(bool((fit.effects > 0).any()) for fit in fits.values()):
        scales: Scales = {}
    else:
        scales = planner.cached(f"scales-{digest_pixels(np.stack(planner.few_images))}", lambda: planner.scales(fits))
    options = planner.options(fits, scales)
    allowed = 1 - (planner.wish.min_cosine or TYPICAL_COSINE)
    bins = BINS
    if planner.cost.unit == "seconds":
        bins = FINE_BINS
        options = with_losses_run_alone(planner, options, fits, allowed, bins)
    say("searching")
    front = find_front(options, largest_loss=40 * allowed, bins=bins)
    if len(front) == 1:
        nearest = [
            option for block_options in options for option in block_options if option.choice.candidate is not None
        ]
        if not nearest:
            return _exact_only(planner, front[0])
        # all of it is too lossy: let a real run of the least lossy say so
        front.append(_alone(options, min(nearest, key=lambda option: option.loss)))
    front = _worth_it(planner, front)
    if len(front) == 1:
        return _exact_only(planner, front[0])
    position, on_planning = _settle(planner, front, fits, allowed)
    fidelities, refined = _verify(planner, front, fits, position)
    points = {index: _front_plan(planner, front[index], fits, fidelities[index]) for index in sorted(fidelities)}
    excesses = {index: _excess(planner, fidelity) for index, fidelity in fidelities.items() if _replaces(front[index])}
    # Of all that were run: what is predicted and what is reached do not fall in quite the same order.
    keeping = [index for index, excess in excesses.items() if excess <= 1]
    chosen = max(keeping) if keeping else min(excesses, key=excesses.__getitem__)
    point = points[chosen]
    notes = [
        f"on {len(planner.some_images)} of the images planned on: mean {on_planning.mean:.4f}, 5th percentile {on_planning.p5:.4f}"
    ]
    if refined:
        notes[0] += (
            f"; {len(fidelities)} plans were run on the others, {refined} of them to come nearer to what was asked for"
        )
    exact_cost = planner.cost.baseline()[0] * len(planner.layout.own_blocks)
    reached = planner.keeps(fidelities[chosen])
    return Planned(point.plan, point, list(points.values()), exact_cost, reached, notes)


def _front_plan(planner: Planner, choice: BlockChoices[PickedHeads], fits: Fits, fidelity: Fidelity) -> FrontPlan:
    plan = planner.make_plan(choice.choices, fits)
    return FrontPlan(plan, choice.cost, planner.saved(plan), choice.loss, fidelity)


def _excess(planner: Planner, fidelity: Fidelity) -> float:
    """By how much a real run exceeds what the search aims at, which is a little less than what is allowed."""
    return planner.wish.excess(fidelity, KEEP_BELOW)


def _worth_it(planner: Planner, front: list[BlockChoices[PickedHeads]]) -> list[BlockChoices[PickedHeads]]:
    """All exact, and what costs less than exact attention in its fastest form."""
    most = planner.cost.baseline()[0] * len(planner.layout.own_blocks)
    return [front[0], *(choice for choice in front[1:] if choice.cost < most)]


def _say_break_even(planner: Planner) -> list[str]:
    tokens, cost = planner.layout.tokens, planner.cost
    if isinstance(cost, CpuCost):
        return [f"at {tokens} tokens on this machine's onnxruntime exact attention is faster, as {cost.baseline()[1]}"]
    if not isinstance(cost, TimeCost):
        return [f"at {tokens} tokens no candidate takes fewer products than exact attention"]
    break_even = find_break_even(planner.layout, cost.device, calibration=cost.calibration)
    where = f"break-even is at about {break_even} tokens" if break_even < MOST_TOKENS else "there is no break-even"
    return [f"at {tokens} tokens on {cost.device.name} exact attention is faster: {where} (64 landmarks, predicted)"]


def _settle(
    planner: Planner, front: list[BlockChoices[PickedHeads]], fits: Fits, allowed: float
) -> tuple[int, Fidelity]:
    """Find the cheapest point of the front whose real run on the planning images keeps the fidelity, by bisection.

    On some of the planning images: what is found here is judged on the images held out.
    """
    low, high = 0, len(front)  # low keeps it (all exact does), high does not
    best: tuple[int, Fidelity] | None = None
    guess = min(range(1, len(front)), key=lambda i: abs(front[i].loss - allowed))
    for _ in range(ROUNDS):
        plan = planner.make_plan(front[guess].choices, fits)
        planner.say(f"running a plan that saves {planner.saved(plan):.0%} of the products")
        fidelity = planner.run(plan, planner.some_images)
        excess = _excess(planner, fidelity)
        if excess <= 1:
            low, best = guess, (guess, fidelity)
        else:
            high = guess
        if high - low <= 1 or CLOSE_ENOUGH <= excess <= 1:
            break
        # losses are nearly proportional to the predicted ones, so aim, but stay inside the bracket
        aim = front[guess].loss / max(excess, 1e-6)
        if low > 0 and high < len(front):
            aim = (front[low].loss * front[high].loss) ** 0.5
        guess = min(range(low + 1, high), key=lambda i: abs(front[i].loss - aim))
    return best or _most_faithful(planner, front, fits)


def _verify(
    planner: Planner, front: list[BlockChoices[PickedHeads]], fits: Fits, position: int
) -> tuple[dict[int, Fidelity], int]:
    """Run points of the front on the images held out: one, those that are shown, and some to come nearer to what is asked for.

    Returns what each kept, by its index, and how many were run to come nearer.
    """
    fidelities: dict[int, Fidelity] = {}

    def run(index: int) -> None:
        planner.say(f"verifying on images not planned on: plan {len(fidelities) + 1}")
        fidelities[index] = planner.run(planner.make_plan(front[index].choices, fits), planner.held_out)

    run(position)
    for index in _spread(front, position, fidelities[position]):
        if index not in fidelities:
            run(index)
    for refined in range(MOST_REFINED):
        excesses = {index: _excess(planner, fidelity) for index, fidelity in fidelities.items()}
        keeping = max((index for index, excess in excesses.items() if excess <= 1), default=0)
        short = min((index for index in excesses if index > keeping), default=len(front))
        if excesses.get(keeping, 0.0) >= CLOSE_ENOUGH or short - keeping <= 1 or short == len(front):
            return fidelities, refined
        nearest = max(front[keeping].loss, front[short].loss / (2 * excesses[short]))
        aim = (nearest * front[short].loss) ** 0.5
        run(min(range(keeping + 1, short), key=lambda index: abs(front[index].loss - aim)))
    return fidelities, MOST_REFINED


def _replaces(choice: BlockChoices[PickedHeads]) -> bool:
    return any(pick.candidate is not None for pick in choice.choices)


def _most_faithful(planner: Planner, front: list[BlockChoices[PickedHeads]], fits: Fits) -> tuple[int, Fidelity]:
    """Return the point nearest to exact attention that is not exact, or say what it reaches if that is not enough."""
    index = next(index for index, choice in enumerate(front) if _replaces(choice))
    plan = planner.make_plan(front[index].choices, fits)
    fidelity = planner.run(plan, planner.images)
    if not planner.keeps(fidelity):
        raise InvalidArgumentError(
            f"{planner.wish.describe()} cannot be kept with FNA or focal attention: the best reachable is {fidelity.describe()}, with "
            f"{plan.describe_blocks()}; ask for less, or keep exact attention"
        )
    return index, fidelity


def _alone(
    options: Sequence[Sequence[BlockOption[PickedHeads]]], option: BlockOption[PickedHeads]
) -> BlockChoices[PickedHeads]:
    """One block by an option, the others exact."""
    number = next(number for number, block_options in enumerate(options) if option in block_options)
    exact = [block_options[-1] for block_options in options]
    assert all(each.choice.candidate is None for each in exact)
    chosen = [*exact[:number], option, *exact[number + 1 :]]
    return BlockChoices(sum(each.cost for each in chosen), option.loss, tuple(each.choice for each in chosen))


def _exact_only(planner: Planner, choice: BlockChoices[PickedHeads]) -> Planned:
    """The plan where no candidate is cheaper than exact attention."""
    plan = planner.make_plan(choice.choices, {})
    exact_cost = planner.cost.baseline()[0] * len(planner.layout.own_blocks)
    point = FrontPlan(plan, exact_cost, 0.0, 0.0, _perfect(planner))
    return Planned(plan, point, [point], exact_cost, True, _say_break_even(planner))


def _perfect(planner: Planner) -> Fidelity:
    return Fidelity(mean=1.0, p5=1.0, first=1.0, tasks={goal.name: 1.0 for goal in planner.wish.goals})


def _spread(front: list[BlockChoices[PickedHeads]], position: int, verified: Fidelity) -> list[int]:
    """Points of the front that should come near `SHOWN` on the images held out, the chosen one among them."""
    losses = np.array([choice.loss for choice in front])
    more = max(verified.loss, 1e-6) / max(front[position].loss, 1e-9)
    return sorted({int(np.abs(losses * more - (1 - cosine)).argmin()) for cosine in SHOWN} | {position})
