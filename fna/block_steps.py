"""What a plan means for one attention block, and the order in which its steps are computed.

This is the only reading of a plan: PyTorch (`fna.patching`) and ONNX (`fna.export.surgery`) both get a block's `BlockSteps` from
`steps_of`, and both wire them by `wire_block`, each with its own tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch

from fna.chebyshev import ChebyshevSteps
from fna.correction import Correction
from fna.errors import InvalidPlanError
from fna.plan import Plan, TokenRange
from fna.samplers import LandmarkRequest, Sampler, find_sampler
from fna.samplers.common.roles import check_rooms

Tensor = TypeVar("Tensor")


@dataclass(frozen=True)
class NamedTokens:
    """Tokens that a plan names.

    Attributes:
        tokens: their indices, or what kind is found in every image; see `fna.special_tokens`.
        found_at: the block at which they are found: the first of the range that names them.
    """

    tokens: tuple[int, ...] | Literal["artifact", "massive"]
    found_at: int


@dataclass(frozen=True)
class KeyMasking:
    """Tokens that nobody attends to in a block; with `sink`, they themselves attend to all."""

    tokens: NamedTokens
    sink: bool


@dataclass(frozen=True)
class LandmarkChoice:
    """How a block gets its landmarks.

    Attributes:
        sampler: which chooses them.
        num_landmarks: S.
        feature: what the sampler looks at; meaningless for one that does not look at features.
        seed: for samplers that draw.
        patches: rows and columns of patches; None takes them for a square.
        weighted: whether a landmark counts for the tokens that it stands for.
        include: tokens that are landmarks; None for none.
        exclude: tokens that are not; None for none.
        group: blocks of equal groups have the same landmarks, chosen at the first of them that runs.
    """

    sampler: Sampler
    num_landmarks: int
    feature: Literal["input", "query", "key", "value"]
    seed: int
    patches: tuple[int, int] | None
    weighted: bool
    include: NamedTokens | None
    exclude: NamedTokens | None
    group: Hashable

    @property
    def is_guided(self) -> bool:
        """Whether tokens are included or excluded."""
        return self.include is not None or self.exclude is not None

    def request(self, num_tokens: int, prefix_tokens: int, device: torch.device | None = None) -> LandmarkRequest:
        """Return what is asked of the sampler."""
        return LandmarkRequest(num_tokens, self.num_landmarks, prefix_tokens, self.seed, self.patches, device)

    def check_rooms(self, num_tokens: int, prefix_tokens: int, name: str) -> None:
        """Raise InvalidLandmarksError where a token could not be included or excluded; `name` is the block's."""
        check_rooms(
            self.request(num_tokens, prefix_tokens),
            self.sampler.name,
            includes=self.include is not None,
            excludes=self.exclude is not None,
            name=name,
        )


@dataclass(frozen=True)
class NystromStep:
    """FNA in a block.

    Attributes:
        heads: those that are FNA, ascending; None is all of them.
        landmarks: how they are chosen.
        iterations: of Newton-Schulz.
        chebyshev: the cheaper core instead of Newton-Schulz; None for Newton-Schulz.
        exact_rows: whether the landmarks' own rows are written exactly.
        correction: of the FNA heads' result, None for none.
    """

    heads: tuple[int, ...] | None
    landmarks: LandmarkChoice
    iterations: int
    chebyshev: ChebyshevSteps | None
    exact_rows: bool
    correction: Correction | None


@dataclass(frozen=True)
class FocalStep:
    """Focal attention in a block, all heads of it; see `fna.focal.focal_attention`.

    Attributes:
        tile: side of the tiles of queries, in patches.
        levels: (size, gap) of the cells that are sampled.
        hot: keys that are exact for all tiles.
        seed: of the draw.
        patches: rows and columns of patches; None takes them for a square.
    """

    tile: int
    levels: tuple[tuple[int, int], ...]
    hot: int
    seed: int
    patches: tuple[int, int] | None


@dataclass(frozen=True)
class BlockSteps:
    """One block: keys are masked, some heads are FNA and corrected, the others are exact, and all are joined in their order.

    Or all heads are focal attention.

    Attributes:
        block: its number.
        key_masking: for FNA and exact heads alike; None for none.
        nystrom: None where all heads are exact, or focal attention.
        focal: None where no head is focal attention.
    """

    block: int
    key_masking: KeyMasking | None
    nystrom: NystromStep | None
    focal: FocalStep | None = None

    @property
    def is_untouched(self) -> bool:
        """Whether the block stays as the model has it."""
        return self.key_masking is None and self.nystrom is None and self.focal is None


def steps_of(plan: Plan, block: int) -> BlockSteps:
    """Return what a plan says about one block."""
    masked = plan.find_mask(block)
    masking = None if masked is None else KeyMasking(NamedTokens(masked[1].tokens, masked[0]), masked[1].sink)
    focal = plan.find_focal(block)
    if focal is not None:
        step = FocalStep(focal.tile, focal.levels, focal.hot, focal.seed, plan.patches)
        return BlockSteps(block, masking, None, step)
    planned = plan.find(block)
    if planned is None:
        return BlockSteps(block, masking, None)
    sampler = find_sampler(planned.sampler)
    alone = sampler.looks_at_features and plan.resamples(planned)
    landmarks = LandmarkChoice(
        sampler,
        planned.landmarks,
        planned.feature,
        plan.seed,
        plan.patches,
        plan.method == "weighted",
        _named_tokens(plan.find_landmark_range("include", block)),
        _named_tokens(plan.find_landmark_range("exclude", block)),
        (plan.sharing_key(planned), block if alone else None),
    )
    core = plan.iterations_of(planned), plan.chebyshev_of(planned)
    nystrom = NystromStep(planned.heads, landmarks, *core, plan.exact_rows, planned.correction)
    return BlockSteps(block, masking, nystrom)


def _named_tokens(block_and_range: tuple[int, TokenRange] | None) -> NamedTokens | None:
    return None if block_and_range is None else NamedTokens(block_and_range[1].tokens, block_and_range[0])


class BlockWiring(Protocol[Tensor]):
    """How the steps of one block are computed or written; a tensor is `[B, H', N, D]`, of some of the heads."""

    def take_heads(self, tensor: Tensor, heads: Sequence[int], purpose: Literal["fna", "exact"], /) -> Tensor:
        """Some heads in the order given."""

    def join_heads(self, parts: Sequence[Tensor], order: Sequence[int], /) -> Tensor:
        """Parts one after the other, their heads then in the order given."""

    def nystrom(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """FNA, its keys masked."""

    def correct(self, out: Tensor, value: Tensor, correction: Correction, /) -> Tensor:
        """The correction of FNA's result."""

    def exact(self, query: Tensor, key: Tensor, value: Tensor, /) -> Tensor:
        """Exact attention, its keys masked."""


def wire_block(
    steps: BlockSteps,
    num_heads: int,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    wiring: BlockWiring[Tensor],
) -> Tensor:  # [B, H, N, D]
    """Compute or write one block's attention, if it is not focal: focal attention takes all heads, so nothing is wired.

    Raises:
        InvalidPlanError: for heads that the block does not have, or a correction for another number of heads.
    """
    step = steps.nystrom
    if step is None:
        return wiring.exact(query, key, value)
    heads = tuple(range(num_heads)) if step.heads is None else step.heads
    if heads[-1] >= num_heads:
        raise InvalidPlanError(
            f"the plan lists head {heads[-1]} of block {steps.block}, but the block has heads 0 to {num_heads - 1}"
        )
    if step.correction is not None and len(step.correction.gains) != len(heads):
        raise InvalidPlanError(
            f"the plan's correction of block {steps.block} has kernels for {len(step.correction.gains)} heads, "
            f"but {len(heads)} are FNA"
        )

    def approximate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = wiring.nystrom(query, key, value)
        return out if step.correction is None else wiring.correct(out, value, step.correction)

    if len(heads) == num_heads:
        return approximate(query, key, value)
    others = [head for head in range(num_heads) if head not in heads]
    operands = (query, key, value)
    parts = [
        approximate(*(wiring.take_heads(tensor, heads, "fna") for tensor in operands)),
        wiring.exact(*(wiring.take_heads(tensor, others, "exact") for tensor in operands)),
    ]
    order = [*heads, *others]
    return wiring.join_heads(parts, [order.index(head) for head in range(num_heads)])
