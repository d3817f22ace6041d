"""Choosing landmark tokens, and how many tokens each of them stands for.

Five samplers: `fps` (farthest point sampling), `grid` (prefix tokens, then evenly spaced in a row), `lattice` (prefix tokens, then
evenly spaced over the image, every other row shifted), `norm-grid` (prefix tokens, the tenth of largest norm, then evenly
spaced) and `random` (seeded). All are batched; none reads a tensor back from the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fna.cuda_kernels import load_cuda_kernels
from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidLandmarksError, InvalidShapeError
from fna.plan import SAMPLERS, Sampler


def select_landmarks(
    features: Tensor,  # [B, N, C]
    num_landmarks: int,
    *,
    method: Sampler = "fps",
    guarantee: Tensor | None = None,  # [N] or [B, N], bool
    exclude: Tensor | None = None,  # [N] or [B, N], bool
    prefix_tokens: int = 1,
    seed: int = 0,
    patches: tuple[int, int] | None = None,
) -> Tensor:  # [B, S], int32
    """Choose `num_landmarks` distinct token indices per batch item.

    Args:
        features: what the samplers look at: hidden states, or query, key or value averaged over the heads.
        num_landmarks: S, from 1 to N.
        method: the sampler. `grid`, `lattice` and `random` look at the shape of `features` only; with masks, `lattice` spaces the
            rest as `grid` does.
        guarantee: tokens that come first, in ascending order, whatever the sampler.
        exclude: tokens that are never chosen; a token that is also guaranteed is chosen.
        prefix_tokens: class and register tokens at the front, taken by `grid`, `norm-grid` and `random` unless excluded.
        seed: for `random`.
        patches: rows and columns of the patch tokens, for `lattice`; None takes them for a square.

    Returns:
        Landmark indices `[B, S]`, int32, on the device of `features`.

    Raises:
        InvalidShapeError, InvalidDtypeError, InvalidArgumentError, InvalidLandmarksError: naming what was given.
    """
    _check_request(features, num_landmarks, method, prefix_tokens)
    batch, num_tokens, _ = features.shape
    wanted = _token_mask("guarantee", guarantee, features)
    barred = _token_mask("exclude", exclude, features) & ~wanted
    unmasked = guarantee is None and exclude is None
    if not unmasked:
        _check_masks(wanted, barred, num_landmarks)
    if method == "fps":
        order = _fps_order(features, num_landmarks, ~(wanted | barred), fast=unmasked)
        return order if unmasked else after_guaranteed(wanted, order, num_landmarks)

    if unmasked and method == "grid":
        return grid_landmarks(num_tokens, num_landmarks, prefix_tokens, device=features.device).expand(batch, -1)
    if unmasked and method == "lattice":
        lattice = lattice_landmarks(num_tokens, num_landmarks, prefix_tokens, patches)
        return lattice.to(features.device).expand(batch, -1)
    if unmasked and method == "norm-grid":
        return torch.ops.fna.norm_grid_landmarks(features, num_landmarks, prefix_tokens)
    if unmasked:
        return random_landmarks(num_tokens, num_landmarks, prefix_tokens, seed).to(features.device).expand(batch, -1)

    position = torch.arange(num_tokens, device=features.device)
    wanted = wanted | ((position < prefix_tokens) & ~barred)
    if method == "norm-grid":
        wanted = _add_largest_norms(features, wanted, barred, norm_grid_count(num_landmarks, prefix_tokens))
    free = ~(wanted | barred)
    rest = torch.argsort((~free).int(), dim=1, stable=True)  # free tokens first, ascending: [B, N]
    if method == "random":
        rest = _shuffle_free(free, seed)
        picks = torch.arange(num_landmarks, device=features.device).expand(batch, -1)
    else:
        slot = torch.arange(num_landmarks, device=features.device)[None]
        spread = middles_of_stretches if method == "norm-grid" else evenly_spaced
        picks = spread(slot, free.sum(1, keepdim=True), (num_landmarks - wanted.sum(1, keepdim=True)).clamp(min=1))
    return after_guaranteed(wanted, rest.gather(1, picks.clamp(min=0, max=num_tokens - 1)), num_landmarks)


def landmark_bias(
    num_tokens: int,
    num_landmarks: int,
    *,
    method: Sampler = "grid",
    prefix_tokens: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:  # [1, S], fp32
    """Return `log(weight)` of each landmark, where a landmark's weight is the number of tokens that it stands for.

    Prefix tokens, and the tokens that `norm-grid` took for their norm, stand for themselves (bias 0). The evenly spaced rest
    share the other tokens equally. Under `fps` and `random` every weight is 1.

    Args:
        num_tokens: N.
        num_landmarks: S, from 1 to N.
        method: the sampler whose landmarks these are, in the order in which `select_landmarks` returns them.
        prefix_tokens: class and register tokens at the front.
        device: where the result is made.

    Returns:
        fp32 `[1, S]`, the same for every image.
    """
    _check_method(method)
    _check_count(num_landmarks, num_tokens)
    own = min(prefix_tokens, num_landmarks)
    if method == "norm-grid":
        own += norm_grid_count(num_landmarks, prefix_tokens)
    if method in ("fps", "random") or own == num_landmarks:
        return torch.zeros(1, num_landmarks, device=device)
    weight = (num_tokens - own) / (num_landmarks - own)
    index = torch.arange(num_landmarks, device=device)[None]
    return torch.log(torch.where(index < own, 1.0, weight))


def grid_landmarks(
    num_tokens: int,
    num_landmarks: int,
    prefix_tokens: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:  # [1, S], int32
    """Prefix tokens, then patch tokens evenly spaced from the first to the last; one alone is the middle one."""
    prefix = min(prefix_tokens, num_landmarks)
    slot = torch.arange(num_landmarks, device=device)
    spaced = num_landmarks - prefix
    if spaced == 0:
        return slot.int()[None]
    even = prefix + evenly_spaced(slot - prefix, num_tokens - prefix, spaced)
    return torch.where(slot < prefix, slot, even).int()[None]


def lattice_landmarks(
    num_tokens: int,
    num_landmarks: int,
    prefix_tokens: int,
    patches: tuple[int, int] | None = None,
) -> Tensor:  # [1, S], int32
    """Prefix tokens, then patch tokens on a lattice over the image: rows a little closer than columns, every other one shifted.

    Neighbouring landmarks of a hexagonal lattice are equally far apart, which covers the image best; on the CPU, the same for
    every image.

    Args:
        num_tokens: N.
        num_landmarks: S.
        prefix_tokens: class and register tokens at the front.
        patches: rows and columns of the patch tokens; None takes them for a square.

    Raises:
        InvalidArgumentError: if the rows and columns do not account for the tokens.
    """
    prefix = min(prefix_tokens, num_landmarks)
    height, width = patch_grid(num_tokens, prefix_tokens, patches)
    spaced = num_landmarks - prefix
    if spaced == 0:
        return torch.arange(prefix, dtype=torch.int32)[None]
    lines = round(math.sqrt(spaced * height / width * 2 / math.sqrt(3)))
    lines = min(max(lines, -(-spaced // width), 1), height)
    index = list(range(prefix))
    for line in range(lines):
        count = (line + 1) * spaced // lines - line * spaced // lines
        row = (2 * line + 1) * height // (2 * lines)
        shift = 1 if line % 2 else 3  # quarters of the distance between two landmarks
        index += [prefix_tokens + row * width + (4 * slot + shift) * width // (4 * count) for slot in range(count)]
    return torch.tensor([index], dtype=torch.int32)


def patch_grid(num_tokens: int, prefix_tokens: int, patches: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the patches: those given, else a square.

    Raises:
        InvalidArgumentError: if they do not account for the tokens.
    """
    count = num_tokens - prefix_tokens
    side = math.isqrt(max(count, 0))
    rows, columns = patches or (side, side)
    if rows * columns != count:
        given = f"{rows} x {columns} patches were given" if patches else "it is no square number"
        raise InvalidArgumentError(
            f"where {count} patch tokens lie on the image cannot be told: {given}; the plan's field patches, [rows, columns], "
            "says it"
        )
    return rows, columns


def evenly_spaced(
    slot: Tensor,  # integer
    length: Tensor | int,
    count: Tensor | int,
) -> Tensor:
    """Position of the `slot`-th of `count` points from 0 to `length - 1`, rounded to whole numbers; integer arithmetic only."""
    if isinstance(count, int):
        return (2 * slot * (length - 1) + count - 1) // (2 * (count - 1)) if count > 1 else slot * 0 + length // 2
    gaps = (count - 1).clamp(min=1)
    return torch.where(count > 1, (2 * slot * (length - 1) + gaps) // (2 * gaps), length // 2)


def middles_of_stretches(
    slot: Tensor,  # integer
    length: Tensor | int,
    count: Tensor | int,
) -> Tensor:
    """Position of the middle of the `slot`-th of `count` equal stretches of `length` tokens; integer arithmetic only."""
    return ((2 * slot + 1) * length) // (2 * count)


def random_landmarks(
    num_tokens: int,
    num_landmarks: int,
    prefix_tokens: int,
    seed: int,
) -> Tensor:  # [1, S], int32
    """Prefix tokens, then patch tokens drawn without replacement; ascending, on the CPU, the same for every image."""
    prefix = min(prefix_tokens, num_landmarks)
    # NumPy draws, so that tracing sees a constant and every version of PyTorch the same tokens.
    drawn = np.random.default_rng(seed).permutation(num_tokens - prefix)[: num_landmarks - prefix] + prefix
    return torch.tensor([[*range(prefix), *sorted(drawn.tolist())]], dtype=torch.int32)


def norm_grid_count(num_landmarks: int, prefix_tokens: int) -> int:
    """How many patch tokens `norm-grid` takes for their norm: a tenth of S less the prefix tokens, at least one.

    A tenth in all, prefix tokens included, is what was measured best on DINOv2-S (a quarter, and a tenth beside the class token,
    lose).
    """
    prefix = min(prefix_tokens, num_landmarks)
    return min(max(1, num_landmarks // 10 - prefix), num_landmarks - prefix)


def norm_grid_reference(
    features: Tensor,  # [B, N, C]
    num_landmarks: int,
    prefix_tokens: int,
) -> Tensor:  # [B, S], int32
    """Prefix tokens, the patch tokens of largest norm (ascending), then the rest evenly spaced among the others."""
    batch, num_tokens, _ = features.shape
    prefix = min(prefix_tokens, num_landmarks)
    by_norm = norm_grid_count(num_landmarks, prefix)
    spaced = num_landmarks - prefix - by_norm
    front = torch.arange(prefix, device=features.device).expand(batch, -1)
    if by_norm == 0:
        return front.int()
    norms = features[:, prefix:].float().square().sum(-1)
    taken = norms.topk(by_norm, dim=1).indices.sort(dim=1).values  # [B, T], counted from the first patch
    parts = [front, taken + prefix]
    if spaced:
        others = num_tokens - prefix - by_norm
        slot = torch.arange(spaced, device=features.device)
        position = middles_of_stretches(slot, others, spaced)  # [K], counted among the tokens not taken
        shift = taken - torch.arange(by_norm, device=features.device)
        skipped = (shift[:, None, :] <= position[None, :, None]).sum(-1)
        parts.append(position[None] + skipped + prefix)
    return torch.cat(parts, dim=1).int()


def farthest_points_reference(
    features: Tensor,  # [B, N, C]
    num_landmarks: int,
    eligible: Tensor | None = None,  # [B, N], bool
) -> Tensor:  # [B, S], int32
    """Farthest point sampling by squared Euclidean distance, from the lowest eligible index; ties go to the lowest index."""
    batch, num_tokens, _ = features.shape
    points = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    position = torch.arange(num_tokens, device=features.device)
    distance = torch.full((batch, num_tokens), torch.inf, dtype=points.dtype, device=features.device)
    if eligible is not None:
        distance = distance.masked_fill(~eligible, -torch.inf)
    chosen = []
    for _ in range(num_landmarks):
        farthest = distance == distance.amax(dim=1, keepdim=True)
        index = torch.where(farthest, position, num_tokens).amin(dim=1)  # [B]
        chosen.append(index)
        point = points.gather(1, index[:, None, None].expand(-1, 1, points.shape[2]))
        distance = torch.minimum(distance, (points - point).square().sum(-1))
        distance = distance.scatter(1, index[:, None], -torch.inf)
    return torch.stack(chosen, dim=1).int()


@torch.library.custom_op("fna::farthest_point_sampling", mutates_args=())
def _fps_op(features: Tensor, num_landmarks: int) -> Tensor:
    if features.is_cuda and load_cuda_kernels():
        return torch.ops.fna.farthest_point_sampling(features, num_landmarks)
    return farthest_points_reference(features, num_landmarks)


@torch.library.custom_op("fna::norm_grid_landmarks", mutates_args=())
def _norm_grid_op(features: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    if features.is_cuda and load_cuda_kernels():
        return torch.ops.fna.norm_grid_landmarks(features, num_landmarks, prefix_tokens)
    return norm_grid_reference(features, num_landmarks, prefix_tokens)


@_fps_op.register_fake
def _fps_fake(features: Tensor, num_landmarks: int) -> Tensor:
    return features.new_empty((features.shape[0], num_landmarks), dtype=torch.int32)


@_norm_grid_op.register_fake
def _norm_grid_fake(features: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    return features.new_empty((features.shape[0], num_landmarks), dtype=torch.int32)


def _fps_order(features: Tensor, num_landmarks: int, eligible: Tensor, *, fast: bool) -> Tensor:
    if fast:
        return torch.ops.fna.farthest_point_sampling(features, num_landmarks)
    return farthest_points_reference(features, num_landmarks, eligible)


def after_guaranteed(
    wanted: Tensor,  # [B, N], bool
    rest: Tensor,  # [B, S]
    num_landmarks: int,
) -> Tensor:  # [B, S], int32
    """Put each item's guaranteed indices, ascending, before as many of `rest` as there is room for."""
    count = wanted.sum(1, keepdim=True)
    slot = torch.arange(num_landmarks, device=wanted.device)[None]
    ascending = torch.argsort((~wanted).int(), dim=1, stable=True)[:, :num_landmarks]
    later = rest.gather(1, (slot - count).clamp(min=0))
    return torch.where(slot < count, ascending, later).int()


def _add_largest_norms(features: Tensor, wanted: Tensor, barred: Tensor, count: int) -> Tensor:
    norms = features.float().square().sum(-1).masked_fill(wanted | barred, -1.0)
    index = norms.topk(min(count, norms.shape[1]), dim=1).indices
    return (wanted.scatter(1, index, True) & ~barred) | wanted


def _shuffle_free(free: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(free.shape[1], generator=generator).to(free.device)
    return torch.argsort(torch.where(free, noise[None], 2.0), dim=1, stable=True)


def _token_mask(name: str, mask: Tensor | None, features: Tensor) -> Tensor:
    shape = features.shape[:2]
    if mask is None:
        return torch.zeros(shape, dtype=torch.bool, device=features.device)
    if mask.dtype != torch.bool:
        raise InvalidDtypeError(f"{name} is {mask.dtype}, but a boolean mask over the tokens is needed")
    if mask.shape not in (shape, shape[1:]):
        raise InvalidShapeError(f"{name} has shape {list(mask.shape)}, but [{shape[1]}] or {list(shape)} is needed")
    return mask.to(features.device).expand(shape)


def _check_masks(wanted: Tensor, barred: Tensor, num_landmarks: int) -> None:
    most, available = int(wanted.sum(1).max()), int((~barred).sum(1).min())
    if most > num_landmarks:
        raise InvalidLandmarksError(
            f"{most} tokens are guaranteed, but only {num_landmarks} landmarks were asked for; raise the number of landmarks"
        )
    if available < num_landmarks:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were asked for, but only {available} tokens are not excluded"
        )


def _check_request(features: Tensor, num_landmarks: int, method: str, prefix_tokens: int) -> None:
    if features.dim() != 3:
        raise InvalidShapeError(f"features have shape {list(features.shape)}, but [B, N, C] (3 dimensions) is needed")
    if not features.is_floating_point():
        raise InvalidDtypeError(f"features are {features.dtype}, but a floating-point type is needed")
    _check_method(method)
    if prefix_tokens < 0:
        raise InvalidArgumentError(f"prefix_tokens is {prefix_tokens}, but 0 or more is needed")
    _check_count(num_landmarks, features.shape[1])


def _check_method(method: str) -> None:
    if method not in SAMPLERS:
        raise InvalidArgumentError(f"sampler {method!r} is not known; choose one of {', '.join(SAMPLERS)}")


def _check_count(num_landmarks: int, num_tokens: int) -> None:
    if num_landmarks < 1 or num_landmarks > num_tokens:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were asked for of {num_tokens} tokens, but 1 to {num_tokens} are needed"
        )
