"""MassiveTokens: `fna.special_tokens.massive_tokens_mask` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import is_patch, largest_share
from fna.special_tokens import MINIMAL_GAP

_FAR_END = 2**63 - 1
_SMALLEST_NORMAL = 1.17549435e-38


def _body(op: Builder, hidden: str, *, prefix_tokens: int) -> str:  # [B, N, C] T -> [B, N] int32
    """Write: the tokens above the widest gap between the largest norms, if that gap is wide enough."""
    squared = op.ReduceSumSquare(op.Cast(hidden, to="FLOAT"), axes=[2], keepdims=0)
    log_norms = op.Mul(op.Log(op.Max(squared, _SMALLEST_NORMAL)), 0.5)  # [B, N]
    most = largest_share(op, op.Gather(op.Shape(hidden), [1]))
    top, _ = op.TopK(log_norms, op.Add(most, [1]), axis=1, largest=1, sorted=1, outputs=2)
    upper, lower = op.Slice(top, [0], [-1], axes=[1]), op.Slice(top, [1], [_FAR_END], axes=[1])
    gaps = op.Sub(upper, lower)
    widest = op.ArgMax(gaps, axis=1, keepdims=1, select_last_index=0)
    above = op.GreaterOrEqual(log_norms, op.GatherElements(upper, widest, axis=1))
    wide_enough = op.GreaterOrEqual(op.ReduceMax(gaps, axes=[1], keepdims=1), MINIMAL_GAP)
    return str(op.Cast(op.And(op.And(above, wide_enough), is_patch(op, log_norms, prefix_tokens)), to="INT32"))


MASSIVE_TOKENS = Operator(
    "MassiveTokens",
    inputs=(FormalParameter("hidden"),),
    outputs=(FormalParameter("key_mask", "INT32"),),
    attributes=(FormalAttribute("prefix_tokens"),),
    body=_body,
    torch_operators={"massive_tokens": None},
)
