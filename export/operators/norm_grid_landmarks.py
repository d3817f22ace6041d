"""NormGridLandmarks: the sampler `norm-grid` in ONNX."""

from __future__ import annotations

import numpy as np

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import squared_norms
from fna.samplers.common.roles import norm_grid_count

_FAR_END = 2**63 - 1


def _body(op: Builder, features: str, *, num_landmarks: int, prefix_tokens: int) -> str:  # [B, N, C] T -> [B, S] int32
    """Write: prefix tokens, the patches of largest norm, ascending, then the middles of equal stretches of the others.

    The p-th token outside a sorted set t is `p + #{j : t_j - j <= p}`.
    """
    prefix = min(prefix_tokens, num_landmarks)
    by_norm = norm_grid_count(num_landmarks, prefix)
    spaced = num_landmarks - prefix - by_norm
    size = op.Shape(features)
    parts = []
    if prefix:
        front = np.arange(prefix, dtype=np.int64)[None]
        parts.append(op.Expand(front, op.Concat(op.Gather(size, [0]), [1], axis=0)))
    if by_norm:
        patch_norms = op.Slice(squared_norms(op, features), [prefix], [_FAR_END], axes=[1])
        _, places = op.TopK(patch_norms, [by_norm], axis=1, largest=1, sorted=1, outputs=2)
        taken, _ = op.TopK(op.Cast(places, to="FLOAT"), [by_norm], axis=1, largest=0, sorted=1, outputs=2)
        parts.append(op.Add(op.Cast(taken, to="INT64"), [prefix]))
    if spaced:
        others = op.Sub(op.Gather(size, [1]), [prefix + by_norm])
        middles = op.Div(op.Mul([2 * slot + 1 for slot in range(spaced)], others), [2 * spaced])
        position = op.Cast(middles, to="FLOAT")
        shift = op.Sub(taken, [float(rank) for rank in range(by_norm)])
        beyond = op.Greater(op.Unsqueeze(shift, axes=[1]), op.Unsqueeze(position, axes=[0, 2]))
        skipped = op.ReduceSum(op.Cast(op.Not(beyond), to="FLOAT"), axes=[2], keepdims=0)
        parts.append(op.Add(op.Cast(op.Add(skipped, position), to="INT64"), [prefix]))
    return str(op.Cast(op.Concat(*parts, axis=1), to="INT32"))


NORM_GRID_LANDMARKS = Operator(
    "NormGridLandmarks",
    inputs=(FormalParameter("features"),),
    outputs=(FormalParameter("landmarks", "INT32"),),
    attributes=(FormalAttribute("num_landmarks"), FormalAttribute("prefix_tokens")),
    body=_body,
    torch_operators={"norm_grid_landmarks": None},
)
