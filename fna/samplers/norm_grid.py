"""Prefix tokens, the patch tokens of largest norm, then the rest evenly spaced among the others."""

from __future__ import annotations

import torch
from torch import Tensor

from fna.cuda_kernels import load_cuda_kernels
from fna.samplers.common.record import ONNX_DOMAIN, Expressions, GuidedSelection, LandmarkRequest, Sampler
from fna.samplers.common.roles import guided_grid_nodes, norm_grid_count
from fna.samplers.common.spacing import middles_of_stretches, space_free_tokens, with_prefix


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


@torch.library.custom_op("fna::norm_grid_landmarks", mutates_args=())
def _norm_grid_op(features: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    if features.is_cuda and load_cuda_kernels():
        return torch.ops.fna.norm_grid_landmarks(features, num_landmarks, prefix_tokens)
    return norm_grid_reference(features, num_landmarks, prefix_tokens)


@_norm_grid_op.register_fake
def _norm_grid_fake(features: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:
    return features.new_empty((features.shape[0], num_landmarks), dtype=torch.int32)


def _select(request: LandmarkRequest, features: Tensor | None) -> Tensor:  # [B, S]
    assert features is not None
    return torch.ops.fna.norm_grid_landmarks(features, request.num_landmarks, request.prefix_tokens)


def _select_masked(request: LandmarkRequest, features: Tensor, wanted: Tensor, barred: Tensor) -> Tensor:  # [B, S]
    wanted = with_prefix(request, wanted, barred)
    norms = features.float().square().sum(-1).masked_fill(wanted | barred, -1.0)
    count = norm_grid_count(request.num_landmarks, request.prefix_tokens)
    largest = norms.topk(min(count, norms.shape[1]), dim=1).indices
    wanted = (wanted.scatter(1, largest, True) & ~barred) | wanted
    return space_free_tokens(request, wanted, barred, middles_of_stretches)


def _select_guided(request: LandmarkRequest, features: Tensor | None, role: Tensor) -> tuple[Tensor, Tensor]:
    operators, sizes = torch.ops.fna, (request.num_landmarks, request.prefix_tokens)
    landmarks, bias = operators.guided_grid(operators.largest_norm_roles(features, role, *sizes), *sizes, True)
    return landmarks, bias


def _nodes(op: Expressions, features: str, request: LandmarkRequest) -> str:
    sizes = {"num_landmarks": request.num_landmarks, "prefix_tokens": request.prefix_tokens}
    landmarks: str = op.NormGridLandmarks(features, domain=ONNX_DOMAIN, **sizes)
    return landmarks


def _guided_nodes(op: Expressions, request: LandmarkRequest, features: str | None, role: str) -> tuple[str, str | None]:
    sizes = {"num_landmarks": request.num_landmarks, "prefix_tokens": request.prefix_tokens}
    role = op.LargestNormRoles(features, role, domain=ONNX_DOMAIN, **sizes)
    return guided_grid_nodes(op, request, role, middles=True)


def _stand_alone(num_landmarks: int, prefix_tokens: int) -> int:
    prefix = min(prefix_tokens, num_landmarks)
    return prefix + norm_grid_count(num_landmarks, prefix)


def _one_for_the_norms(num_landmarks: int) -> int:
    return 1


def _norms_and_choice(num_landmarks: int) -> int:
    return 2


SAMPLER = Sampler(
    name="norm-grid",
    summary="prefix tokens, the tenth of largest norm, then patch tokens evenly spaced among the others",
    select=_select,
    looks_at_features=True,
    nodes=_nodes,
    stand_alone=_stand_alone,
    select_masked=_select_masked,
    guided=GuidedSelection(_select_guided, _guided_nodes),
    compared=True,
    passes=_one_for_the_norms,
    launches=_norms_and_choice,
)
