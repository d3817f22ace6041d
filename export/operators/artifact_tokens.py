"""ArtifactTokens: `fna.special_tokens.artifact_tokens_mask` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import is_patch


def _body(op: Builder, query: str, key: str, *, prefix_tokens: int) -> str:  # [B, H, N, D] T -> [B, N] int32
    """Write: the tokens that the class token looks at more than at itself, averaged over heads."""
    query_float, key_float = op.Cast(query, to="FLOAT"), op.Cast(key, to="FLOAT")
    class_query = op.Mul(op.Slice(query_float, [0], [1], axes=[2]), op.attribute("scale"))
    scores = op.MatMul(class_query, op.Transpose(key_float, perm=[0, 1, 3, 2]))
    mean = op.ReduceMean(op.Softmax(scores, axis=-1), axes=[1], keepdims=0)
    attention = op.Squeeze(mean, axes=[1])  # [B, N]
    more = op.Greater(attention, op.Slice(attention, [0], [1], axes=[1]))
    return str(op.Cast(op.And(more, is_patch(op, attention, prefix_tokens)), to="INT32"))


ARTIFACT_TOKENS = Operator(
    "ArtifactTokens",
    inputs=(FormalParameter("query"), FormalParameter("key")),
    outputs=(FormalParameter("key_mask", "INT32"),),
    attributes=(FormalAttribute("scale", "FLOAT"), FormalAttribute("prefix_tokens")),
    body=_body,
    torch_operators={"artifact_tokens": None},
)
