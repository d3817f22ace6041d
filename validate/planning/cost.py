"""What a block costs: its products, or its predicted time on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ValidationError

from fna.arithmetic import (
    correction_bytes,
    correction_products,
    exact_products,
    focal_block_products,
    head_split_bytes,
    nystrom_products,
    sampling_products,
)
from fna.engines.targets import Target
from fna.errors import InputFileError, describe_validation_error
from fna.plan import Method
from fna.plugins.programs import Multiprocessors
from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate, usual_candidate
from fna.validate.planning.counted import NOT_TIMED, DeviceRates, NystromSetting, counted_focal_seconds, counted_seconds
from fna.validate.planning.subject import Layout


class CostModel(Protocol):
    """The cost of one block's attention; `unit` says of what."""

    unit: str

    def exact(self, heads: int) -> float:
        """Exact attention of so many heads."""

    def baseline(self) -> tuple[float, str]:
        """Exact attention of one block, all heads, in the fastest form there is, and what that form is called."""

    def block(self, candidate: AnyCandidate, heads: int, kernel: int) -> float:
        """A candidate on `heads` of the heads, the others exact; FNA corrected by a kernel of that size (0: not corrected)."""


class ProductCost:
    """Multiply-adds."""

    unit = "products"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def exact(self, heads: int) -> float:
        """See `CostModel.exact`."""
        return float(exact_products(self.layout.tokens, heads, self.layout.head_size))

    def baseline(self) -> tuple[float, str]:
        """See `CostModel.baseline`."""
        return self.exact(self.layout.heads), "exact attention"

    def block(self, candidate: AnyCandidate, heads: int, kernel: int) -> float:
        """See `CostModel.block`."""
        tokens, size = self.layout.tokens, self.layout.head_size
        if isinstance(candidate, FocalCandidate):
            assert self.layout.patches is not None
            return focal_block_products(candidate.plan(0), self.layout.patches, self.layout.prefix_tokens, heads, size)
        core = candidate.iterations, candidate.chebyshev
        total: float = nystrom_products(tokens, candidate.landmarks, heads, size, *core)
        if kernel:
            total += correction_products(tokens, heads, size, kernel)
        sampling = sampling_products(candidate.sampler, tokens, candidate.landmarks, self.layout.channels)
        total += sampling * share_of_choice(candidate, self.layout)
        return total + self.exact(self.layout.heads - heads)


MOST_TOKENS = 1 << 18
"""Break-even is looked for up to here."""


def device_of(target: Target, precision: str = "fp16") -> DeviceRates:
    """Return the device of a target at a precision, fp16 or fp32."""
    return DeviceRates(
        f"{target.name} ({precision})",
        target.bandwidth_gb_s * 1e9,
        target.clock_ghz * 1e9,
        Multiprocessors(target.multiprocessors, target.multiply_adds_a_cycle),
        precision,  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Calibration:
    """Factors on predicted seconds that measurements call for, the seconds that are not attention, and what is left unexplained.

    Attributes:
        exact: factor on exact attention.
        nystrom: factor on FNA.
        rest: seconds of all else, at the tokens planned for.
        times: how many measured times it was fitted to.
        worst: largest relative difference between a measured time and what the calibrated model says of it.
    """

    exact: float = 1.0
    nystrom: float = 1.0
    rest: float = 0.0
    times: int = 0
    worst: float = 0.0

    def describe(self) -> str:
        """Say in one line how far to trust it."""
        return (
            f"calibrated by {self.times} measured times of whole models: exact attention takes {self.exact:.3g} times what was "
            f"counted, FNA {self.nystrom:.3g} times; the calibrated model is within {self.worst:.1%} of each"
        )


class TimeCost:
    """Predicted seconds of the kernels and of exact attention, batch 1: `counted_seconds`, and copies by their bytes."""

    unit = "seconds"

    def __init__(self, layout: Layout, device: DeviceRates, calibration: Calibration | None = None) -> None:
        self.layout, self.device = layout, device
        self.calibration = calibration or Calibration()

    def describe(self) -> str:
        """Say in one line how far to trust the prediction."""
        return self.calibration.describe() if self.calibration.times else NOT_TIMED

    def exact(self, heads: int) -> float:
        """See `CostModel.exact`."""
        if not heads:
            return 0.0
        return self.calibration.exact * counted_seconds(self.device, self.layout.tokens, heads, self.layout.head_size)

    def baseline(self) -> tuple[float, str]:
        """See `CostModel.baseline`."""
        return self.exact(self.layout.heads), "a fused kernel"

    def block(self, candidate: AnyCandidate, heads: int, kernel: int) -> float:
        """See `CostModel.block`."""
        if isinstance(candidate, FocalCandidate):
            return self.focal(candidate, heads)
        others = self.layout.heads - heads
        seconds = self.nystrom(candidate, heads)
        tokens, size, element = self.layout.tokens, self.layout.head_size, self.device.element
        if kernel:
            seconds += self._copies(3, correction_bytes(tokens, heads, size, element))
        if others:
            seconds += self._copies(4, head_split_bytes(tokens, self.layout.heads, size, element)) + self.exact(others)
        return seconds

    def nystrom(self, candidate: Candidate, heads: int) -> float:
        """Seconds of one FNA node, the choice of its landmarks included where it chooses anew."""
        setting = NystromSetting(candidate.landmarks, candidate.iterations, candidate.chebyshev)
        seconds = counted_seconds(self.device, self.layout.tokens, heads, self.layout.head_size, setting)
        if find_sampler(candidate.sampler).looks_at_features:
            seconds += self._sampler(candidate) * share_of_choice(candidate, self.layout)
        return self.calibration.nystrom * seconds

    def focal(self, candidate: FocalCandidate, heads: int) -> float:
        """Seconds of one focal block with the choice of its hot keys; calibrated as exact attention, whose kernel is like it."""
        layout = self.layout
        assert layout.patches is not None
        seconds = counted_focal_seconds(
            self.device, layout.patches, layout.prefix_tokens, heads, layout.head_size, tile=candidate.tile,
            levels=candidate.levels, hot=candidate.hot,
        )  # fmt: skip
        return self.calibration.exact * seconds

    def _sampler(self, candidate: Candidate) -> float:
        sampler, count = find_sampler(candidate.sampler), candidate.landmarks
        hidden = self.layout.tokens * self.layout.channels * self.device.element
        return self._copies(sampler.launches(count), hidden * sampler.passes(count))

    def _copies(self, launches: int, moved: float) -> float:
        return self.device.moving(moved) + launches * self.device.launch


def share_of_choice(candidate: Candidate, layout: Layout) -> float:
    """The part of choosing landmarks that one block bears: all of it, or its share where all blocks use the same."""
    return 1.0 if candidate.resample else 1.0 / len(layout.own_blocks)


def find_break_even(
    layout: Layout, device: DeviceRates, landmarks: int = 64, calibration: Calibration | None = None
) -> int:
    """Return about how many tokens a block needs for FNA with so many grid landmarks to be predicted faster than exact attention."""
    candidate = usual_candidate(landmarks, DEFAULT_SAMPLER)

    def pays(tokens: int) -> bool:
        cost = TimeCost(replace(layout, tokens=tokens), device, calibration)
        return cost.nystrom(candidate, layout.heads) < cost.exact(layout.heads)

    low, high = landmarks, MOST_TOKENS
    if not pays(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high


class _Timing(BaseModel):
    median: float


class _BenchRow(BaseModel):
    tokens: int
    landmarks: int
    blocks: int
    dense: _Timing
    fna: _Timing


class _BenchPlan(BaseModel):
    method: Method = "weighted"


class _Bench(BaseModel):
    rows: list[_BenchRow]
    plan: _BenchPlan = _BenchPlan()


def read_calibration(path: Path, layout: Layout, device: DeviceRates) -> Calibration:
    """Fit the model's factors to what `fna bench --json` measured, in milliseconds of the whole model.

    A model's time is taken as `r N` for all that is not attention, plus a factor times what is predicted for exact attention, plus
    another times what is predicted for FNA; the three are fitted by non-negative least squares to relative errors.

    Raises:
        InputFileError: if the file is not a bench record; the message names the key.
    """
    from scipy.optimize import nnls

    try:
        bench = _Bench.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"measurements {path} cannot be read: {error}; write them with fna bench --json") from None
    except ValidationError as error:
        raise InputFileError(describe_validation_error(f"measurements {path}", error)) from None
    if not bench.rows:
        raise InputFileError(f"measurements {path} hold no rows; write them with fna bench --json")
    system, seconds = [], []
    for row in bench.rows:
        cost = TimeCost(replace(layout, tokens=row.tokens), device)
        exact = cost.exact(layout.heads)
        nystrom = cost.nystrom(usual_candidate(row.landmarks, DEFAULT_SAMPLER, bench.plan.method), layout.heads)
        kept = layout.num_blocks - row.blocks
        system += [[row.tokens, layout.num_blocks * exact, 0.0], [row.tokens, kept * exact, row.blocks * nystrom]]
        seconds += [row.dense.median / 1e3, row.fna.median / 1e3]
    matrix, right = np.array(system), np.array(seconds)
    if len(bench.rows) == 1:  # two numbers cannot tell three unknowns: one factor for both kinds of attention
        matrix = np.stack([matrix[:, 0], matrix[:, 1] + matrix[:, 2]], axis=1)
    scale = np.linalg.norm(matrix / right[:, None], axis=0)
    factors = nnls(matrix / right[:, None] / scale, np.ones(len(right)))[0] / scale
    nystrom_factor = factors[2] if len(factors) == 3 else factors[1]
    worst = float(np.abs(matrix @ factors / right - 1).max())
    rest = float(factors[0]) * layout.tokens
    return Calibration(float(factors[1]) or 1.0, float(nystrom_factor) or 1.0, rest, len(right), worst)
