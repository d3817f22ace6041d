"""What a block costs: its products, or its predicted time on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ValidationError

from fna.arithmetic import (
    OPERATIONS_PER_PRODUCT,
    correction_bytes,
    correction_products,
    exact_products,
    focal_block_products,
    fused_bytes,
    head_split_bytes,
    landmark_row_products,
    last_iteration_products,
    newton_schulz_products,
    nystrom_products,
    sampling_products,
    token_bytes,
)
from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.engines.targets import Target
from fna.errors import InputFileError
from fna.plan import describe_validation_error
from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate
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
        total: float = nystrom_products(tokens, candidate.landmarks, heads, size, candidate.iterations)
        if kernel:
            total += correction_products(tokens, heads, size, kernel)
        sampling = sampling_products(candidate.sampler, tokens, candidate.landmarks, self.layout.channels)
        total += sampling * share_of_choice(candidate, self.layout)
        return total + self.exact(self.layout.heads - heads)


@dataclass(frozen=True)
class DeviceRates:
    """What a prediction needs to know of a device.

    Attributes:
        name: for people.
        bandwidth: bytes a second.
        matrix_rate: operations a second of its matrix units, all multiprocessors together.
        multiprocessors: how many share that rate.
        launch: seconds from one kernel to the next.
        element: bytes of a number.
    """

    name: str
    bandwidth: float
    matrix_rate: float
    multiprocessors: int
    launch: float = 4e-6
    element: int = 2


EXACT_EFFICIENCY = 0.5
"""Part of the peak rate that fused exact attention reaches; published figures of fused kernels lie between 0.35 and 0.7."""

NYSTROM_EFFICIENCY = 0.3
"""Part of the peak rate that FNA's thinner products reach. An assumption until a GPU has been timed: calibrate by --measured."""

BANDWIDTH_EFFICIENCY = 0.7

MOST_TOKENS = 1 << 20
"""Break-even is looked for up to here."""


def device_of(target: Target, precision: str = "fp16") -> DeviceRates:
    """Return the device of a target at a precision."""
    rate = target.fp32_tflops if precision == "fp32" else target.fp16_tflops
    return DeviceRates(
        f"{target.name} ({precision})",
        target.bandwidth_gb_s * 1e9,
        rate * 1e12,
        target.multiprocessors,
        element=4 if precision == "fp32" else 2,
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
            f"assumed, FNA {self.nystrom:.3g} times; the calibrated model is within {self.worst:.1%} of each"
        )


class TimeCost:
    """Predicted seconds of the plugin's kernels and of fused exact attention, batch 1.

    A kernel takes what is longer, its operations or its bytes, and a launch. Newton-Schulz of up to 128 landmarks runs beside the
    exact rows, a program on one multiprocessor per head; beyond that it is a launch per product (`fna.plugins.launch_plan`).
    """

    unit = "seconds"

    def __init__(self, layout: Layout, device: DeviceRates, calibration: Calibration | None = None) -> None:
        self.layout, self.device = layout, device
        self.calibration = calibration or Calibration()

    def exact(self, heads: int) -> float:
        """See `CostModel.exact`."""
        if not heads:
            return 0.0
        shape = (self.layout.tokens, heads, self.layout.head_size)
        moved = fused_bytes(*shape, self.device.element)
        return self.calibration.exact * self._kernel(exact_products(*shape), moved, EXACT_EFFICIENCY)

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
        tokens, size, device = self.layout.tokens, self.layout.head_size, self.device
        count = candidate.landmarks
        rows = landmark_row_products(tokens, count, heads, size)
        newton = OPERATIONS_PER_PRODUCT * newton_schulz_products(count, heads, candidate.iterations)
        values = token_bytes(tokens, heads, size, device.element)
        landmark = self._kernel(rows, 2 * values, NYSTROM_EFFICIENCY)
        if count <= 128:
            busy = min(heads, device.multiprocessors) / device.multiprocessors
            alone = newton / (device.matrix_rate * busy * NYSTROM_EFFICIENCY)
            seconds = max(landmark, alone + device.launch)
        else:
            launches = 3 * (candidate.iterations - 1) + 1
            seconds = landmark + launches * device.launch + newton / (device.matrix_rate * NYSTROM_EFFICIENCY)
        seconds += self._kernel(last_iteration_products(count, heads, size), 0, NYSTROM_EFFICIENCY)
        seconds += self._kernel(rows, 3 * values, NYSTROM_EFFICIENCY)
        if find_sampler(candidate.sampler).looks_at_features:
            seconds += self._sampler(candidate) * share_of_choice(candidate, self.layout)
        return self.calibration.nystrom * seconds

    def focal(self, candidate: FocalCandidate, heads: int) -> float:
        """Seconds of one focal block: the choice of its hot keys, then its tiles, each reading its own keys and values."""
        layout, element = self.layout, self.device.element
        assert layout.patches is not None
        lists = candidate.lists(layout)
        products = focal_block_products(
            candidate.plan(0), layout.patches, layout.prefix_tokens, heads, layout.head_size
        )
        gathered = 2 * heads * (lists.keys.size + len(lists.keys) * candidate.hot) * layout.head_size * element
        moved = fused_bytes(layout.tokens, heads, layout.head_size, element) + gathered
        scoring = self._kernel(0, token_bytes(layout.tokens, heads, layout.head_size, element), NYSTROM_EFFICIENCY)
        return self.calibration.exact * (scoring + self._kernel(products, moved, NYSTROM_EFFICIENCY))

    def _sampler(self, candidate: Candidate) -> float:
        sampler, count = find_sampler(candidate.sampler), candidate.landmarks
        hidden = self.layout.tokens * self.layout.channels * self.device.element
        return self._copies(sampler.launches(count), hidden * sampler.passes(count))

    def _kernel(self, products: int, moved: int, efficiency: float) -> float:
        device = self.device
        computing = OPERATIONS_PER_PRODUCT * products / (device.matrix_rate * efficiency)
        return max(computing, moved / (device.bandwidth * BANDWIDTH_EFFICIENCY)) + device.launch

    def _copies(self, launches: int, moved: float) -> float:
        return moved / (self.device.bandwidth * BANDWIDTH_EFFICIENCY) + launches * self.device.launch


def share_of_choice(candidate: Candidate, layout: Layout) -> float:
    """The part of choosing landmarks that one block bears: all of it, or its share where all blocks use the same."""
    return 1.0 if candidate.resample else 1.0 / layout.num_blocks


def find_break_even(
    layout: Layout, device: DeviceRates, landmarks: int = 64, calibration: Calibration | None = None
) -> int:
    """Return about how many tokens a block needs for FNA with so many grid landmarks to be predicted faster than exact attention."""
    candidate = Candidate(landmarks, DEFAULT_SAMPLER, False, NEWTON_SCHULZ_ITERATIONS)

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


class _Bench(BaseModel):
    rows: list[_BenchRow]


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
        nystrom = cost.nystrom(Candidate(row.landmarks, DEFAULT_SAMPLER, False, NEWTON_SCHULZ_ITERATIONS), layout.heads)
        kept = layout.num_blocks - row.blocks
        system += [[row.tokens, layout.num_blocks * exact, 0.0], [row.tokens, kept * exact, row.blocks * nystrom]]
        seconds += [row.dense.median / 1e3, row.fna.median / 1e3]
    matrix, right = np.array(system), np.array(seconds)
    if len(bench.rows) == 1:  # two numbers cannot tell three unknowns: one factor for both kinds of attention
        matrix = np.stack([matrix[:, 0], matrix[:, 1] + matrix[:, 2]], axis=1)
    scale = np.linalg.norm(matrix / right[:, None], axis=0)
    found = nnls(matrix / right[:, None] / scale, np.ones(len(right)))[0] / scale
    nystrom_factor = found[2] if len(found) == 3 else found[1]
    worst = float(np.abs(matrix @ found / right - 1).max())
    rest = float(found[0]) * layout.tokens
    return Calibration(float(found[1]) or 1.0, float(nystrom_factor) or 1.0, rest, len(right), worst)
