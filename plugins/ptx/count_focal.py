"""What a call of focal attention issues, beside FNA and exact attention: see `fna.plugins.ptx.count`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fna.focal_keys import Levels, focal_keys
from fna.plugins.focal_plan import FocalShape, focal_plan
from fna.plugins.focal_programs import focal_programs
from fna.plugins.launch_plan import Dtype, LaunchPlan
from fna.plugins.programs import Multiprocessors, Programs
from fna.plugins.ptx.cases import TORCH_TYPES
from fna.plugins.ptx.count import LaunchCount, count_launch, place
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.memory import GlobalMemory
from fna.plugins.torch_ops import focal_shape


@dataclass(frozen=True)
class FocalSize:
    """Sizes of one call, and the GPU it is for."""

    patches: tuple[int, int]
    heads: int
    on: Multiprocessors
    levels: Levels
    tile: int = 8
    hot: int = 16
    prefix_tokens: int = 1
    dtype: Dtype = "fp16"
    head_size: int = 64


@dataclass(frozen=True)
class PlacedFocal:
    """A call whose tensors lie in the machine's memory."""

    shape: FocalShape
    plan: LaunchPlan
    programs: list[list[Programs]]
    memory: GlobalMemory
    addresses: dict[str, int]

    def arguments(self, number: int) -> list[int | float]:
        """What launch `number` is given."""
        return [self.addresses[a] if isinstance(a, str) else a for a in self.plan.launches[number].arguments]


def place_focal(size: FocalSize) -> PlacedFocal:
    """One call of FocalAttention on random tensors."""
    lists = focal_keys(size.patches, size.prefix_tokens, size.tile, size.levels)
    queries, keys, bias, _ = lists.tensors()
    generator = torch.Generator().manual_seed(0)
    shape = 1, size.heads, size.prefix_tokens + size.patches[0] * size.patches[1], size.head_size
    tensors = {
        name: torch.randn(shape, generator=generator).to(TORCH_TYPES[size.dtype]) for name in ("query", "key", "value")
    }
    sizes = focal_shape(tensors["query"], queries, keys, None)
    plan = focal_plan(
        sizes, prefix_tokens=size.prefix_tokens, hot=size.hot, scale=size.head_size**-0.5, multiprocessors=size.on.count
    )
    programs = focal_programs(plan, sizes, lists.key_counts.tolist(), size.prefix_tokens, size.hot)
    every = {**tensors, "tile_queries": queries, "tile_keys": keys, "tile_bias": bias}
    return PlacedFocal(sizes, plan, programs, *place(plan, every))


def count_focal(images: PtxImages, sm: int, size: FocalSize) -> list[LaunchCount]:
    """Count one call of FocalAttention: of every prefix row, tile and split one head's program runs."""
    call = place_focal(size)
    return [
        count_launch(
            images.kernel(launch.variant, sm, profile=True), call.memory, launch.grid, call.arguments(number), size.on,
            [job * launch.grid[0] for job in range(launch.grid[1]) for _ in range(launch.grid[0])],
        )
        for number, launch in enumerate(call.plan.launches)
    ]  # fmt: skip


def probes(dtype: Dtype, head_size: int) -> Iterator[PlacedFocal]:
    """Calls that differ in every length that a program's cost grows with."""
    two, three = ((1, 0), (2, 2)), ((1, 0), (2, 2), (4, 6))
    calls = (
        ((20, 19), two, 16, 1), ((33, 31), three, 16, 8), ((33, 31), three, 48, 1), ((40, 37), two, 32, 8),
        ((26, 24), two, 64, 6), ((40, 37), two, 32, 3),
    )  # fmt: skip
    for patches, levels, hot, multiprocessors in calls:
        yield place_focal(
            FocalSize(patches, 1, Multiprocessors(multiprocessors), levels, hot=hot, dtype=dtype, head_size=head_size)
        )
