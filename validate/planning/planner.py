"""A model's measurements, what each block could be, and plans that are really run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fna.arithmetic import saved_part
from fna.errors import InvalidArgumentError
from fna.plan import BlockPlan, Correction, Plan
from fna.runtime import Arrays
from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.validate.planning.cache import digest_pixels, load_or_make
from fna.validate.planning.cost import CostModel
from fna.validate.planning.fidelity import Fidelity, measure_fidelity
from fna.validate.planning.goals import measure_agreement, resolve_goals
from fna.validate.planning.measure import (
    Candidate,
    Fit,
    Measurement,
    SharedFeatures,
    dependence,
    fit_correction,
    measure_block,
)
from fna.validate.planning.search import BlockOption, drop_dominated
from fna.validate.planning.subject import BlockView, Subject
from fna.validate.planning.wish import Wish

Pixels = NDArray[np.float32]
Say = Callable[[str], None]

REFERENCE = 64
"""Landmarks of the candidate that is really run, one block at a time, to scale that block's first-order losses."""

TRIAL_IMAGES = 1
"""Images on which every candidate is measured."""

WORTHWHILE = 1.1
"""A candidate is measured further while its loss is at most this much of that of every cheaper one."""


@dataclass(frozen=True)
class PickedHeads:
    """What one block becomes: None is exact."""

    candidate: Candidate | None = None
    heads: tuple[int, ...] = ()


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
            label = f"moments-{digest_pixels(pixels)}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"
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
        return load_or_make(self.cache, name, (self.layout, self.wish.tried), make)

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
            plan = self.make_plan([PickedHeads(candidate, tuple(range(self.layout.heads))) if n == number else PickedHeads()
                                   for n in range(self.layout.num_blocks)], fits)  # fmt: skip
            loss = self.run(plan, some).loss
            found[number] = max(loss, 1e-7) / max(float(fit.losses.sum()), 1e-9)
        return found

    def options(
        self, fits: dict[tuple[int, Candidate], Fit], scales: dict[int, float]
    ) -> list[list[BlockOption[PickedHeads]]]:
        """What each block could be: exact, or a candidate on the heads that it hurts least, 1 to all of them."""
        heads = self.layout.heads
        result = []
        for number in range(self.layout.num_blocks):
            found: list[BlockOption[PickedHeads]] = [BlockOption(self.cost.exact(heads), 0.0, PickedHeads())]
            for (block, candidate), fit in fits.items():
                if block != number:
                    continue
                losses = fit.losses * scales.get(number, 1.0)
                order = torch.argsort(losses).tolist()
                for count in [heads] if self.wish.whole_blocks else range(1, heads + 1):
                    chosen = tuple(sorted(order[:count]))
                    cost = self.cost.block(candidate, count, self.kernel)
                    found.append(BlockOption(cost, float(losses[list(chosen)].sum()), PickedHeads(candidate, chosen)))
            result.append(drop_dominated(found))
        return result

    def make_plan(self, picks: Sequence[PickedHeads], fits: dict[tuple[int, Candidate], Fit]) -> Plan:
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
