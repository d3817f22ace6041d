"""ONNX Attention, which opset 23 brought, as this project writes it: any lengths, softmax in fp32."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from fna.export.operators.builder import Builder

ATTENTION_OPSET = 23
"""The first with Attention; 24 adds to it nothing that is used here."""


def attention(
    op: Builder,
    query: str,  # [B, H, M, D] T
    key: str,  # [B, H, N, D] T
    value: str,  # [B, H, N, D] T
    bias: str | None,  # T, added to the scores; broadcasts to [B, H, M, N]
    *,
    scale: Any,
    name: str,
) -> str:  # [B, H, M, D] T
    """Write `softmax(scale * query @ key^T + bias) @ value` as one node; onnxruntime takes a bias only with a row for each query."""
    inputs = [query, key, value]
    if bias is not None:
        rows = op.Concat([1, 1], op.Gather(op.Shape(query), [2]), [1], axis=0)
        inputs.append(op.Expand(bias, rows))
    return str(op.Attention(*inputs, scale=scale, softmax_precision=int(TensorProto.FLOAT), name=name))
