"""Landmarks that include some tokens and exclude others, whatever these are in the image at hand: `Plan.landmarks_include`.

`select_landmarks` takes masks as the published code does and refuses what is impossible, which it can only find out by looking at
the masks. What is here runs inside a model and in a file, on masks that no one sees: sizes are fixed, and rules that hold for
every mask say what happens. A token's role is `GUARANTEED`, `FREE` or `EXCLUDED`, int32 `[B, N]`:

- of the included tokens, the first are guaranteed, at most `include_room` of them, so that landmarks are left for the rest;
- of the excluded ones, the first are excluded, at most `exclude_room` of them;
- a token that is both is guaranteed; prefix tokens are guaranteed unless excluded.

Guaranteed tokens come first, ascending, and stand for themselves alone; the sampler's own follow. With no token included and none
excluded, landmarks and weights are the sampler's own. `fna.export.operators.functions` says the same in ONNX.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fna.errors import InvalidLandmarksError
from fna.landmarks import after_guaranteed, evenly_spaced, middles_of_stretches, norm_grid_count
from fna.plan import Sampler
from fna.special_tokens import LARGEST_SHARE

GUARANTEED, FREE, EXCLUDED = 1, 0, -1


def include_room(num_landmarks: int, prefix_tokens: int) -> int:
    """How many tokens can be included: half of the landmarks that are not prefix tokens."""
    return (num_landmarks - min(prefix_tokens, num_landmarks)) // 2


def exclude_room(num_tokens: int) -> int:
    """How many tokens can be excluded: an eighth of them, as many as can be massive."""
    return max(1, num_tokens // LARGEST_SHARE)


def own_prefix(method: Sampler, prefix_tokens: int) -> int:
    """The prefix tokens that a sampler guarantees."""
    return 0 if method == "fps" else prefix_tokens


def most_guaranteed(num_landmarks: int, prefix_tokens: int, *, by_norm: bool) -> int:
    """Room for guaranteed tokens: prefix tokens, included ones and, for `norm-grid`, those of largest norm; at least 1."""
    prefix = min(prefix_tokens, num_landmarks)
    taken = norm_grid_count(num_landmarks, prefix) if by_norm else 0
    return max(1, min(prefix + include_room(num_landmarks, prefix) + taken, num_landmarks))


def check_rooms(
    num_landmarks: int,
    num_tokens: int,
    method: Sampler,
    prefix_tokens: int,
    *,
    includes: bool,
    excludes: bool,
    name: str = "",
) -> None:
    """Refuse sizes for which a token could not be included or excluded.

    Raises:
        InvalidLandmarksError: saying how many landmarks are needed; `name` says whose.
    """
    where = f"{name}: " if name else ""
    prefix = own_prefix(method, prefix_tokens)
    if includes and include_room(num_landmarks, prefix) < 1:
        raise InvalidLandmarksError(
            f"{where}landmarks_include needs {prefix + 2} landmarks or more ({prefix} prefix tokens, a token included, another), "
            f"but there are {num_landmarks}"
        )
    # an open size is checked when it is known
    if excludes and isinstance(num_tokens, int) and num_landmarks > num_tokens - exclude_room(num_tokens):
        raise InvalidLandmarksError(
            f"{where}landmarks_exclude leaves {num_tokens - exclude_room(num_tokens)} of {num_tokens} tokens, but {num_landmarks} "
            "landmarks were asked for; ask for fewer"
        )


def guided_landmarks(
    features: Tensor | None,  # [B, N, C]
    num_landmarks: int,
    *,
    method: Sampler,
    include: Tensor | None = None,  # [B, N] or [1, N], int32
    exclude: Tensor | None = None,  # [B, N] or [1, N], int32
    prefix_tokens: int = 1,
    name: str = "",
) -> tuple[Tensor, Tensor]:  # int32 and fp32, [B, S] or [1, S]
    """Choose landmarks under roles, and their bias.

    Args:
        features: what `fps` and `norm-grid` look at; `grid` needs none.
        num_landmarks: S.
        method: `fps`, `grid` or `norm-grid`.
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
    check_rooms(
        num_landmarks, mask.shape[1], method, prefix_tokens,
        includes=include is not None, excludes=exclude is not None, name=name,
    )  # fmt: skip
    operators = torch.ops.fna
    role = operators.landmark_roles(include, exclude, num_landmarks, own_prefix(method, prefix_tokens))
    if method == "fps":
        picks = operators.farthest_point_sampling(operators.guided_features(features, role), num_landmarks)
        bias = torch.zeros(1, num_landmarks, device=picks.device)
        return operators.guided_picks(role, picks), bias
    if method == "norm-grid":
        role = operators.largest_norm_roles(features, role, num_landmarks, prefix_tokens)
    landmarks, bias = operators.guided_grid(role, num_landmarks, prefix_tokens, method == "norm-grid")
    return landmarks, bias


# ---------------------------------------------------------------- operators, one ONNX function each


@torch.library.custom_op("fna::landmark_roles", mutates_args=())
def landmark_roles(include: Tensor | None, exclude: Tensor | None, num_landmarks: int, prefix_tokens: int) -> Tensor:
    """Roles `[B, N]` or `[1, N]` from masks of tokens to include and to exclude; None is nothing."""
    given = [mask for mask in (include, exclude) if mask is not None]
    nothing = torch.zeros_like(given[0], dtype=torch.bool)
    wanted = nothing if include is None else _first_of(include != 0, include_room(num_landmarks, prefix_tokens))
    barred = nothing if exclude is None else _first_of(exclude != 0, exclude_room(nothing.shape[1])) & ~wanted
    is_prefix = torch.arange(nothing.shape[1], device=nothing.device) < min(prefix_tokens, num_landmarks)
    return (wanted | (is_prefix & ~barred)).int() - barred.int()


@landmark_roles.register_fake
def _landmark_roles_fake(
    include: Tensor | None, exclude: Tensor | None, num_landmarks: int, prefix_tokens: int
) -> Tensor:
    given = [mask for mask in (include, exclude) if mask is not None]
    return given[0].new_empty(torch.broadcast_shapes(*(mask.shape for mask in given)), dtype=torch.int32)


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
