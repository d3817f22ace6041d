"""Whole calls of the operators in the machine: a launch plan's kernels in order, on tensors between guard zones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.plugins.focal_plan import focal_plan
from fna.plugins.launch_plan import LaunchPlan, Strides, attention_plan
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.memory import GUARD, GlobalMemory
from fna.plugins.ptx.number_types import Array
from fna.plugins.ptx.profile import Profile
from fna.plugins.sampling_plan import norm_grid_plan, sampling_plan
from fna.plugins.torch_ops import DTYPE_NAMES, attention_shape, focal_shape

_ELEMENT_ALIGNED = 4
"""How far landmarks, bias and mask lie behind an aligned address: the kernels may rely on their elements' alignment only."""


@dataclass(frozen=True)
class Chip:
    """Which chip's PTX runs, and how many multiprocessors the plan is for."""

    images: PtxImages
    sm: int = 0
    multiprocessors: int = 4
    profile: bool = False


@dataclass(frozen=True)
class Call:
    """What a call wrote, the memory with its reports, and what each launch issued."""

    out: Tensor
    memory: GlobalMemory
    profiles: list[Profile]
    complete: bool
    """Whether every element of the output was written."""


@dataclass(frozen=True)
class Surroundings:
    """What a call may not depend on: what scratch holds, which lane wins, and where inputs lie."""

    poison: int = 0xFF
    shuffle_seed: int | None = None
    packed: bool = False
    """Query, key and value as views of one tensor [B, N, 3, H, D]."""


def bytes_of(tensor: Tensor) -> Array:
    """The bytes of a CPU tensor, flat."""
    flat = tensor.detach().contiguous()
    return flat.view(torch.uint8).numpy().reshape(-1) if flat.numel() else np.zeros(0, np.uint8)


def make_memory(sizes: list[int], surroundings: Surroundings) -> GlobalMemory:
    """An arena with room for tensors of these sizes in bytes."""
    memory = GlobalMemory(sum(sizes) + (len(sizes) + 1) * (GUARD + 512), surroundings.poison)
    if surroundings.shuffle_seed is not None:
        memory.shuffle = np.random.default_rng(surroundings.shuffle_seed)
    return memory


def run_plan(plan: LaunchPlan, memory: GlobalMemory, addresses: dict[str, int], chip: Chip) -> list[Profile]:
    """Launch a plan's kernels; its scratch is allocated first, tensor by tensor, so that a step out of a buffer shows."""
    every = {**addresses, **{name: memory.allocate(name, buffer.size) for name, buffer in plan.buffers.items()}}
    return [
        chip.images.kernel(launch.variant, chip.sm, profile=chip.profile).launch(
            memory, launch.grid, [every[a] if isinstance(a, str) else a for a in launch.arguments]
        )
        for launch in plan.launches
    ]


def run_attention(
    chip: Chip,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S], int32
    bias: Tensor | None = None,  # [B, S] or [1, S], fp32
    *,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    sink: bool = False,
    scale: float | None = None,
    iterations: int = NEWTON_SCHULZ_ITERATIONS,
    exact_rows: bool = False,
    chebyshev: ChebyshevSteps | None = None,
    surroundings: Surroundings | None = None,
) -> Call:
    """FastNystromAttention; `scale` is `D ** -0.5` if None."""
    surroundings = surroundings or Surroundings()
    bias = torch.zeros(1, landmarks.shape[1]) if bias is None else bias
    plan = attention_plan(
        attention_shape(query, landmarks, bias, key_mask), scale=query.shape[3] ** -0.5 if scale is None else scale,
        iterations=iterations, exact_rows=exact_rows, multiprocessors=chip.multiprocessors,
        strides=_packed_strides(query) if surroundings.packed else None, sink=sink, chebyshev=chebyshev,
    )  # fmt: skip
    size = query.numel() * query.element_size()
    small = [t.numel() * 4 + 64 for t in (landmarks, bias, *([] if key_mask is None else [key_mask]))]
    memory = make_memory([*[size] * 4, *small, *(b.size for b in plan.buffers.values())], surroundings)
    addresses = _allocate_inputs(memory, [query, key, value], surroundings.packed)
    for name, tensor in (("landmarks", landmarks), ("bias", bias), ("key_mask", key_mask)):
        addresses[name] = 0 if tensor is None else _allocate_unaligned(memory, name, tensor)
    addresses["out"] = memory.allocate("out", size)
    profiles = run_plan(plan, memory, addresses, chip)
    return _finished(memory, addresses["out"], query, profiles)


def run_focal(
    chip: Chip,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    lists: Sequence[Tensor],  # tile_queries [T, Q], tile_keys [T, K] (int32), tile_bias [T, K] (fp32)
    *,
    prefix_tokens: int,
    hot: int,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    surroundings: Surroundings | None = None,
) -> Call:
    """FocalAttention with the scale `D ** -0.5`."""
    surroundings = surroundings or Surroundings()
    tile_queries, tile_keys, tile_bias = lists
    plan = focal_plan(
        focal_shape(query, tile_queries, tile_keys, key_mask), prefix_tokens=prefix_tokens, hot=hot,
        scale=query.shape[3] ** -0.5, multiprocessors=chip.multiprocessors,
        strides=_packed_strides(query) if surroundings.packed else None,
    )  # fmt: skip
    size = query.numel() * query.element_size()
    small = {"tile_queries": tile_queries, "tile_keys": tile_keys, "tile_bias": tile_bias, "key_mask": key_mask}
    small_sizes = [0 if t is None else t.numel() * 4 + 64 for t in small.values()]
    memory = make_memory([*[size] * 4, *small_sizes, *(b.size for b in plan.buffers.values())], surroundings)
    addresses = _allocate_inputs(memory, [query, key, value], surroundings.packed)
    for name, tensor in small.items():
        addresses[name] = 0 if tensor is None else _allocate_unaligned(memory, name, tensor)
    addresses["out"] = memory.allocate("out", size)
    profiles = run_plan(plan, memory, addresses, chip)
    return _finished(memory, addresses["out"], query, profiles)


def _packed_strides(query: Tensor) -> Strides:
    _, heads, tokens, head_size = query.shape
    return Strides(tokens * 3 * heads * head_size, head_size, 3 * heads * head_size)


def _allocate_inputs(memory: GlobalMemory, tensors: list[Tensor], packed: bool) -> dict[str, int]:
    names = ("query", "key", "value")
    if not packed:
        return {n: memory.allocate(n, bytes_of(t), writable=False) for n, t in zip(names, tensors, strict=True)}
    whole = torch.stack([tensor.permute(0, 2, 1, 3) for tensor in tensors], 2)  # [B, N, 3, H, D]
    base = memory.allocate("packed query, key and value", bytes_of(whole), writable=False)
    step = whole.shape[3] * whole.shape[4] * whole.element_size()
    return {name: base + i * step for i, name in enumerate(names)}


def _allocate_unaligned(memory: GlobalMemory, name: str, tensor: Tensor) -> int:
    content = np.concatenate([np.zeros(_ELEMENT_ALIGNED, np.uint8), bytes_of(tensor)])
    return memory.allocate(name, content, writable=False) + _ELEMENT_ALIGNED


def _finished(memory: GlobalMemory, address: int, like: Tensor, profiles: list[Profile]) -> Call:
    size = like.numel() * like.element_size()
    raw = torch.from_numpy(memory.bytes_at(address, size).copy())
    return Call(raw.view(like.dtype).reshape(like.shape), memory, profiles, memory.written(address, size))


def run_sampling(chip: Chip, features: Tensor, count: int, *, surroundings: Surroundings | None = None) -> Call:
    """FarthestPointSampling of `[B, N, C]`; `out` is `[B, S]` int32."""
    batch, tokens, channels = features.shape
    plan = sampling_plan(DTYPE_NAMES[features.dtype], batch, tokens, channels, count)
    return _run_on_features(chip, plan, features, count, surroundings or Surroundings())


def run_norm_grid(
    chip: Chip, features: Tensor, count: int, *, prefix: int, by_norm: int, surroundings: Surroundings | None = None
) -> Call:
    """Norm-grid landmarks of `[B, N, C]`; `out` is `[B, S]` int32."""
    batch, tokens, channels = features.shape
    dtype = DTYPE_NAMES[features.dtype]
    plan = norm_grid_plan(dtype, batch, tokens, channels, count, prefix=prefix, by_norm=by_norm)
    return _run_on_features(chip, plan, features, count, surroundings or Surroundings())


def _run_on_features(chip: Chip, plan: LaunchPlan, features: Tensor, count: int, surroundings: Surroundings) -> Call:
    landmarks = torch.zeros(features.shape[0], count, dtype=torch.int32)
    content = bytes_of(features)
    memory = make_memory([content.size, landmarks.numel() * 4, *(b.size for b in plan.buffers.values())], surroundings)
    addresses = {"features": memory.allocate("features", content, writable=False)}
    addresses["landmarks"] = memory.allocate("landmarks", landmarks.numel() * 4)
    profiles = run_plan(plan, memory, addresses, chip)
    return _finished(memory, addresses["landmarks"], landmarks, profiles)
