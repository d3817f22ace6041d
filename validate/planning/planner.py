"""`fna plan` as a function: look, measure, search, check against real runs, verify."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fna import __version__
from fna.arithmetic import saved_part
from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.errors import InvalidArgumentError
from fna.plan import BlockPlan, Correction, Method, Plan, parse_layers, uniform_plan
from fna.runtime import Arrays
from fna.samplers import DEFAULT_SAMPLER, all_samplers, find_sampler
from fna.validate.planning.cost import MOST_TOKENS, CostModel, TimeCost, find_break_even
from fna.validate.planning.fidelity import Fidelity, measure_fidelity
from fna.validate.planning.goals import TaskGoal, measure_agreement, resolve_goals
from fna.validate.planning.measure import (
    MOMENTS,
    Candidate,
    Fit,
    Measurement,
    Range,
    SharedFeatures,
    dependence,
    fit_correction,
    measure_block,
)
from fna.validate.planning.search import Choice, Option, drop_dominated, find_front
from fna.validate.planning.subject import BlockView, Subject

Pixels = NDArray[np.float32]
Say = Callable[[str], None]

REFERENCE = 64
"""Landmarks of the candidate that is really run, one block at a time, to scale that block's first-order losses."""

TRIAL_IMAGES = 1
"""Images on which every candidate is measured."""

WORTHWHILE = 1.1
"""A candidate is measured further while its loss is at most this much of that of every cheaper one."""

TYPICAL_COSINE = 0.99
"""Where the search starts if only a task metric is asked for."""

ROUNDS = 8
FRONT_POINTS = 7
CLOSE_ENOUGH = 0.96
"""The search ends when the loss is this much of what is allowed."""

KEEP_BELOW = 0.97
"""The search aims at this part of the loss allowed, for photographs differ."""


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        min_cosine: mean cosine of the final patch tokens to exact attention; None asks for nothing.
        min_p5: the 5th percentile of it; None asks for nothing.
        goals: task metrics to be kept.
        whole_blocks: only all heads of a block, or none.
        tried: the range of candidates.
    """

    min_cosine: float | None = 0.99
    min_p5: float | None = None
    goals: tuple[TaskGoal, ...] = ()
    whole_blocks: bool = False
    tried: Range = field(default_factory=Range)

    def excess(self, found: Fidelity, keep_below: float = 1.0) -> float:
        """By how much the worst of the losses exceeds what is allowed: at most 1 where all that is asked for is kept.

        Args:
            found: what a plan reached.
            keep_below: aim at this part of the mean loss allowed.
        """
        parts = [0.0]
        if self.min_cosine is not None:
            parts.append((1 - found.mean) / (keep_below * (1 - self.min_cosine)))
        if self.min_p5 is not None:
            parts.append((1 - found.p5) / (1 - self.min_p5))
        parts += [(1 - found.tasks[goal.name]) / (1 - goal.minimum) for goal in self.goals]
        return max(parts)

    def describe(self) -> str:
        """What is asked for, in words."""
        parts = [] if self.min_cosine is None else [f"a mean cosine of {self.min_cosine}"]
        parts += [] if self.min_p5 is None else [f"a 5th percentile of {self.min_p5}"]
        return " and ".join([*parts, *(f"{goal.name} of {goal.minimum}" for goal in self.goals)])


@dataclass(frozen=True)
class Picked:
    """What one block becomes: None is exact."""

    candidate: Candidate | None = None
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the front, with what was predicted and, where it was run, measured on the images held out."""

    plan: Plan
    cost: float
    saved: float
    predicted_loss: float
    measured: Fidelity | None = None


@dataclass(frozen=True)
class UniformPoint:
    """A setting that treats all its blocks alike, run on the images held out, to compare with.

    Attributes:
        layers: its FNA blocks, as `--layers` has them.
        landmarks: S.
        sampler: of all of them.
        method: weighted or published.
        cost: as a `FrontPoint` has it.
        saved: part of the products.
        measured: on the images held out.
    """

    layers: str
    landmarks: int
    sampler: str
    method: Method
    cost: float
    saved: float
    measured: Fidelity

    @property
    def label(self) -> str:
        """The setting, for people."""
        return f"blocks {self.layers}, S={self.landmarks}, {self.sampler}, {self.method}"


@dataclass(frozen=True)
class Planned:
    """The result.

    Attributes:
        plan: the winner.
        point: its place on the front, verified.
        front: the Pareto front, dearest first.
        exact_cost: cost of exact attention in all blocks.
        reached: whether the winner keeps what was asked for on the images that it was not planned on.
        notes: what should be said about it.
        uniform: settings alike in all blocks, where they were asked for.
    """

    plan: Plan
    point: FrontPoint
    front: list[FrontPoint]
    exact_cost: float
    reached: bool
    notes: list[str]
    uniform: tuple[UniformPoint, ...] = ()


class Planner:
    """One model, its measurements and the images to check against."""

    def __init__(
        self,
        subject: Subject,
        wish: Wish,
        cost: CostModel,
        images: Sequence[Pixels],
        held_out: Sequence[Pixels],
        cache: Path | None = None,
        say: Say = lambda _text: None,
    ) -> None:
        if not images or not held_out:
            raise InvalidArgumentError(
                f"{len(images)} images to plan on and {len(held_out)} to verify on were given, but at least one of each is needed"
            )
        self.subject, self.wish, self.cost = subject, wish, cost
        self.images, self.held_out = images, held_out
        self.cache, self.say = cache, say
        self.layout = subject.layout
        self.candidates = wish.tried.candidates(self.layout)
        if not self.candidates:
            raise InvalidArgumentError(
                f"no candidate is cheaper than exact attention at {self.layout.tokens} tokens: FNA does not pay there"
            )
        self.blocks = [n for n in range(self.layout.num_blocks) if n not in self.layout.refused]
        self._references: dict[int, Arrays] = {}
        self._resolve_goals()

    # ------------------------------------------------------------ measuring

    def measure(self) -> Measurement:
        """Sum the moments of all planning images; images found in the cache are not run again.

        The first images measure every candidate; what is both dearer and worse than another there is not measured on the rest.
        """
        total = Measurement()
        kept = {number: list(self.candidates) for number in self.blocks}
        for number, pixels in enumerate(self.images):
            self.say(f"looking at image {number + 1} of {len(self.images)}")
            if number == TRIAL_IMAGES:
                kept = self._worthwhile(total)
                total = total.only({(block, c) for block, candidates in kept.items() for c in candidates})
            label = f"moments-{_digest(pixels)}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"
            total.merge(self.cached(label, partial(self._measure_image, pixels, kept)))
        return total

    def _worthwhile(self, measurement: Measurement) -> dict[int, list[Candidate]]:
        """The candidates of each block that no cheaper one clearly beats."""
        fits = self.with_dependence(self.fits(measurement))
        heads, kernel = self.layout.heads, self.kernel
        found: dict[int, list[Candidate]] = {}
        for number in self.blocks:
            rows = [
                (self.cost.block(candidate, heads, kernel), float(fit.losses.sum()), candidate)
                for (block, candidate), fit in fits.items()
                if block == number
            ]
            best = np.inf
            found[number] = []
            for _, loss, candidate in sorted(rows, key=lambda row: row[:2]):
                if loss <= best * WORTHWHILE:
                    found[number].append(candidate)
                best = min(best, loss)
        return found

    def _measure_image(self, pixels: Pixels, candidates: dict[int, list[Candidate]]) -> Measurement:
        measured, shared = Measurement(images=1), SharedFeatures()

        def visit(view: BlockView) -> None:
            found = measure_block(view, self.layout, candidates[view.number], shared, self.wish.tried.kernel)
            measured.add(view.number, found)

        self.subject.look(pixels, visit)
        return measured

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returned when it was called before for this model, these candidates and this version, or call it."""
        if self.cache is None:
            return make()
        key = hashlib.sha256(repr((self.layout, self.wish.tried, __version__)).encode()).hexdigest()[:16]
        path = self.cache / f"{name}-{key}.pt"
        if path.is_file():
            try:
                return _unpack(torch.load(path, weights_only=True))
            except Exception:  # a file cut short by an interruption is made anew
                path.unlink()
        value = make()
        self.cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(_pack(value), partial)
        partial.replace(path)
        return value

    # ------------------------------------------------------------ choosing

    def fits(self, measurement: Measurement) -> dict[tuple[int, Candidate], Fit]:
        """Fit every candidate of every block."""
        return {
            key: fit_correction(moments, measurement.images, corrected=self.wish.tried.corrections)
            for key, moments in measurement.moments.items()
        }

    def with_dependence(self, fits: dict[tuple[int, Candidate], Fit]) -> dict[tuple[int, Candidate], Fit]:
        """Scale the losses of each block's heads by how much the errors of its tokens agree."""
        factors = {
            number: dependence([fit for (block, _), fit in fits.items() if block == number]) for number in self.blocks
        }
        return {key: replace(fit, losses=fit.losses * factors[key[0]]) for key, fit in fits.items()}

    def scales(self, fits: dict[tuple[int, Candidate], Fit]) -> dict[int, float]:
        """Loss of each block alone, really run with a middling candidate, over its first-order loss.

        For subjects without gradients: what an error does on its way to the output is not known then.
        """
        found = {}
        some = self.images[:2]
        preferred = DEFAULT_SAMPLER if DEFAULT_SAMPLER in self.wish.tried.samplers else self.wish.tried.samplers[0]
        for number in self.blocks:
            self.say(f"running block {number} alone")
            candidate = min(
                (c for b, c in fits if b == number),
                key=lambda c: (abs(c.landmarks - REFERENCE), c.sampler != preferred, -c.iterations),
            )
            fit = fits[number, candidate]
            plan = self.make_plan([Picked(candidate, tuple(range(self.layout.heads))) if n == number else Picked()
                                   for n in range(self.layout.num_blocks)], fits)  # fmt: skip
            loss = self.run(plan, some).loss
            found[number] = max(loss, 1e-7) / max(float(fit.losses.sum()), 1e-9)
        return found

    def options(self, fits: dict[tuple[int, Candidate], Fit], scales: dict[int, float]) -> list[list[Option[Picked]]]:
        """What each block could be: exact, or a candidate on the heads that it hurts least, 1 to all of them."""
        heads = self.layout.heads
        result = []
        for number in range(self.layout.num_blocks):
            found: list[Option[Picked]] = [Option(self.cost.exact(heads), 0.0, Picked())]
            for (block, candidate), fit in fits.items():
                if block != number:
                    continue
                losses = fit.losses * scales.get(number, 1.0)
                order = torch.argsort(losses).tolist()
                for count in [heads] if self.wish.whole_blocks else range(1, heads + 1):
                    chosen = tuple(sorted(order[:count]))
                    cost = self.cost.block(candidate, count, self.kernel)
                    found.append(Option(cost, float(losses[list(chosen)].sum()), Picked(candidate, chosen)))
            result.append(drop_dominated(found))
        return result

    def make_plan(self, picks: Sequence[Picked], fits: dict[tuple[int, Candidate], Fit]) -> Plan:
        """Write the plan of one choice per block."""
        entries = []
        for number, pick in enumerate(picks):
            if pick.candidate is None:
                continue
            candidate, fit = pick.candidate, fits[number, pick.candidate]
            looks = find_sampler(candidate.sampler).looks_at_features
            correction = None
            if self.kernel:
                correction = Correction(
                    size=self.kernel,
                    kernels=tuple(tuple(round(x, 5) for x in fit.kernels[head].tolist()) for head in pick.heads),
                    gains=tuple(round(float(fit.gains[head]), 5) for head in pick.heads),
                )
            entries.append(
                BlockPlan(
                    block=number,
                    landmarks=candidate.landmarks,
                    sampler=candidate.sampler,
                    heads=None if len(pick.heads) == self.layout.heads else pick.heads,
                    iterations=candidate.iterations,
                    resample=True if looks and candidate.resample else None,
                    correction=correction,
                )
            )
        return Plan(
            num_blocks=self.layout.num_blocks,
            blocks=tuple(entries),
            prefix_tokens=self.layout.prefix_tokens,
            model=self.layout.model,
            resolution=self.layout.resolution,
            patches=self.layout.patches,
        )

    @property
    def kernel(self) -> int:
        """Side of the corrections' kernels; 0 where nothing is corrected."""
        tried = self.wish.tried
        return tried.kernel if tried.corrections and self.layout.patches is not None else 0

    # ------------------------------------------------------------ running

    def run(self, plan: Plan, images: Sequence[Pixels]) -> Fidelity:
        """Really run a plan and compare with exact attention."""
        exact = [self._reference(pixels) for pixels in images]
        given = [self.subject.run(pixels, plan) for pixels in images]
        expected, reached = ([self.subject.tokens(outputs) for outputs in group] for group in (exact, given))
        found = measure_fidelity(expected, reached, self.layout.prefix_among(len(expected[0])))
        if not self.wish.goals:
            return found
        tasks = {goal.task for goal in self.wish.goals}
        measured = measure_agreement(self.subject.kinds(exact[0]), exact, given, tasks)
        return found.model_copy(update={"tasks": {goal.name: measured[goal.name] for goal in self.wish.goals}})

    def _reference(self, pixels: Pixels) -> Arrays:
        if id(pixels) not in self._references:
            self._references[id(pixels)] = self.subject.run(pixels, None)
        return self._references[id(pixels)]

    def _resolve_goals(self) -> None:
        """Refuse goals that cannot be measured on both groups of images, before anything takes long."""
        if not self.wish.goals:
            return
        self.say("running exact attention")
        for images in (self.images, self.held_out):
            exact = [self._reference(pixels) for pixels in images]
            known = measure_agreement(self.subject.kinds(exact[0]), exact, exact)
            self.wish = replace(self.wish, goals=resolve_goals(self.wish.goals, known))

    def keeps(self, fidelity: Fidelity) -> bool:
        """Whether a fidelity is as asked for."""
        return self.wish.excess(fidelity) <= 1

    def saved(self, plan: Plan) -> float:
        """Part of the attention products that a plan saves."""
        return saved_part(plan, self.layout.tokens, self.layout.heads, self.layout.head_size)


UNIFORM_LANDMARKS = (64, 96, 128, 256)


def uniform_settings() -> list[tuple[str, Method]]:
    """Samplers and methods of users without a plan."""
    weighted: list[tuple[str, Method]] = [(sampler.name, "weighted") for sampler in all_samplers() if sampler.compared]
    return [*weighted, (DEFAULT_SAMPLER, "published")]


def run_uniform_settings(planner: Planner) -> tuple[UniformPoint, ...]:
    """Run FNA alike in the later half of the blocks, in all, and in all but the second quarter, on the images held out.

    These are the settings of users without a plan; those that exact attention would be cheaper than are left out.
    """
    layout, cost = planner.layout, planner.cost
    count, exact = layout.num_blocks, cost.exact(layout.heads)
    names = [f"{count // 2}-{count - 1}", "all"]
    if count >= 4:
        names.append(f"0-{count // 4 - 1},{count // 2}-{count - 1}")
    sizes = [size for size in UNIFORM_LANDMARKS if layout.prefix_tokens < size < layout.tokens]
    found = []
    for name, landmarks, (sampler, method) in product(names, sizes, uniform_settings()):
        blocks = [number for number in parse_layers(name, count) if number in planner.blocks]
        block = cost.block(Candidate(landmarks, sampler, False, NEWTON_SCHULZ_ITERATIONS), layout.heads, 0)
        total = len(blocks) * block + (count - len(blocks)) * exact
        if not blocks or total >= count * exact:
            continue
        plan = uniform_plan(
            count,
            layers=",".join(map(str, blocks)),
            landmarks=landmarks,
            sampler=sampler,
            method=method,
            prefix_tokens=layout.prefix_tokens,
        )
        planner.say(f"running blocks {name}, S={landmarks}, {sampler}, {method} for comparison")
        measured = planner.run(plan, planner.held_out)
        found.append(UniformPoint(name, landmarks, sampler, method, total, planner.saved(plan), measured))
    return tuple(found)


def make_best_plan(planner: Planner) -> Planned:
    """Plan: see `Planner`."""
    say = planner.say
    measurement = planner.measure()
    fits = planner.with_dependence(planner.fits(measurement))
    if any(bool((fit.effects > 0).any()) for fit in fits.values()):
        scales = dict.fromkeys(planner.blocks, 1.0)
    else:
        scales = planner.cached(f"scales-{_digest(np.stack(planner.images[:2]))}", lambda: planner.scales(fits))
    options = planner.options(fits, scales)
    allowed = 1 - (planner.wish.min_cosine or TYPICAL_COSINE)
    say("searching")
    front = find_front(options, largest_loss=40 * allowed, bins=16000)
    if len(front) == 1:
        nearest = [option for found in options for option in found if option.item.candidate is not None]
        if not nearest:
            return _exact_only(planner, front[0])
        # all of it is too lossy: let a real run of the least lossy say so
        front.append(_alone(options, min(nearest, key=lambda option: option.loss)))
    position, plan, on_planning = _settle(planner, front, fits, allowed)
    say("verifying on images not planned on")
    verified = planner.run(plan, planner.held_out)
    exact_cost = planner.cost.exact(planner.layout.heads) * planner.layout.num_blocks
    point = FrontPoint(plan, front[position].cost, planner.saved(plan), front[position].loss, verified)
    points: list[FrontPoint] = []
    for index in _spread(front, position):
        choice = front[index]
        candidate = planner.make_plan(choice.items, fits)
        say(f"running {len(points) + 1} plans of the front")
        measured = verified if index == position else planner.run(candidate, planner.held_out)
        points.append(FrontPoint(candidate, choice.cost, planner.saved(candidate), choice.loss, measured))
    notes = [f"on the images planned on: mean {on_planning.mean:.4f}, 5th percentile {on_planning.p5:.4f}"]
    return Planned(plan, point, points, exact_cost, planner.keeps(verified), notes)


def _say_break_even(planner: Planner) -> list[str]:
    tokens, cost = planner.layout.tokens, planner.cost
    if not isinstance(cost, TimeCost):
        return [f"at {tokens} tokens no candidate takes fewer products than exact attention"]
    found = find_break_even(planner.layout, cost.device, calibration=cost.calibration)
    where = f"break-even is at about {found} tokens" if found < MOST_TOKENS else "there is no break-even"
    return [f"at {tokens} tokens on {cost.device.name} exact attention is faster: {where} (64 landmarks, predicted)"]


def _settle(
    planner: Planner, front: list[Choice[Picked]], fits: dict[tuple[int, Candidate], Fit], allowed: float
) -> tuple[int, Plan, Fidelity]:
    """Find the cheapest point of the front whose real run on the planning images keeps the fidelity, by bisection."""
    low, high = 0, len(front)  # low keeps it (all exact does), high does not
    best: tuple[int, Plan, Fidelity] | None = None
    guess = min(range(1, len(front)), key=lambda i: abs(front[i].loss - allowed))
    for _ in range(ROUNDS):
        plan = planner.make_plan(front[guess].items, fits)
        planner.say(f"running a plan that saves {planner.saved(plan):.0%} of the products")
        found = planner.run(plan, planner.images)
        excess = planner.wish.excess(found, KEEP_BELOW)
        if excess <= 1:
            low, best = guess, (guess, plan, found)
        else:
            high = guess
        if high - low <= 1 or CLOSE_ENOUGH <= excess <= 1:
            break
        # losses are nearly proportional to the predicted ones, so aim, but stay inside the bracket
        aim = front[guess].loss / max(excess, 1e-6)
        if low > 0 and high < len(front):
            aim = (front[low].loss * front[high].loss) ** 0.5
        guess = min(range(low + 1, high), key=lambda i: abs(front[i].loss - aim))
    if best is None:
        best = _most_faithful(planner, front, fits)
    return best


def _most_faithful(
    planner: Planner, front: list[Choice[Picked]], fits: dict[tuple[int, Candidate], Fit]
) -> tuple[int, Plan, Fidelity]:
    """Return the point nearest to exact attention that has any FNA, or say what it reaches if that is not enough."""
    index = next(i for i, choice in enumerate(front) if any(pick.candidate for pick in choice.items))
    plan = planner.make_plan(front[index].items, fits)
    found = planner.run(plan, planner.images)
    if not planner.keeps(found):
        entry = plan.blocks[0]
        raise InvalidArgumentError(
            f"{planner.wish.describe()} cannot be kept with any FNA: the best reachable is {found.describe()}, with "
            f"{entry.landmarks} landmarks in block {entry.block}"
            + (f", head {entry.heads[0]}" if entry.heads else "")
            + "; ask for less, or keep exact attention"
        )
    return index, plan, found


def _alone(options: Sequence[Sequence[Option[Picked]]], option: Option[Picked]) -> Choice[Picked]:
    """One block by an option, the others exact."""
    number = next(number for number, found in enumerate(options) if option in found)
    exact = [found[-1] for found in options]
    assert all(each.item.candidate is None for each in exact)
    chosen = [*exact[:number], option, *exact[number + 1 :]]
    return Choice(sum(each.cost for each in chosen), option.loss, tuple(each.item for each in chosen))


def _exact_only(planner: Planner, choice: Choice[Picked]) -> Planned:
    """The plan where no candidate is cheaper than exact attention."""
    plan = planner.make_plan(choice.items, {})
    point = FrontPoint(plan, choice.cost, 0.0, 0.0, _perfect(planner))
    return Planned(plan, point, [point], choice.cost, True, _say_break_even(planner))


def _perfect(planner: Planner) -> Fidelity:
    return Fidelity(mean=1.0, p5=1.0, first=1.0, tasks={goal.name: 1.0 for goal in planner.wish.goals})


def _spread(front: list[Choice[Picked]], position: int) -> list[int]:
    """Some points of the front, evenly spaced in the logarithm of the loss, the chosen one among them."""
    losses = np.log([max(choice.loss, 1e-9) for choice in front])
    start, stop = np.log(max(front[position].loss, 1e-6) / 20), losses[-1]
    wanted = np.linspace(start, stop, FRONT_POINTS - 1)
    picked = {int(np.abs(losses - value).argmin()) for value in wanted} | {position}
    return sorted(picked)


def _digest(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


def _pack(value: Any) -> Any:
    """Plain containers and tensors only, so that a cache file cannot run code."""
    if isinstance(value, Measurement):
        rows = []
        for (block, c), m in value.moments.items():
            settings = [c.landmarks, c.sampler, c.resample, c.iterations, c.corrected]
            rows.append([block, settings, [getattr(m, name) for name in MOMENTS]])
        return {"images": value.images, "rows": rows}
    return value


def _unpack(value: Any) -> Any:
    from fna.validate.planning.measure import Moments

    if isinstance(value, dict) and "rows" in value:
        moments = {(block, Candidate(*settings)): Moments(*tensors) for block, settings, tensors in value["rows"]}
        return Measurement(value["images"], moments)
    return value
