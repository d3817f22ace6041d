"""A model's measurements, what each block could be, and plans that are really run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fna.arithmetic import saved_part
from fna.chebyshev import CHEBYSHEV
from fna.correction import Correction
from fna.errors import InvalidArgumentError
from fna.plan import BlockPlan, Plan
from fna.runtime import Arrays
from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.validate.planning import subject as looking
from fna.validate.planning.cache import digest_pixels, load_or_make
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate, measured_as
from fna.validate.planning.cost import CostModel
from fna.validate.planning.fidelity import Fidelity, measure_fidelity
from fna.validate.planning.goals import measure_agreement, resolve_goals
from fna.validate.planning.measure import (
    SAMPLED_ROWS,
    Fit,
    Measurement,
    SharedFeatures,
    dependence,
    fit_correction,
    measure_block,
)
from fna.validate.planning.measure_focal import SAMPLED_QUERIES, measure_focal
from fna.validate.planning.search import BlockOption, drop_dominated
from fna.validate.planning.subject import BlockView, Subject
from fna.validate.planning.wish import Wish

Pixels = NDArray[np.float32]
Say = Callable[[str], None]

Fits = dict[tuple[int, AnyCandidate], Fit]
Scales = dict[tuple[int, str], float]
"""Factors on the losses of a block, for FNA and for focal attention."""

REFERENCE = 64
"""Landmarks of the candidate that is really run, one block at a time, to scale that block's first-order losses."""

RUN_IMAGES, FEW_TOKENS = 4, 2500
"""At most so many planning images are really run by plans; where there are more tokens than that, losses are measured on them only."""

TRIAL_IMAGES = 1
"""Images on which every candidate is measured."""

WORTHWHILE = 1.1
"""A candidate is measured further while its loss is at most this much of that of every cheaper one."""


@dataclass(frozen=True)
class PickedHeads:
    """What one block becomes: None is exact."""

    candidate: AnyCandidate | None = None
    heads: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        """Of its attention."""
        return "exact" if self.candidate is None else self.candidate.kind


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
        images = self.images if self.layout.tokens <= FEW_TOKENS else self.some_images
        for number, pixels in enumerate(images):
            self.say(f"looking at image {number + 1} of {len(images)}")
            if number == TRIAL_IMAGES:
                kept = self._worthwhile(total)
                total = total.only({(block, c) for block, candidates in kept.items() for c in candidates})
            label = f"moments-{digest_pixels(pixels)}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"
            total.merge(self.cached(label, partial(self._measure_image, pixels, kept)))
        return total

    def _worthwhile(self, measurement: Measurement) -> dict[int, list[AnyCandidate]]:
        """The candidates of each block that no cheaper one clearly beats; one of the same kind, if heads may be split."""
        fits = self.with_dependence(self.fits(measurement))
        rows: dict[tuple[int, str], list[tuple[float, float, AnyCandidate]]] = {}
        for (number, candidate), fit in fits.items():
            cost = self._cost(candidate, self.layout.heads)
            group = (number, "" if self.whole_blocks else candidate.kind)
            rows.setdefault(group, []).append((cost, float(fit.losses.sum()), candidate))
        worthwhile: dict[int, dict[AnyCandidate, None]] = {number: {} for number in self.blocks}
        for (number, _), group_rows in rows.items():
            best = np.inf
            for _, loss, candidate in sorted(group_rows, key=lambda row: row[:2]):
                if loss <= best * WORTHWHILE:
                    worthwhile[number][measured_as(candidate)] = None
                best = min(best, loss)
        return {number: list(candidates) for number, candidates in worthwhile.items()}

    def _measure_image(self, pixels: Pixels, candidates: dict[int, list[AnyCandidate]]) -> Measurement:
        measured, shared = Measurement(images=1), SharedFeatures()

        def visit(view: BlockView) -> None:
            kept = candidates[view.number]
            nystrom = [candidate for candidate in kept if isinstance(candidate, Candidate)]
            focal = [candidate for candidate in kept if isinstance(candidate, FocalCandidate)]
            measured.add(view.number, measure_block(view, self.layout, nystrom, shared, self.wish.tried.kernel))
            measured.add(view.number, measure_focal(view, self.layout, focal))

        self.subject.look(pixels, visit)
        return measured

    def cached(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what `make` returned when it was called before for this model, these candidates and this version, or call it."""
        if self.cache is None:
            return make()
        measured_by = (looking.PROBES, SAMPLED_ROWS, SAMPLED_QUERIES)
        return load_or_make(self.cache, name, (self._weights, self.layout, self.wish.tried, measured_by), make)

    @cached_property
    def _weights(self) -> str:
        return self.subject.fingerprint()

    # ------------------------------------------------------------ choosing

    def fits(self, measurement: Measurement) -> Fits:
        """Fit every candidate of every block, FNA with and without a correction where there may be one."""
        return {
            (number, candidate): fit_correction(moments, measurement.images, corrected=_is_corrected(candidate))
            for (number, measured), moments in measurement.moments.items()
            for candidate in self._variants(measured)
        }

    def _variants(self, measured: AnyCandidate) -> list[AnyCandidate]:
        if self.kernel and isinstance(measured, Candidate):
            return [replace(measured, corrected=True), measured]
        return [measured]

    def _cost(self, candidate: AnyCandidate, heads: int) -> float:
        return self.cost.block(candidate, heads, self.kernel if _is_corrected(candidate) else 0)

    def with_dependence(self, fits: Fits) -> Fits:
        """Scale the losses of each block's heads by how much the errors of its tokens agree, for each family of candidates apart."""
        families: dict[tuple[int, str], list[Fit]] = {}
        for (number, candidate), fit in fits.items():
            families.setdefault((number, candidate.family), []).append(fit)
        factors = {key: dependence(members) for key, members in families.items()}
        return {
            (number, candidate): replace(fit, losses=fit.losses * factors[number, candidate.family])
            for (number, candidate), fit in fits.items()
        }

    def scales(self, fits: Fits) -> Scales:
        """Loss of each block alone, really run with a middling candidate of each kind, over its first-order loss.

        For subjects without gradients: what an error does on its way to the output is not known then.
        """
        scales: Scales = {}
        for number, kind in dict.fromkeys((number, candidate.kind) for number, candidate in fits):
            self.say(f"running block {number} alone, {kind}")
            candidate = self._middling([c for b, c in fits if (b, c.kind) == (number, kind)])
            pick = PickedHeads(candidate, tuple(range(self.layout.heads)))
            loss = self.run_alone(number, pick, fits).loss
            scales[number, kind] = max(loss, 1e-7) / max(float(fits[number, candidate].losses.sum()), 1e-9)
        return scales

    def _middling(self, candidates: Sequence[AnyCandidate]) -> AnyCandidate:
        """Of the candidates of one kind, one that is neither the cheapest nor the dearest."""
        tried = self.wish.tried.samplers
        preferred = DEFAULT_SAMPLER if DEFAULT_SAMPLER in tried else tried[0]
        nystrom = [c for c in candidates if isinstance(c, Candidate)]
        if nystrom:
            return min(
                nystrom,
                key=lambda c: (abs(c.landmarks - REFERENCE), c.sampler != preferred, -c.iterations, -c.corrected),
            )
        by_cost = sorted(candidates, key=lambda c: self._cost(c, self.layout.heads))
        return by_cost[len(by_cost) // 2]

    def options(self, fits: Fits, scales: Scales) -> list[list[BlockOption[PickedHeads]]]:
        """What each block could be: focal, or FNA on all heads; where heads may be split, also on those it hurts least; last, exact.

        What is both dearer and worse than another of its kind is left out, and what is dearer than exact.
        """
        heads = self.layout.heads
        result = []
        own = self.layout.own_blocks
        for number in range(self.layout.num_blocks):
            exact = BlockOption(self.cost.exact(heads) if number in own else 0.0, 0.0, PickedHeads())
            options: dict[str, list[BlockOption[PickedHeads]]] = {}
            for (block, candidate), fit in fits.items():
                if block != number:
                    continue
                losses = fit.losses * scales.get((number, candidate.kind), 1.0)
                order = torch.argsort(losses).tolist()
                splits = isinstance(candidate, Candidate) and not self.whole_blocks
                for count in range(1, heads + 1) if splits else [heads]:
                    chosen = tuple(sorted(order[:count]))
                    cost = self._cost(candidate, count)
                    if cost < exact.cost:
                        option = BlockOption(cost, float(losses[list(chosen)].sum()), PickedHeads(candidate, chosen))
                        options.setdefault(candidate.kind, []).append(option)
            result.append([*(each for kind in options.values() for each in drop_dominated(kind)), exact])
        return result

    def make_plan(self, picks: Sequence[PickedHeads], fits: Fits) -> Plan:
        """Write the plan of one choice per block."""
        chosen = list(enumerate(picks))
        return Plan(
            num_blocks=self.layout.num_blocks,
            blocks=tuple(
                self._nystrom_block(number, pick.candidate, pick.heads, fits[number, pick.candidate])
                for number, pick in chosen
                if isinstance(pick.candidate, Candidate)
            ),
            focal=tuple(
                pick.candidate.plan(number) for number, pick in chosen if isinstance(pick.candidate, FocalCandidate)
            ),
            prefix_tokens=None if self.layout.towers else self.layout.prefix_tokens,
            towers=self.layout.towers,
            model=self.layout.model,
            resolution=self.layout.resolution,
            patches=self.layout.patches,
        )

    def _nystrom_block(self, number: int, candidate: Candidate, heads: tuple[int, ...], fit: Fit) -> BlockPlan:
        correction = None
        if candidate.corrected:
            correction = Correction(
                size=self.kernel,
                kernels=tuple(tuple(round(x, 5) for x in fit.kernels[head].tolist()) for head in heads),
                gains=tuple(round(float(fit.gains[head]), 5) for head in heads),
            )
        looks = find_sampler(candidate.sampler).looks_at_features
        core: dict[str, Any] = {"iterations": candidate.iterations}
        if candidate.chebyshev is not None:
            core = {"core": CHEBYSHEV, "steps": candidate.chebyshev.steps, "low": candidate.chebyshev.low}
        return BlockPlan(
            block=number,
            landmarks=candidate.landmarks,
            sampler=candidate.sampler,
            heads=None if len(heads) == self.layout.heads else heads,
            **core,
            resample=True if looks and candidate.resample else None,
            correction=correction,
        )

    @property
    def whole_blocks(self) -> bool:
        """Whether all heads of a block are of one kind: unless asked for otherwise, where products cannot say what a split costs."""
        asked = self.wish.whole_blocks
        return self.cost.unit == "products" if asked is None else asked

    @property
    def kernel(self) -> int:
        """Side of the corrections' kernels; 0 where nothing is corrected."""
        tried = self.wish.tried
        return tried.kernel if tried.corrections and self.layout.patches is not None else 0

    # ------------------------------------------------------------ running

    @property
    def some_images(self) -> Sequence[Pixels]:
        """Planning images that plans are really run on, from all parts of the list."""
        return self.images[:: -(-len(self.images) // RUN_IMAGES)]

    @property
    def few_images(self) -> Sequence[Pixels]:
        """Planning images that single blocks are really run on: one where there are many tokens, or twenty runs would take long."""
        return self.images[: 2 if self.layout.tokens <= FEW_TOKENS else 1]

    def run_alone(self, number: int, pick: PickedHeads, fits: Fits) -> Fidelity:
        """Really run one block by a choice, the others exact, on a few of the planning images."""
        exact = [PickedHeads()] * self.layout.num_blocks
        plan = self.make_plan([*exact[:number], pick, *exact[number + 1 :]], fits)
        return self.run(plan, self.few_images)

    def run(self, plan: Plan, images: Sequence[Pixels]) -> Fidelity:
        """Really run a plan and compare with exact attention; a run found in the cache is not made again."""
        tasks = [goal.name for goal in self.wish.goals]
        said = f"{plan.model_dump_json()} {tasks} {[digest_pixels(pixels) for pixels in images]}"
        label = f"run-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
        return Fidelity.model_validate(self.cached(label, lambda: self._run(plan, images).model_dump()))

    def _run(self, plan: Plan, images: Sequence[Pixels]) -> Fidelity:
        exact = [self._reference(pixels) for pixels in images]
        planned = [self.subject.run(pixels, plan) for pixels in images]
        expected, reached = ([self.subject.tokens(outputs) for outputs in group] for group in (exact, planned))
        fidelity = measure_fidelity(expected, reached, self.layout.prefix_among(len(expected[0])))
        if not self.wish.goals:
            return fidelity
        tasks = {goal.task for goal in self.wish.goals}
        measured = measure_agreement(self.subject.kinds(exact[0]), exact, planned, tasks)
        return fidelity.model_copy(update={"tasks": {goal.name: measured[goal.name] for goal in self.wish.goals}})

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
        """Part of the attention products that a plan saves, of the tower planned for."""
        layout = self.layout
        return saved_part(plan, layout.tokens, layout.heads, layout.head_size, layout.own_blocks)


def _is_corrected(candidate: AnyCandidate) -> bool:
    return isinstance(candidate, Candidate) and candidate.corrected
