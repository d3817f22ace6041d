"""Farthest point sampling: each landmark is the token farthest from those chosen before, by squared Euclidean distance."""

from __future__ import annotations

import torch
from torch import Tensor

from fna.cuda_kernels import load_cuda_kernels
from fna.samplers.common.record import (
    ONNX_DOMAIN,
    Expressions,
    GuidedSelection,
    LandmarkRequest,
    Sampler,
    all_stand_alone,
)
from fna.samplers.common.spacing import after_guaranteed


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
def _farthest_points_op(features: Tensor, num_landmarks: int) -> Tensor:
    if features.is_cuda and load_cuda_kernels():
        return torch.ops.fna.farthest_point_sampling(features, num_landmarks)
    return farthest_points_reference(features, num_landmarks)


@_farthest_points_op.register_fake
def _farthest_points_fake(features: Tensor, num_landmarks: int) -> Tensor:
    return features.new_empty((features.shape[0], num_landmarks), dtype=torch.int32)


def _select(request: LandmarkRequest, features: Tensor | None) -> Tensor:  # [B, S]
    assert features is not None
    return torch.ops.fna.farthest_point_sampling(features, request.num_landmarks)


def _select_masked(request: LandmarkRequest, features: Tensor, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, S]
    order = farthest_points_reference(features, request.num_landmarks, ~(wanted | barred))
    return after_guaranteed(wanted, order, request.num_landmarks)


def _select_guided(request: LandmarkRequest, features: Tensor | None, role: Tensor) -> tuple[Tensor, Tensor]:
    operators = torch.ops.fna
    picks = operators.farthest_point_sampling(operators.guided_features(features, role), request.num_landmarks)
    bias = torch.zeros(1, request.num_landmarks, device=picks.device)
    return operators.guided_picks(role, picks), bias


def _nodes(op: Expressions, features: str, request: LandmarkRequest) -> str:
    landmarks: str = op.FarthestPointSampling(features, domain=ONNX_DOMAIN, num_landmarks=request.num_landmarks)
    return landmarks


def _guided_nodes(op: Expressions, request: LandmarkRequest, features: str | None, role: str) -> tuple[str, str | None]:
    assert features is not None
    picks = _nodes(op, op.GuidedFeatures(features, role, domain=ONNX_DOMAIN), request)
    return op.GuidedPicks(role, picks, domain=ONNX_DOMAIN, num_landmarks=request.num_landmarks), None


def _once_per_landmark(num_landmarks: int) -> int:
    return num_landmarks


SAMPLER = Sampler(
    name="fps",
    planned=False,
    summary="farthest point sampling of the features",
    select=_select,
    looks_at_features=True,
    nodes=_nodes,
    stand_alone=all_stand_alone,
    select_masked=_select_masked,
    guided=GuidedSelection(_select_guided, _guided_nodes, guarantees_prefix=False),
    nested=True,
    passes=_once_per_landmark,
    launches=_once_per_landmark,
)
