"""Prefix tokens, then patch tokens drawn without replacement, the same for every image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fna.samplers.common.record import LandmarkRequest, Sampler, all_stand_alone
from fna.samplers.common.spacing import after_guaranteed, with_prefix


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


def _select(request: LandmarkRequest, features: Tensor | None) -> Tensor:  # [1, S]
    landmarks = random_landmarks(request.num_tokens, request.num_landmarks, request.prefix_tokens, request.seed)
    return landmarks.to(request.device or "cpu")


def _select_masked(request: LandmarkRequest, features: Tensor, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, S]
    wanted = with_prefix(request, wanted, barred)
    free = ~(wanted | barred)
    noise = torch.rand(free.shape[1], generator=torch.Generator().manual_seed(request.seed)).to(free.device)
    shuffled = torch.argsort(torch.where(free, noise[None], 2.0), dim=1, stable=True)  # free tokens first
    return after_guaranteed(wanted, shuffled[:, : request.num_landmarks], request.num_landmarks)


SAMPLER = Sampler(
    name="random",
    planned=False,
    summary="prefix tokens, then patch tokens drawn once by a seed",
    select=_select,
    stand_alone=all_stand_alone,
    select_masked=_select_masked,
)
