"""Landmarks that include some tokens and exclude others, whatever these are in the image at hand: `Plan.landmarks_include`.

`select_landmarks` takes masks as the published code does and refuses what is impossible, which it can only find out by looking at
the masks. What is here runs inside a model and in a file, on masks that no one sees: sizes are fixed, and rules that hold for
every mask say what happens. A token's role is `GUARANTEED`, `FREE` or `EXCLUDED`, int32 `[B, N]`:

- of the included tokens, the first are guaranteed, at most `include_room` of them, so that landmarks are left for the rest;
- of the excluded ones, the first are excluded, at most `exclude_room` of them;
- a token that is both is guaranteed; prefix tokens are guaranteed unless excluded.

Guaranteed tokens come first, ascending, and stand for themselves alone; the sampler's own follow. With no token included and none
excluded, landmarks and weights are the sampler's own. Each operator here has an ONNX function in `fna.export.operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fna.errors import InvalidLandmarksError
from fna.samplers import find_sampler
from fna.samplers.common.record import ONNX_DOMAIN, Expressions, GuidedSelection, LandmarkRequest
from fna.samplers.common.spacing import after_guaranteed, evenly_spaced, middles_of_stretches
from fna.special_tokens import LARGEST_SHARE

GUARANTEED, FREE, EXCLUDED = 1, 0, -1


def include_room(num_landmarks: int, prefix_tokens: int) -> int:
    """How many tokens can be included: half of the landmarks that are not prefix tokens."""
    return (num_landmarks - min(prefix_tokens, num_landmarks)) // 2


def exclude_room(num_tokens: int) -> int:
    """How many tokens can be excluded: an eighth of them, as many as can be massive."""
    return max(1, num_tokens // LARGEST_SHARE)


def norm_grid_count(num_landmarks: int, prefix_tokens: int) -> int:
    """How many patch tokens `norm-grid` takes for their norm: a tenth of S less the prefix tokens, at least one.

    A tenth in all, prefix tokens included, is what was measured best on DINOv2-S (a quarter, and a tenth beside the class token,
    lose).
    """
    prefix = min(prefix_tokens, num_landmarks)
    return min(max(1, num_landmarks // 10 - prefix), num_landmarks - prefix)


def most_guaranteed(num_landmarks: int, prefix_tokens: int, *, by_norm: bool) -> int:
    """Room for guaranteed tokens: prefix tokens, included ones and, for `norm-grid`, those of largest norm; at least 1."""
    prefix = min(prefix_tokens, num_landmarks)
    taken = norm_grid_count(num_landmarks, prefix) if by_norm else 0
    return max(1, min(prefix + include_room(num_landmarks, prefix) + taken, num_landmarks))


def check_rooms(
    request: LandmarkRequest,
    method: str,
    *,
    includes: bool,
    excludes: bool,
    name: str = "",
) -> None:
    """Refuse sizes for which a token could not be included or excluded.

    Raises:
        InvalidLandmarksError: saying how many landmarks are needed; `name` says whose.
    """
    if not includes and not excludes:
        return
    where = f"{name}: " if name else ""
    prefix = _guaranteed_prefix(request, _guided(method))
    if includes and include_room(request.num_landmarks, prefix) < 1:
        raise InvalidLandmarksError(
            f"{where}landmarks_include needs {prefix + 2} landmarks or more ({prefix} prefix tokens, a token included, another), "
            f"but there are {request.num_landmarks}"
        )
    # an open size is checked when it is known
    tokens = request.num_tokens
    if excludes and isinstance(tokens, int) and request.num_landmarks > tokens - exclude_room(tokens):
        raise InvalidLandmarksError(
            f"{where}landmarks_exclude leaves {tokens - exclude_room(tokens)} of {tokens} tokens, but {request.num_landmarks} "
            "landmarks were asked for; ask for fewer"
        )


def guided_landmarks(
    features: Tensor | None,  # [B, N, C]
    num_landmarks: int,
    *,
    method: str,
    include: Tensor | None = None,  # [B, N] or [1, N], int32
    exclude: Tensor | None = None,  # [B, N] or [1, N], int32
    prefix_tokens: int = 1,
    name: str = "",
) -> tuple[Tensor, Tensor]:  # int32 and fp32, [B, S] or [1, S]
    """Choose landmarks under roles, and their bias.

    Args:
        features: for samplers that look at them.
        num_landmarks: S.
        method: a sampler that has a `guided` record.
        include: not 0 for tokens to include. At least one of the two masks is needed.
        exclude: not 0 for tokens to exclude.
        prefix_tokens: class and register tokens at the front.
        name: of the block, for errors.

    Returns:
        Landmarks, and `log(weight)` of each: guaranteed tokens stand for themselves, the rest share the other tokens equally;
        under `fps` every weight is 1.

    Raises:
        InvalidLandmarksError: as `check_rooms`.
    """
    mask = include if include is not None else exclude
    assert mask is not None
    request = LandmarkRequest(mask.shape[1], num_landmarks, prefix_tokens)
    check_rooms(request, method, includes=include is not None, excludes=exclude is not None, name=name)
    guided = _guided(method)
    role = torch.ops.fna.landmark_roles(include, exclude, num_landmarks, _guaranteed_prefix(request, guided))
    return guided.select(request, features, role)


def guided_landmarks_nodes(
    op: Expressions,
    request: LandmarkRequest,
    method: str,
    features: str | None,
    include: str | None,
    exclude: str | None,
) -> tuple[str, str | None]:
    """Write `guided_landmarks` in ONNX: values of the landmarks, and of the bias or None where it is 0.

    Args:
        op: builder of nodes.
        request: its number of tokens may be None.
        method: a sampler that has a `guided` record.
        features: value `[B, N, C]`, for samplers that look at features.
        include: value of an int32 mask `[B or 1, N]`, or None.
        exclude: likewise; one of the two is needed.
    """
    guided = _guided(method)
    if include is None or exclude is None:
        nothing = op.Sub(include or exclude, include or exclude)
        include, exclude = include or nothing, exclude or nothing
    sizes = {"num_landmarks": request.num_landmarks, "prefix_tokens": _guaranteed_prefix(request, guided)}
    role = op.LandmarkRoles(include, exclude, domain=ONNX_DOMAIN, **sizes)
    return guided.nodes(op, request, features, role)


def guided_grid_nodes(op: Expressions, request: LandmarkRequest, role: str, *, middles: bool) -> tuple[str, str]:
    """Write `guided_grid`: the landmarks and their bias."""
    sizes = {"num_landmarks": request.num_landmarks, "prefix_tokens": request.prefix_tokens}
    landmarks, bias = op.GuidedGrid(role, domain=ONNX_DOMAIN, outputs=2, **sizes, middles=int(middles))
    return landmarks, bias


def _guided(method: str) -> GuidedSelection:
    guided = find_sampler(method).guided
    assert guided is not None, f"the plan lets {method} be guided"
    return guided


def _guaranteed_prefix(request: LandmarkRequest, guided: GuidedSelection) -> int:
    return request.prefix_tokens if guided.guarantees_prefix else 0


# ---------------------------------------------------------------- operators, one ONNX function each


@torch.library.custom_op("fna::landmark_roles", mutates_args=())
def landmark_roles(include: Tensor | None, exclude: Tensor | None, num_landmarks: int, prefix_tokens: int) -> Tensor:
    """Roles `[B, N]` or `[1, N]` from masks of tokens to include and to exclude; None is nothing."""
    masks = [mask for mask in (include, exclude) if mask is not None]
    nothing = torch.zeros_like(masks[0], dtype=torch.bool)
    wanted = nothing if include is None else _first_of(include != 0, include_room(num_landmarks, prefix_tokens))
    barred = nothing if exclude is None else _first_of(exclude != 0, exclude_room(nothing.shape[1])) & ~wanted
    is_prefix = torch.arange(nothing.shape[1], device=nothing.device) < min(prefix_tokens, num_landmarks)
    return (wanted | (is_prefix & ~barred)).int() - barred.int()


@landmark_roles.register_fake
def _landmark_roles_fake(
    include: Tensor | None, exclude: Tensor | None, num_landmarks: int, prefix_tokens: int
) -> Tensor:
    masks = [mask for mask in (include, exclude) if mask is not None]
    return masks[0].new_empty(torch.broadcast_shapes(*(mask.shape for mask in masks)), dtype=torch.int32)


@torch.library.custom_op("fna::largest_norm_roles", mutates_args=())
def largest_norm_roles(features: Tensor, role: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    """Roles `[B, N]` in which the free tokens of largest norm, as many as `norm-grid` takes, are guaranteed too."""
    count = norm_grid_count(num_landmarks, min(prefix_tokens, num_landmarks))
    norms = features.float().square().sum(-1).masked_fill(role != FREE, -1.0)
    index = norms.topk(count, dim=1).indices
    return role.expand(norms.shape).scatter(1, index, GUARANTEED)


@largest_norm_roles.register_fake
def _largest_norm_roles_fake(features: Tensor, role: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    return role.new_empty(features.shape[:2])


@torch.library.custom_op("fna::guided_grid", mutates_args=())
def guided_grid(role: Tensor, num_landmarks: int, prefix_tokens: int, middles: bool) -> tuple[Tensor, Tensor]:
    """Guaranteed tokens, then free ones evenly spaced, and the bias; `middles`: spaced as `norm-grid` does."""
    wanted, free = role == GUARANTEED, role == FREE
    slot = torch.arange(num_landmarks, device=role.device)[None]
    own = wanted.sum(1, keepdim=True)
    spaced = (num_landmarks - own).clamp(min=1)
    rest = torch.argsort((~free).int(), dim=1, stable=True)  # free tokens first, ascending
    spread = middles_of_stretches if middles else evenly_spaced
    picks = spread(slot, free.sum(1, keepdim=True), spaced).clamp(min=0, max=role.shape[1] - 1)
    landmarks = after_guaranteed(wanted, rest.gather(1, picks), num_landmarks)
    weight = (role.shape[1] - own).float() / spaced
    return landmarks, torch.where(slot < own, 0.0, weight.log())


@guided_grid.register_fake
def _guided_grid_fake(role: Tensor, num_landmarks: int, prefix_tokens: int, middles: bool) -> tuple[Tensor, Tensor]:
    size = (role.shape[0], num_landmarks)
    return role.new_empty(size), role.new_empty(size, dtype=torch.float32)


@torch.library.custom_op("fna::guided_features", mutates_args=())
def guided_features(features: Tensor, role: Tensor) -> Tensor:
    """Features in which every token that is not free equals the first free one.

    Farthest point sampling of them starts there and takes no other such token while free ones are left that differ from those
    it has: their distance is 0.
    """
    first = (role == FREE).int().argmax(dim=1)[:, None, None].expand(features.shape[0], 1, features.shape[2])
    return torch.where((role == FREE)[:, :, None], features, features.gather(1, first))


@guided_features.register_fake
def _guided_features_fake(features: Tensor, role: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


@torch.library.custom_op("fna::guided_picks", mutates_args=())
def guided_picks(role: Tensor, picks: Tensor) -> Tensor:
    """Guaranteed tokens, then as many as there is room for of `picks` `[B, S]`, which were taken from `guided_features`."""
    role = role.expand(picks.shape[0], -1)
    first = (role == FREE).int().argmax(dim=1, keepdim=True)
    moved = torch.where(
        picks == 0, first, picks
    )  # token 0, which sampling starts at, is the first free one or stands for it
    return after_guaranteed(role == GUARANTEED, moved, picks.shape[1])


@guided_picks.register_fake
def _guided_picks_fake(role: Tensor, picks: Tensor) -> Tensor:
    return torch.empty_like(picks)


def _first_of(mask: Tensor, count: int) -> Tensor:
    """The first `count` tokens of a mask `[B, N]`."""
    return mask & (mask.cumsum(1) <= count)
