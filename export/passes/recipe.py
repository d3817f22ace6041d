"""How one linear layer's input and weights are best quantised, judged by the layer's own output on calibration photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fna.export.passes.calibration import InputStatistics
from fna.export.passes.eight_bit import INT8, Array, EightBit
from fna.export.passes.equalise import Equalisation, Freedom


@dataclass(frozen=True)
class Narrowing:
    """How the channels that stand out are divided: this share of them, the widest, by a power of how far they are above the next."""

    share: float
    power: float = 1.0


NARROWINGS = (
    *(Narrowing(share) for share in (0, 1 / 64, 1 / 16, 1 / 4, 1 / 2)),
    Narrowing(1 / 4, 0.5),
    Narrowing(3 / 4, 0.5),
)
"""Candidates. The root leaves the weights' rows alike, the whole leaves the channels so."""
ROWS_FOR_CHOOSING, ROWS_FOR_ROUNDING = 640, 4096
"""Rows of all photographs together: a choice needs an error's size, rounding in turn a Gram matrix of K x K."""
DAMPING = 0.01
"""Of the mean of the Gram matrix's diagonal, as in GPTQ's own code."""
GROUP = 128
"""Rows after which an error reaches the rest; a matter of speed only."""
HEADROOM = (1.2, 1.5, 2.0)
"""Candidates: how much wider than on the photographs the range is made, for what others hold."""
USUAL = 0.75
"""So many of the channels are no wider than what is taken as the least width of all."""
LEFT_BY_ROUNDING_IN_TURN = 0.5
"""About this share of the error of weights that are rounded one by one is left where they are rounded in turn."""


@dataclass(frozen=True)
class Candidate:
    """One way to quantise what enters some layers.

    Attributes:
        kind: the type.
        equalisation: the shift and scale that come before.
        largest: magnitude of the equalised tensor that the type's range is fitted to.
        error: of the layers' outputs on the sampled rows of each photograph, with ranges of the others: mean squares of what is
            left when its mean is taken off, as a share of the output's variance, summed over the layers; that of the input and
            `LEFT_BY_ROUNDING_IN_TURN` of that of the weights.
    """

    kind: EightBit
    equalisation: Equalisation
    largest: float
    error: float


def choose(
    kinds: Sequence[EightBit],
    statistics: InputStatistics,
    weights: Sequence[Array],  # [K, M] each
    freedom: Freedom,
) -> Candidate:
    """Return the candidate whose layers' outputs are nearest to the exact ones, on photographs that gave it no range.

    Args:
        kinds: types to choose from.
        statistics: of the tensor that enters.
        weights: of the layers that it enters.
        freedom: whether it may be shifted and scaled.
    """
    trial = _Trial(_thinned(statistics), np.concatenate(weights, axis=1), _shares(statistics, weights), freedom)
    best = min((trial.best_of(kind) for kind in kinds), key=lambda setting: setting.error)
    everything = range(len(statistics.rows))
    equalisation = _equalisation(best.kind, statistics, everything, best.narrowing, freedom)
    largest = best.headroom * _largest(statistics, everything, equalisation)
    return Candidate(best.kind, equalisation, largest, best.error)


@dataclass(frozen=True)
class _Setting:
    kind: EightBit
    narrowing: Narrowing
    headroom: float
    error: float


@dataclass(frozen=True)
class _Trial:
    """What settings are tried on: each photograph's rows, with ranges of the others."""

    statistics: InputStatistics
    weight: NDArray[np.float32]  # [K, M], of all layers
    shares: NDArray[np.float64]  # [M], what an output's mean square counts
    freedom: Freedom

    def best_of(self, kind: EightBit) -> _Setting:
        """Return the best way to divide channels together with the best headroom."""
        narrowings = NARROWINGS if self.freedom is not Freedom.NONE and kind is INT8 else NARROWINGS[:1]
        count = len(self.statistics.rows)
        errors = np.zeros((len(narrowings), len(HEADROOM)))
        for left_out in range(count):
            others = [number for number in range(count) if number != left_out] or [left_out]
            rows = self.statistics.rows[left_out]
            for index, narrowing in enumerate(narrowings):
                equalisation = _equalisation(kind, self.statistics, others, narrowing, self.freedom)
                largest = _largest(self.statistics, others, equalisation)
                weight = equalisation.scale[:, None].astype(np.float32) * self.weight
                moved = move_rows(equalisation, rows)
                of_weights = LEFT_BY_ROUNDING_IN_TURN * self._size(moved @ (round_weight(kind, weight) - weight))
                for place, headroom in enumerate(HEADROOM):
                    rounding = kind.round(moved, kind.scale(np.asarray(headroom * largest))) - moved
                    errors[index, place] += (self._size(rounding @ weight) + of_weights) / count
        index, place = divmod(int(errors.argmin()), len(HEADROOM))
        return _Setting(kind, narrowings[index], HEADROOM[place], float(errors[index, place]))

    def _size(self, difference: NDArray[np.float32]) -> float:
        return float(difference.var(axis=0) @ self.shares)


def _thinned(statistics: InputStatistics) -> InputStatistics:
    every = max(1, statistics.rows.shape[0] * statistics.rows.shape[1] // ROWS_FOR_CHOOSING)
    return replace(statistics, rows=statistics.rows[:, ::every])


def _shares(statistics: InputStatistics, weights: Sequence[Array]) -> NDArray[np.float64]:
    """One over the variance of each layer's output, for each of its columns."""
    variances = [float((statistics.rows @ weight).var(axis=(0, 1)).sum()) for weight in weights]
    return np.repeat([1 / max(variance, 1e-30) for variance in variances], [weight.shape[1] for weight in weights])


def _largest(statistics: InputStatistics, photographs: Sequence[int], equalisation: Equalisation) -> float:
    """The largest magnitude that the equalised tensor takes on some photographs."""
    ends = [end[photographs].astype(np.float64) for end in (statistics.lowest, statistics.highest)]
    return float(max(np.abs((end - equalisation.shift) / equalisation.scale).max() for end in ends))


def _equalisation(
    kind: EightBit, statistics: InputStatistics, photographs: Sequence[int], narrowing: Narrowing, freedom: Freedom
) -> Equalisation:
    zero, one = np.zeros(statistics.mean.shape), np.ones(statistics.mean.shape)
    if freedom is Freedom.NONE or (freedom is Freedom.SCALE and kind is not INT8):
        return Equalisation(zero, one)
    if kind is not INT8:  # a floating type is as fine as its values are small, so they are gathered around zero
        return Equalisation(statistics.mean, one)
    lowest, highest = _ranges(statistics, photographs)
    middle = (lowest + highest) / 2 if freedom is Freedom.ALL else zero
    half = np.maximum(highest - middle, middle - lowest)
    limit = np.sort(half)[::-1][int(narrowing.share * half.size)]
    return Equalisation(middle, np.maximum(one, half / limit) ** narrowing.power if limit > 0 else one)


def _ranges(statistics: InputStatistics, photographs: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest and highest value of each channel; those of quiet channels are taken from their mean as far as most channels reach.

    What a channel answers to may be on none of the photographs.
    """
    lowest, highest = statistics.lowest[photographs].min(axis=0), statistics.highest[photographs].max(axis=0)
    width = highest - lowest
    factor = np.maximum(1, np.quantile(width, USUAL) / np.maximum(width, 1e-30))
    mean = np.clip(statistics.mean, lowest, highest)
    return mean - factor * (mean - lowest), mean + factor * (highest - mean)


def move_rows(equalisation: Equalisation, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows `[..., K]`, equalised."""
    moved = np.subtract(rows, equalisation.shift, dtype=np.float32)
    moved /= equalisation.scale.astype(np.float32)
    return moved


def weight_scale(kind: EightBit, weight: Array) -> NDArray[np.float32]:
    """Return the scale of each column of `[K, M]`."""
    return kind.scale(np.abs(weight).max(axis=0))


def round_weight(kind: EightBit, weight: Array) -> NDArray[np.float32]:
    """Return `[K, M]`, quantised with a scale for each column."""
    return kind.round(weight, weight_scale(kind, weight))


def round_weight_in_turn(
    kind: EightBit,
    weight: Array,  # [K, M]
    rows: NDArray[np.float32],  # [R, K], as they are quantised
) -> NDArray[np.float32]:
    """Quantise a weight row by row, each row's error made good in the rows that are still to come (GPTQ, arXiv 2210.17323).

    Every row of the result is on the grid that `weight_scale(kind, weight)` spans.
    """
    scale = weight_scale(kind, weight)
    gram = (rows.T @ rows).astype(np.float64)
    gram[np.diag_indices_from(gram)] += DAMPING * np.trace(gram) / len(gram) + 1e-12
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T  # of the inverse; its rows say how an error is best spread
    left, done = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.float32)
    for start in range(0, len(left), GROUP):
        end = min(start + GROUP, len(left))
        errors = np.zeros((end - start, weight.shape[1]))
        for row in range(start, end):
            done[row] = kind.round(left[row], scale)
            errors[row - start] = (left[row] - done[row]) / upper[row, row]
            left[row + 1 : end] -= np.outer(upper[row, row + 1 : end], errors[row - start])
        left[end:] -= upper[start:end, end:].T @ errors
    return done
