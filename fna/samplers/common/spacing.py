"""Spacing landmarks among tokens, in integer arithmetic, and putting guaranteed tokens first."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fna.errors import InvalidArgumentError
from fna.samplers.common.record import LandmarkRequest


def patch_grid(num_tokens: int, prefix_tokens: int, patches: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the patches: those given, else a square.

    Raises:
        InvalidArgumentError: if they do not account for the tokens.
    """
    count = num_tokens - prefix_tokens
    side = math.isqrt(max(count, 0))
    rows, columns = patches or (side, side)
    if rows * columns != count:
        told = f"{rows} x {columns} patches were given" if patches else "it is no square number"
        raise InvalidArgumentError(
            f"where {count} patch tokens lie on the image cannot be told: {told}; the plan's field patches, [rows, columns], "
            "says it"
        )
    return rows, columns


def evenly_spaced(
    slot: Tensor,  # integer
    length: Tensor | int,
    count: Tensor | int,
) -> Tensor:
    """Position of the `slot`-th of `count` points from 0 to `length - 1`, rounded to whole numbers."""
    if isinstance(count, int):
        return (2 * slot * (length - 1) + count - 1) // (2 * (count - 1)) if count > 1 else slot * 0 + length // 2
    gaps = (count - 1).clamp(min=1)
    return torch.where(count > 1, (2 * slot * (length - 1) + gaps) // (2 * gaps), length // 2)


def middles_of_stretches(
    slot: Tensor,  # integer
    length: Tensor | int,
    count: Tensor | int,
) -> Tensor:
    """Position of the middle of the `slot`-th of `count` equal stretches of `length` tokens."""
    return ((2 * slot + 1) * length) // (2 * count)


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


def with_prefix(request: LandmarkRequest, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, N], bool
    """Guarantee the prefix tokens that are not excluded, too."""
    position = torch.arange(wanted.shape[1], device=wanted.device)
    return wanted | ((position < request.prefix_tokens) & ~barred)


def space_free_tokens(
    request: LandmarkRequest,
    wanted: Tensor,  # [B, N], bool
    barred: Tensor,  # [B, N], bool
    spread: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:  # [B, S], int32
    """Guaranteed tokens, then tokens that are neither guaranteed nor excluded, spaced by `spread`."""
    free = ~(wanted | barred)
    ascending = torch.argsort((~free).int(), dim=1, stable=True)  # free tokens first: [B, N]
    slot = torch.arange(request.num_landmarks, device=wanted.device)[None]
    left = (request.num_landmarks - wanted.sum(1, keepdim=True)).clamp(min=1)
    picks = spread(slot, free.sum(1, keepdim=True), left).clamp(min=0, max=wanted.shape[1] - 1)
    return after_guaranteed(wanted, ascending.gather(1, picks), request.num_landmarks)
