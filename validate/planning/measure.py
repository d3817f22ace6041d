"""How much each candidate would hurt, block by block and head by head, from one pass over each image.

For every candidate the second moments of three things are summed over tokens and images: shifted values, FNA's output, exact
attention's output, all in the metric of the final tokens. A correction (`fna.plan.Correction`) is then a small linear system per
head, and so is what it leaves; no candidate needs a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fna.attention import nystrom_attention_iterates
from fna.chebyshev import ChebyshevSteps
from fna.samplers import LandmarkRequest, find_sampler, landmark_bias
from fna.samplers.common.frames import landmarks_over_frames
from fna.validate.planning.candidates import AnyCandidate, Candidate
from fna.validate.planning.subject import BlockView, Layout

RIDGE = 1e-4
"""Part of the mean diagonal added to a correction's system; there are tens of unknowns against tens of thousands of equations."""

SAMPLED_ROWS = 512
"""Patches of an image that second moments are taken over; a correction has tens of unknowns, and each patch D equations."""

MOMENTS = ("gram", "cross", "energy", "fixed", "effect")


@dataclass
class Moments:
    """Sums over tokens and images, per head: F holds the shifted values and FNA's output, y is exact attention's output.

    Attributes:
        gram: `F^T F`, `[H, K+1, K+1]`, over the rows that a correction changes.
        cross: `F^T y`, `[H, K+1]`, over the same rows.
        energy: `y^T y`, `[H]`, over the same rows.
        fixed: squared error in the rows that no correction changes (prefix tokens), `[H]`.
        effect: second moments over the view's gradients of their products with F and with y, `[H, K+2, K+2]`; zeros where there
            are no gradients.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    fixed: Tensor
    effect: Tensor

    def add(self, other: Moments) -> Moments:
        """Add another image's sums."""
        return Moments(*(getattr(self, name) + getattr(other, name) for name in MOMENTS))


@dataclass(frozen=True)
class Fit:
    """A candidate's loss per head, and the correction that goes with it.

    Attributes:
        losses: first-order `1 - cosine` per head, `[H]`, as if the errors of tokens were independent.
        effects: the same with their dependence, `[H]`, from few random directions and so noisy; zeros where there are no gradients.
        kernels: `[H, K]`.
        gains: `[H]`.
    """

    losses: Tensor
    effects: Tensor
    kernels: Tensor
    gains: Tensor


def fit_correction(moments: Moments, images: int, *, corrected: bool) -> Fit:
    """Solve for the kernels and gains that leave the least error, or leave FNA as it is."""
    count = moments.gram.shape[-1]
    gram, cross = moments.gram.double(), moments.cross.double()
    plain = torch.zeros_like(cross)
    plain[:, -1] = 1.0
    weights = plain
    if corrected and count > 1:
        lift = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        matrix = gram + lift[:, None, None] * torch.eye(count, dtype=gram.dtype)
        # towards plain FNA, not towards nothing
        weights = plain + torch.linalg.solve(matrix, cross - (gram @ plain[..., None])[..., 0])
    left = moments.energy.double() - 2 * (weights * cross).sum(-1)
    left = left + (weights * (gram @ weights[..., None])[..., 0]).sum(-1)
    losses = (left.clamp(min=0) + moments.fixed.double()) / images
    whole = torch.cat([weights, -torch.ones_like(weights[:, :1])], dim=1)  # F w - y
    effects = (whole * (moments.effect.double() @ whole[..., None])[..., 0]).sum(-1).clamp(min=0) / images
    return Fit(losses, effects, weights[:, :-1], weights[:, -1])


def dependence(fits: Sequence[Fit]) -> Tensor:  # [H]
    """By how much the dependence of tokens' errors raises the loss of each head of a block: one factor for all candidates.

    A single candidate's factor is noisy; the geometric mean over all of them is less so.
    """
    ratios = [torch.log((fit.effects + 1e-12) / (fit.losses + 1e-12)) for fit in fits if bool((fit.effects > 0).any())]
    return torch.exp(torch.stack(ratios).mean(0)) if ratios else torch.ones_like(fits[0].losses)


@dataclass
class Measurement:
    """All moments of a model, and from how many images."""

    images: int = 0
    moments: dict[tuple[int, AnyCandidate], Moments] = field(default_factory=dict)

    def add(self, block: int, by_candidate: Mapping[Any, Moments]) -> None:
        """Add one block's moments on one image."""
        for candidate, moments in by_candidate.items():
            key = (block, candidate)
            self.moments[key] = self.moments[key].add(moments) if key in self.moments else moments

    def only(self, keys: set[tuple[int, AnyCandidate]]) -> Measurement:
        """The same with some blocks' candidates only."""
        return Measurement(self.images, {key: moments for key, moments in self.moments.items() if key in keys})

    def merge(self, other: Measurement) -> None:
        """Add all that another measurement holds."""
        self.images += other.images
        for (block, candidate), moments in other.moments.items():
            self.add(block, {candidate: moments})


class SharedFeatures:
    """The hidden states of the first block of the image in work, which shared landmarks are chosen from."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.orders: dict[str, Tensor] = {}


def measure_block(
    view: BlockView, layout: Layout, candidates: Sequence[Candidate], shared: SharedFeatures, kernel: int
) -> dict[Candidate, Moments]:
    """Return the moments of every candidate for one block of one image.

    Second moments are taken over `SAMPLED_ROWS` of the patches, scaled to all; what tokens share, and the effects, over all.
    """
    if shared.hidden is None:
        shared.hidden = view.hidden
    prefix = layout.prefix_tokens
    taps = Taps(view.value[0, :, prefix:], layout.patches, kernel)
    count_patches = view.value.shape[2] - prefix
    exact = view.exact[0] @ view.root
    sample = _sample(count_patches)
    some = (taps.at(sample).mT @ view.root[:, None]).mT  # [H, R, D, K]
    some_exact = exact[:, prefix:][:, sample]
    whole = _products(some.flatten(1, 2), some.flatten(1, 2))
    with_exact = _products(some.flatten(1, 2), some_exact.flatten(1)[..., None])[..., 0]
    energy = some_exact.square().sum((1, 2))
    plain_sum, exact_sum = taps.sum(), exact[:, prefix:].sum(1)
    common = ((view.coherence - 1).clamp(min=0) / count_patches)[:, None, None]
    front = back = effect_values = effect_exact = exact.new_zeros(0)
    if view.gradients is not None:
        turned_gradients = view.gradients.transpose(0, 1)  # [H, P, N, D]
        front, back = (part.contiguous() for part in (turned_gradients[:, :, :prefix], turned_gradients[:, :, prefix:]))
        effect_values = taps.correlate(back)  # [H, P, K]
        effect_exact = _along(back, view.exact[0, :, prefix:])  # [H, P]
    moments: dict[Candidate, Moments] = {}
    groups: dict[tuple[str, bool], dict[int, list[Candidate]]] = {}
    for candidate in candidates:
        by_count = groups.setdefault((candidate.sampler, candidate.resample), {})
        by_count.setdefault(candidate.landmarks, []).append(candidate)
    for (sampler, resample), by_count in groups.items():
        order = _order(sampler, resample, max(by_count), view, shared, layout.prefix_tokens)
        for count, group in by_count.items():
            hidden = view.hidden if resample else shared.hidden
            landmarks, bias = _choose(sampler, hidden, view, layout, count, order)
            rows = landmarks[0].long()
            outputs = _outputs(view, landmarks, bias, group)
            patches = rows[rows >= prefix] - prefix
            is_known = torch.zeros(count_patches, dtype=torch.bool).index_fill(0, patches, True)
            hit = is_known[sample]
            lift = (count_patches - len(patches)) / max(len(sample) - int(hit.sum()), 1)
            known, known_exact = some[:, hit].flatten(1, 2), some_exact[:, hit]
            gram_values = whole - _products(known, known)
            cross_values = with_exact - _products(known, known_exact.flatten(1)[..., None])[..., 0]
            landmark_values = taps.at(patches)  # [H, S - P, D, K]
            sum_values = ((plain_sum - landmark_values.sum(1)).mT @ view.root).mT  # [H, D, K]
            sum_exact = exact_sum - exact[:, prefix:][:, patches].sum(1)
            energy_left = lift * (energy - known_exact.square().sum((1, 2)))
            energy_left = energy_left + common[:, 0, 0] * sum_exact.square().sum(1)
            turned = torch.stack([out[0] @ view.root for out in outputs], dim=-1)  # [H, N, D, I]
            fixed = (turned[:, :prefix] - exact[:, :prefix, :, None]).square().sum((1, 2))
            loose = turned[:, prefix:].masked_fill(is_known[None, :, None, None], 0.0)
            flat = loose[:, sample].flatten(1, 2)
            mixed = _products(some.flatten(1, 2), flat)  # [H, K, I]
            own = flat.square().sum(1)
            flat_sums = loose.sum(1)  # [H, D, I]
            cross_own = _products(flat, some_exact.flatten(1)[..., None])[..., 0]  # [H, I]
            effects = [exact.new_zeros(len(exact), some.shape[-1] + 2, some.shape[-1] + 2)] * len(group)
            if view.gradients is not None:
                at = back[:, :, patches]
                values = effect_values - at.flatten(2) @ landmark_values.flatten(1, 2)
                target = effect_exact - _along(at, view.exact[0, :, prefix:][:, patches])
                effects = [
                    _effects(front, back, out[0], view.exact[0, :, :prefix], is_known, values, target)
                    for out in outputs
                ]
            for place, candidate in enumerate(group):
                column = mixed[..., place : place + 1]
                top = torch.cat([gram_values, column], dim=2)
                bottom = torch.cat([column.mT, own[:, None, place : place + 1]], dim=2)
                cross = lift * torch.cat([cross_values, cross_own[:, place : place + 1]], dim=1)
                # what all rows share weighs more: F and y summed over tokens, `[H, D, K+1]` and `[H, D]`
                sums = torch.cat([sum_values, flat_sums[..., place : place + 1]], dim=2)
                gram = lift * torch.cat([top, bottom], dim=1) + common * (sums.mT @ sums)
                cross = cross + common[..., 0] * (sums.mT @ sum_exact[..., None])[..., 0]
                moments[candidate] = Moments(gram, cross, energy_left, fixed[:, place], effects[place])
    return moments


def _outputs(
    view: BlockView,
    landmarks: Tensor,  # [1, S]
    bias: Tensor | None,
    group: Sequence[Candidate],
) -> list[Tensor]:  # each [1, H, N, D]
    """FNA by candidates that differ in their core alone."""
    known = view.exact[:, :, landmarks[0].long()]

    def attend(iterations: Sequence[int], chebyshev: ChebyshevSteps | None) -> list[Tensor]:
        return nystrom_attention_iterates(
            view.query, view.key, view.value, landmarks, bias, view.scale, iterations, exact_rows=True,
            known_rows=known, chebyshev=chebyshev,
        )  # fmt: skip

    iterated = [candidate.iterations for candidate in group if candidate.chebyshev is None]
    iterates = iter(attend(iterated, None) if iterated else ())
    return [next(iterates) if c.chebyshev is None else attend((), c.chebyshev)[0] for c in group]


class Taps:
    """Values seen through each tap of a kernel over the grid of patches; without a grid there are no taps."""

    def __init__(self, value: Tensor, patches: tuple[int, int] | None, kernel: int) -> None:
        """Pad `value` `[H, N - P, D]` so that every tap finds something."""
        heads, _, self.size = value.shape
        self.kernel = kernel if patches is not None else 0
        self.rows, self.columns = patches or (0, 0)
        reach = self.kernel // 2
        self.heads = heads
        if self.kernel:
            image = value.reshape(heads, self.rows, self.columns, self.size)
            self.padded = torch.nn.functional.pad(image, (0, 0, reach, reach, reach, reach))
        self.steps = [(down, right) for down in range(self.kernel) for right in range(self.kernel)]

    def at(self, patches: Tensor) -> Tensor:  # [H, n, D, K]
        """What the taps of the patches listed see."""
        if not self.kernel:
            return torch.zeros(self.heads, len(patches), self.size, 0)
        row, column = patches // self.columns, patches % self.columns
        return torch.stack([self.padded[:, row + down, column + right] for down, right in self.steps], dim=-1)

    def sum(self) -> Tensor:  # [H, D, K]
        """The sum over all patches."""
        if not self.kernel:
            return torch.zeros(self.heads, self.size, 0)
        return torch.stack([self._shifted(*step).sum((1, 2)) for step in self.steps], dim=-1)

    def correlate(self, gradients: Tensor) -> Tensor:  # [H, P, N - prefix, D] -> [H, P, K]
        """Products with gradients, summed over patches and channels."""
        if not self.kernel:
            return torch.zeros(self.heads, gradients.shape[1], 0)
        images = gradients.flatten(2)
        columns = [images @ self._shifted(*step).reshape(self.heads, -1, 1) for step in self.steps]
        return torch.cat(columns, dim=-1)

    def _shifted(self, down: int, right: int) -> Tensor:  # [H, rows, columns, D]
        return self.padded[:, down : down + self.rows, right : right + self.columns]


def _sample(count: int) -> Tensor:  # [min(count, SAMPLED_ROWS)]
    """Patches that second moments are taken over: the same for all candidates, in no pattern."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:SAMPLED_ROWS].sort().values


def _order(
    name: str, resample: bool, most: int, view: BlockView, shared: SharedFeatures, prefix_tokens: int
) -> Tensor | None:
    """The most landmarks of a block's features, or of the first block's, where fewer landmarks are a beginning of more."""
    sampler = find_sampler(name)
    if not sampler.nested:
        return None
    features = _features(view.hidden if resample else shared.hidden, view)
    request = LandmarkRequest(features.shape[1], most, prefix_tokens)
    if resample:
        return sampler.select(request, features)
    known = shared.orders.get(name)
    if known is None or known.shape[1] < most:
        shared.orders[name] = sampler.select(request, features)
    return shared.orders[name]


def _effects(
    front: Tensor,  # [H, P, prefix, D]
    back: Tensor,  # [H, P, N - prefix, D]
    out: Tensor,  # [H, N, D]
    exact_prefix: Tensor,  # [H, prefix, D]
    is_known: Tensor,  # [N - prefix], bool: exact rows
    values: Tensor,  # [H, P, K]
    target: Tensor,  # [H, P]
) -> Tensor:  # [H, K+2, K+2]
    """Second moments over P directions of what shifted values, FNA and (less the prefix tokens' error) exact attention do."""
    prefix = exact_prefix.shape[1]
    own = _along(back, out[:, prefix:].masked_fill(is_known[None, :, None], 0.0))
    fixed = _along(front, out[:, :prefix] - exact_prefix)
    rows = torch.cat([values, own[..., None], (target - fixed)[..., None]], dim=-1)
    return rows.mT @ rows / rows.shape[1]


def _along(gradients: Tensor, change: Tensor) -> Tensor:  # [H, P, n, D], [H, n, D] -> [H, P]
    return (gradients.flatten(2) @ change.flatten(1)[..., None])[..., 0]


def _products(left: Tensor, right: Tensor) -> Tensor:
    return left.mT @ right


def _features(hidden: Tensor | None, view: BlockView) -> Tensor:
    return hidden if hidden is not None else view.query.mean(dim=1)


def _choose(
    name: str, hidden: Tensor | None, view: BlockView, layout: Layout, count: int, order: Tensor | None
) -> tuple[Tensor, Tensor]:  # both [1, S]
    sampler = find_sampler(name)
    request = LandmarkRequest(layout.tokens, count, layout.prefix_tokens, patches=layout.patches)
    if layout.frames > 1:
        return landmarks_over_frames(sampler, request, layout.frames)
    if order is None:
        order = sampler.select(request, _features(hidden, view) if sampler.looks_at_features else None)
    return order[:, :count], landmark_bias(layout.tokens, count, method=name, prefix_tokens=layout.prefix_tokens)
