"""LargestNormRoles: `fna.samplers.common.roles.largest_norm_roles` in ONNX."""

from __future__ import annotations

import numpy as np

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import is_away, squared_norms
from fna.samplers.common.roles import norm_grid_count


def _body(
    op: Builder,
    features: str,  # [B, N, C] T
    role: str,  # [B, N] or [1, N] int32
    *,
    num_landmarks: int,
    prefix_tokens: int,
) -> str:  # [B, N] int32
    """Write the roles with the free tokens of largest norm guaranteed too."""
    count = norm_grid_count(num_landmarks, min(prefix_tokens, num_landmarks))
    norms = squared_norms(op, features)
    roles = op.Expand(role, op.Shape(norms))
    if not count:
        return str(roles)
    free_norms = op.Where(is_away(op, roles), -1.0, norms)
    _, places = op.TopK(free_norms, [count], axis=1, largest=1, sorted=1, outputs=2)
    ones = op.Expand(np.ones((1, 1), np.int32), op.Shape(places))
    return str(op.ScatterElements(roles, places, ones, axis=1))


LARGEST_NORM_ROLES = Operator(
    "LargestNormRoles",
    inputs=(FormalParameter("features"), FormalParameter("role", "INT32")),
    outputs=(FormalParameter("roles", "INT32"),),
    attributes=(FormalAttribute("num_landmarks"), FormalAttribute("prefix_tokens")),
    body=_body,
    torch_operators={"largest_norm_roles": None},
)
