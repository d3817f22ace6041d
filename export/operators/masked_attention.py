"""MaskedAttention: `fna.special_tokens.masked_attention` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.onnx_attention import attention
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
    drop = _drop(op, key_mask, sink)
    root = op.as_type_of(op.Sqrt(op.attribute("scale")), query)
    key_columns = op.Mul(op.Transpose(key, perm=[0, 1, 3, 2]), root)
    scores = op.MatMul(op.Mul(query, root), key_columns, name="scores")
    weights = op.Softmax(op.Sub(scores, op.as_type_of(drop, query)), axis=-1, name="weights")
    return str(op.MatMul(weights, value))


def _fused_body(op: Builder, query: str, key: str, value: str, key_mask: str, *, sink: int) -> str:
    """Write the same as one ONNX Attention; shapes and types as in `_body`."""
    bias = op.as_type_of(op.Neg(_drop(op, key_mask, sink)), query)
    return attention(op, query, key, value, bias, scale=op.reference("scale"), name="attention")


def _drop(op: Builder, key_mask: str, sink: int) -> str:
    """Write what masking takes off the scores, fp32 `[B, 1, 1, N]`, or `[B, 1, N, N]` with `sink`."""
    mask = op.Cast(op.Cast(key_mask, to="BOOL"), to="FLOAT")
    drop = op.Unsqueeze(op.Mul(mask, MASKED_SCORE), axes=[1, 2])
    if sink:  # masked tokens, as queries, keep all their keys
        drop = op.Mul(drop, op.Unsqueeze(op.Sub(1.0, mask), axes=[1, 3]))
    return str(drop)


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
    fused_body=_fused_body,
    torch_operators={"masked_attention": None},
    attends=True,
    typed=True,
    since=MASKED_DOMAIN_VERSION,
)
