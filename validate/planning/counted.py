"""Seconds of one block's attention on a target, from what the compiled kernels issue: counted, not timed.

A launch takes what is longer, its critical path by count at the target's clock, or its bytes at the target's bandwidth. The counts
are `fna.plugins.programs`'s table, of the kernels' PTX for sm_80; tensor cores and clock are the target's, as its vendor's peak rates
imply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fna.arithmetic import token_bytes
from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.focal_keys import FocalKeys, Levels, focal_keys
from fna.plugins.focal_plan import FocalShape, focal_plan
from fna.plugins.focal_programs import focal_programs
from fna.plugins.launch_plan import ELEMENT_BYTES, AttentionShape, Dtype, attention_plan, check_attention_shape
from fna.plugins.programs import (
    LAUNCH_CYCLES,
    Multiprocessors,
    Programs,
    attention_programs,
    core_length,
    counted_programs,
    exact_programs,
    launch_cycles,
)

BANDWIDTH_EFFICIENCY = 0.7
"""Part of the peak bandwidth that a kernel reaches (an assumption, the same for FNA and exact attention)."""

NOT_TIMED = (
    "predicted times rest on cycles counted on the compiled kernels, and on the target's peak rates; no GPU has been timed: "
    "calibrate them with --measured"
)


@dataclass(frozen=True)
class DeviceRates:
    """What a prediction needs to know of a device.

    Attributes:
        name: for people.
        bandwidth: bytes a second.
        clock: cycles a second.
        on: its multiprocessors.
        dtype: of query, key and value.
    """

    name: str
    bandwidth: float
    clock: float
    on: Multiprocessors
    dtype: Dtype = "fp16"

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def launch(self) -> float:
        """Seconds from one kernel to the next."""
        return LAUNCH_CYCLES / self.clock

    def moving(self, moved: float) -> float:
        """Seconds of reading and writing so many bytes."""
        return moved / (self.bandwidth * BANDWIDTH_EFFICIENCY)


@dataclass(frozen=True)
class NystromSetting:
    """What FNA's cost depends on: S, and its core, `iterations` of Newton-Schulz or `chebyshev` steps."""

    landmarks: int
    iterations: int = NEWTON_SCHULZ_ITERATIONS
    chebyshev: ChebyshevSteps | None = None


@lru_cache(maxsize=4096)
def counted_seconds(
    device: DeviceRates, tokens: int, heads: int, head_size: int, setting: NystromSetting | None = None
) -> float:
    """Seconds of one block's attention, batch 1: exact, or FNA where a setting is given. Choosing landmarks is not in it.

    Raises:
        InvalidShapeError, InvalidLandmarksError: for sizes that the kernels do not take; the message names them.
    """
    tensor = token_bytes(tokens, heads, head_size, device.element)
    landmarks = 1 if setting is None else setting.landmarks
    shape = AttentionShape(device.dtype, 1, heads, tokens, head_size, landmarks)
    check_attention_shape(shape)
    if setting is None:
        return _launch_seconds(device, exact_programs(device.dtype, tokens, heads, head_size), 4 * tensor)
    plan = attention_plan(
        shape, scale=1.0, iterations=setting.iterations, exact_rows=True, multiprocessors=device.on.count,
        chebyshev=setting.chebyshev,
    )  # fmt: skip
    launches = attention_programs(plan, shape, device.on.count, core_length(setting.iterations, setting.chebyshev))
    landmark_launches = sum(launch.variant.kernel.startswith("landmark") for launch in plan.launches)
    seconds = 0.0
    for launch, programs in zip(plan.launches, launches, strict=True):
        kernel = launch.variant.kernel
        moved = {"output": 2 * tensor}.get(kernel, 2 * tensor / landmark_launches if "landmark" in kernel else 0)
        seconds += _launch_seconds(device, programs, moved)
    return seconds


@lru_cache(maxsize=4096)
def counted_focal_seconds(
    device: DeviceRates,
    patches: tuple[int, int],
    prefix_tokens: int,
    heads: int,
    head_size: int,
    *,
    tile: int,
    levels: Levels,
    hot: int,
) -> float:
    """Seconds of one block's focal attention, batch 1, the choice of its hot keys included. Keys that tiles read again are cached.

    Raises:
        InvalidShapeError, InvalidArgumentError: for sizes that the kernels do not take; the message names them.
    """
    lists = focal_keys(patches, prefix_tokens, tile, levels, 0)
    tokens = prefix_tokens + patches[0] * patches[1]
    shape = FocalShape(device.dtype, 1, heads, tokens, head_size, *_sizes(lists))
    plan = focal_plan(shape, prefix_tokens=prefix_tokens, hot=hot, scale=1.0, multiprocessors=device.on.count)
    launches = focal_programs(plan, shape, lists.key_counts.tolist(), prefix_tokens, hot)
    tensor = token_bytes(tokens, heads, head_size, device.element)
    # Queries and keys once for the hot keys, and everything once for the tiles.
    moved = [2 * tensor / max(1, len(launches) - 1)] * (len(launches) - 1) + [4 * tensor]
    return sum(_launch_seconds(device, parts, each) for parts, each in zip(launches, moved, strict=True))


def _sizes(lists: FocalKeys) -> tuple[int, int, int]:
    return len(lists.queries), lists.queries.shape[1], lists.keys.shape[1]


def _launch_seconds(device: DeviceRates, programs: Sequence[Programs], moved: float) -> float:
    return max(launch_cycles(programs, counted_programs(), device.on) / device.clock, device.moving(moved))
