"""GuidedFeatures: `fna.samplers.common.roles.guided_features` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalParameter, Operator
from fna.export.operators.shared_expressions import first_free, is_away


def _body(op: Builder, features: str, role: str) -> str:  # [B, N, C] T, [B, N] int32 -> [B, N, C] T
    """Write features in which every token that is not free equals the first free one."""
    size = op.Shape(features)
    row_shape = op.Concat(op.Gather(size, [0]), [1], op.Gather(size, [2]), axis=0)
    row = op.Expand(op.Unsqueeze(first_free(op, role), axes=[2]), row_shape)
    stand_in = op.GatherElements(features, row, axis=1)
    return str(op.Where(op.Unsqueeze(is_away(op, role), axes=[2]), stand_in, features))


GUIDED_FEATURES = Operator(
    "GuidedFeatures",
    inputs=(FormalParameter("features"), FormalParameter("role", "INT32")),
    outputs=(FormalParameter("guided"),),
    body=_body,
    torch_operators={"guided_features": None},
)
