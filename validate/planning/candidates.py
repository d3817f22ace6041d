"""What a block could become, and the range of it that is tried."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from fna.arithmetic import exact_products, focal_block_products, nystrom_products
from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps, default_core
from fna.focal_keys import FocalKeys, Levels, focal_keys
from fna.plan import FocalBlockPlan, Method
from fna.samplers import all_samplers, find_sampler
from fna.validate.planning.subject import Layout

KERNEL = 5
"""Side of the correction's kernel; on DINOv2-S 7 gains next to nothing over 5, and 3 loses as little (docs/plan.md)."""

LANDMARK_COUNTS = (16, 32, 64, 96, 128, 256)
ITERATIONS = (3, NEWTON_SCHULZ_ITERATIONS)

DEAREST = 0.8
"""Candidates that take more than this part of exact attention's products are left out."""


@dataclass(frozen=True)
class Candidate:
    """One way to make a block FNA, apart from which of its heads."""

    kind: ClassVar[str] = "FNA"

    landmarks: int
    sampler: str
    resample: bool
    iterations: int
    chebyshev: ChebyshevSteps | None = None
    """The cheaper core, where it takes the place of the iterations."""
    corrected: bool = field(default=False, repr=False)
    """With a correction fitted to it; measured it is once, for both. What is measured has names in the cache, so it is not told."""

    @property
    def family(self) -> str:
        """Whose errors depend on one another alike."""
        return f"corrected {self.kind}" if self.corrected else self.kind


@dataclass(frozen=True)
class FocalCandidate:
    """One way to make a block focal: all heads of it, with a draw of its own."""

    kind: ClassVar[str] = "focal"
    family: ClassVar[str] = kind

    tile: int
    levels: Levels
    hot: int

    def plan(self, block: int) -> FocalBlockPlan:
        """As a plan lists it. Each block draws anew: errors of one draw in all blocks add up (docs/notes/planning.md)."""
        return FocalBlockPlan(block=block, tile=self.tile, levels=self.levels, hot=self.hot, seed=block)

    def lists(self, layout: Layout) -> FocalKeys:
        """Keys of its tiles; how many they are is the same in every block."""
        assert layout.patches is not None
        return focal_keys(layout.patches, layout.prefix_tokens, self.tile, self.levels, 0)


AnyCandidate = Candidate | FocalCandidate


def measured_as(candidate: AnyCandidate) -> AnyCandidate:
    """The candidate whose moments say what this one loses: corrections are fitted afterwards."""
    return replace(candidate, corrected=False) if isinstance(candidate, Candidate) else candidate


def usual_candidate(landmarks: int, sampler: str, method: Method = "weighted") -> Candidate:
    """One block as `uniform_plan` makes it."""
    return Candidate(landmarks, sampler, False, NEWTON_SCHULZ_ITERATIONS, default_core(landmarks, method))


FOCAL_TILES = (4, 8)
FOCAL_LEVELS: tuple[Levels, ...] = (
    ((1, 0), (2, 4)),
    ((1, 0), (2, 2)),
    ((1, 0), (2, 2), (4, 12)),
    ((1, 0), (2, 2), (4, 6)),
    ((1, 0), (2, 2), (4, 4)),
    ((1, 0), (2, 2), (4, 6), (8, 16)),
    ((1, 0), (2, 2), (4, 4), (8, 12)),
)
"""With tiles of 4 and 8 a gap of 1 keeps the same patches as one of 2: cells of 2 do not straddle a tile's edge."""

HOT_COUNTS = (16, 64)


def focal_candidates(hot_counts: tuple[int, ...] = HOT_COUNTS) -> tuple[FocalCandidate, ...]:
    """Every tile with all levels and numbers of hot keys."""
    return tuple(
        FocalCandidate(tile, levels, hot) for tile in FOCAL_TILES for levels in FOCAL_LEVELS for hot in hot_counts
    )


def planned_samplers() -> tuple[str, ...]:
    """Names of the samplers that are tried where none are named."""
    return tuple(sampler.name for sampler in all_samplers() if sampler.planned)


@dataclass(frozen=True)
class SearchRange:
    """What is tried.

    Attributes:
        samplers: by name.
        landmarks: values of S.
        iterations: of Newton-Schulz; where so many landmarks usually have the cheaper core, it takes the place of the usual number.
        shared: for samplers that look at the image, also landmarks chosen once, at the first block.
        corrections: fit a correction.
        kernel: side of its kernel.
        focal: focal candidates, where patches lie on a grid that is known.
    """

    samplers: tuple[str, ...] = field(default_factory=planned_samplers)
    landmarks: tuple[int, ...] = LANDMARK_COUNTS
    iterations: tuple[int, ...] = ITERATIONS
    shared: bool = True
    corrections: bool = True
    kernel: int = KERNEL
    focal: tuple[FocalCandidate, ...] = focal_candidates()

    def candidates(self, layout: Layout) -> list[AnyCandidate]:
        """Every combination that fits the model and is worth its products."""
        return [*self._nystrom(layout), *self._focal(layout)]

    def _focal(self, layout: Layout) -> list[FocalCandidate]:
        patches, exact = layout.patches, exact_products(layout.tokens, 1, layout.head_size)
        if patches is None:
            return []
        sizes = (patches, layout.prefix_tokens, 1, layout.head_size)
        fitting = [c for c in self.focal if c.tile <= max(patches) and c.hot <= patches[0] * patches[1]]
        return [c for c in fitting if focal_block_products(c.plan(0), *sizes) <= DEAREST * exact]

    def _nystrom(self, layout: Layout) -> list[Candidate]:
        candidates = []
        exact = exact_products(layout.tokens, 1, layout.head_size)
        for name in self.samplers:
            sampler = find_sampler(name)
            if sampler.needs_positions and layout.patches is None:
                continue
            looks = sampler.looks_at_features
            if looks and layout.frames > 1:  # they know one image only
                continue
            for count in self.landmarks:
                if count >= layout.tokens or count < layout.frames * (layout.prefix_tokens + 1):
                    continue
                for resample in (False, True) if looks and self.shared else (looks,):
                    for steps in self.iterations:
                        core = default_core(count, "weighted") if steps == NEWTON_SCHULZ_ITERATIONS else None
                        if nystrom_products(layout.tokens, count, 1, layout.head_size, steps, core) <= DEAREST * exact:
                            candidates.append(Candidate(count, name, resample, steps, core))
        return candidates
