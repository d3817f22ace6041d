"""The same steps as the attention kernels in plain PyTorch, one function a launch, for tests to compare each kernel with.

The whole of them is `fna.attention.nystrom_attention_reference`, and what `finish_chebyshev` does is `chebyshev_core` there; the
twins of the sampling kernels are `fna.samplers.fps.farthest_points_reference` and `norm_grid_reference`. Everything is computed in
the type of the inputs: pass fp64 for a reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fna.chebyshev import CHEBYSHEV_COLUMN_FLOOR


def gather_landmarks(
    tensor: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
) -> Tensor:  # [B, H, S, D]
    """Rows at the landmarks, the same for all heads."""
    index = landmarks.long()[:, None, :, None].expand(tensor.shape[0], tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def core_twin(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    bias: Tensor,  # [B, S] or [1, S]
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """A, and T = w A^T A of the Chebyshev core, both `[B, H, S, S]`."""
    scores = scale * gather_landmarks(query, landmarks) @ gather_landmarks(key, landmarks).mT
    core = torch.softmax(scores + bias[:, None, None, :], dim=-1)
    return core, core.mT @ core / core.sum(dim=-2).clamp_min(CHEBYSHEV_COLUMN_FLOOR)[..., None]


def landmark_twin(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    bias: Tensor,  # [B, S] or [1, S]
    *,
    scale: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bv `[B, H, S, D]`; Z after all iterations but the last, and W = A Z, both `[B, H, S, S]`."""
    query_landmarks, key_landmarks = gather_landmarks(query, landmarks), gather_landmarks(key, landmarks)
    exact = torch.softmax(scale * query_landmarks @ key.mT, dim=-1) @ value
    core = torch.softmax(scale * query_landmarks @ key_landmarks.mT + bias[:, None, None, :], dim=-1)
    inverse = core.mT / core.sum(dim=-2).amax(dim=-1)[..., None, None]
    identity = torch.eye(core.shape[-1], dtype=core.dtype)
    for _ in range(iterations - 1):
        product = core @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return exact, inverse, core @ inverse


def finish_twin(
    exact: Tensor,  # [B, H, S, D]
    inverse: Tensor,  # [B, H, S, S]
    product: Tensor,  # [B, H, S, S]
) -> Tensor:  # [B, H, S, D]
    """The last iteration, applied to Bv."""
    step = 7 * exact - product @ exact
    step = 15 * exact - product @ step
    step = 13 * exact - product @ step
    return 0.25 * inverse @ step


def output_twin(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    bias: Tensor,  # [B, S] or [1, S]
    exact: Tensor,  # [B, H, S, D]
    mixed: Tensor,  # [B, H, S, D]
    *,
    scale: float,
    exact_rows: bool,
) -> Tensor:  # [B, H, N, D]
    """Softmax of all queries over the landmark keys, times `mixed`; with `exact` over the landmarks' rows."""
    scores = scale * query @ gather_landmarks(key, landmarks).mT + bias[:, None, None, :]
    out = torch.softmax(scores, dim=-1) @ mixed
    if exact_rows:
        index = landmarks.long()[:, None, :, None].expand(*out.shape[:2], -1, out.shape[3])
        out = out.scatter(2, index, exact)
    return out
