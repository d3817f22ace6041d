"""Prefix tokens, then patch tokens evenly spaced in a row from the first to the last."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fna.samplers.common.record import Expressions, GuidedSelection, LandmarkRequest, Sampler
from fna.samplers.common.roles import guided_grid_nodes
from fna.samplers.common.spacing import evenly_spaced, space_free_tokens, with_prefix


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


def _select(request: LandmarkRequest, features: Tensor | None) -> Tensor:  # [1, S]
    return grid_landmarks(request.num_tokens, request.num_landmarks, request.prefix_tokens, device=request.device)


def _select_masked(request: LandmarkRequest, features: Tensor, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, S]
    return space_free_tokens(request, with_prefix(request, wanted, barred), barred, evenly_spaced)


def _select_guided(request: LandmarkRequest, features: Tensor | None, role: Tensor) -> tuple[Tensor, Tensor]:
    landmarks, bias = torch.ops.fna.guided_grid(role, request.num_landmarks, request.prefix_tokens, False)
    return landmarks, bias


def _guided_nodes(op: Expressions, request: LandmarkRequest, features: str | None, role: str) -> tuple[str, str | None]:
    return guided_grid_nodes(op, request, role, middles=False)


def _open_size_nodes(op: Expressions, num_tokens: str, request: LandmarkRequest) -> str:  # [1, S], int32
    """Write `evenly_spaced`: the i-th of K points from 0 to L - 1 is (2 i (L - 1) + K - 1) / (2 (K - 1)), a single one L / 2."""
    prefix = request.prefix
    spaced = request.num_landmarks - prefix
    front = np.arange(prefix, dtype=np.int64)[None]
    if spaced == 0:
        constant: str = op.Identity(front.astype(np.int32))
        return constant
    if spaced == 1:
        position = op.Div(op.Sub(num_tokens, [prefix]), [[2]])
    else:
        stretched = op.Mul(2 * np.arange(spaced, dtype=np.int64)[None], op.Sub(num_tokens, [prefix + 1]))
        position = op.Div(op.Add(stretched, [spaced - 1]), [2 * (spaced - 1)])
    index = op.Add(position, [prefix])
    landmarks: str = op.Cast(op.Concat(front, index, axis=1) if prefix else index, to="INT32")
    return landmarks


SAMPLER = Sampler(
    name="grid",
    summary="prefix tokens, then patch tokens evenly spaced in a row",
    select=_select,
    open_size_nodes=_open_size_nodes,
    select_masked=_select_masked,
    guided=GuidedSelection(_select_guided, _guided_nodes),
    compared=True,
)
