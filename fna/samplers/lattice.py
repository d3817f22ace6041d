"""Prefix tokens, then patch tokens on a hexagonal lattice over the image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fna.samplers.common.record import LandmarkRequest, Sampler
from fna.samplers.common.spacing import evenly_spaced, patch_grid, space_free_tokens, with_prefix


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


def _select(request: LandmarkRequest, features: Tensor | None) -> Tensor:  # [1, S]
    landmarks = lattice_landmarks(request.num_tokens, request.num_landmarks, request.prefix_tokens, request.patches)
    return landmarks.to(request.device or "cpu")


def _select_masked(request: LandmarkRequest, features: Tensor, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, S]
    """As `grid`: what the masks leave is on no lattice."""
    return space_free_tokens(request, with_prefix(request, wanted, barred), barred, evenly_spaced)


SAMPLER = Sampler(
    name="lattice",
    summary="prefix tokens, then patch tokens evenly spaced over the image, every other row shifted",
    select=_select,
    needs_positions=True,
    select_masked=_select_masked,
)
