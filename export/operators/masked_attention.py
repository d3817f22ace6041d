"""MaskedAttention: `fna.special_tokens.masked_attention` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import MASKED_DOMAIN_VERSION, FormalAttribute, FormalParameter, Operator
from fna.special_tokens import MASKED_SCORE


def _body(
    op: Builder,
    query: str,  # [B, H, N, D] T
    key: str,  # [B, H, N, D] T
    value: str,  # [B, H, N, D] T
    key_mask: str,  # [B, N] or [1, N] int32
    *,
    sink: int,
) -> str:  # [B, H, N, D] T
    """Write exact attention with masked keys, in the type of its inputs, as PyTorch's exporter writes exact attention."""
    root = op.as_type_of(op.Sqrt(op.attribute("scale")), query)
    mask = op.Cast(op.Cast(key_mask, to="BOOL"), to="FLOAT")
    drop = op.Unsqueeze(op.Mul(mask, MASKED_SCORE), axes=[1, 2])
    if sink:  # masked tokens, as queries, keep all their keys
        drop = op.Mul(drop, op.Unsqueeze(op.Sub(1.0, mask), axes=[1, 3]))
    key_columns = op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), root)
    scores = op.MatMul(op.Mul(query, root), key_columns, name="scores")
    weights = op.Softmax(op.Sub(scores, op.as_type_of(drop, query)), axis=-1, name="weights")
    return str(op.MatMul(weights, value))


MASKED_ATTENTION = Operator(
    "MaskedAttention",
    inputs=(
        FormalParameter("query"),
        FormalParameter("key"),
        FormalParameter("value"),
        FormalParameter("key_mask", "INT32"),
    ),
    outputs=(FormalParameter("out"),),
    attributes=(FormalAttribute("scale", "FLOAT"), FormalAttribute("sink", default=0)),
    body=_body,
    torch_operators={"masked_attention": None},
    attends=True,
    typed=True,
    since=MASKED_DOMAIN_VERSION,
)
