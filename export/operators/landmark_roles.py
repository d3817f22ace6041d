"""LandmarkRoles: `fna.samplers.common.roles.landmark_roles` in ONNX."""

from __future__ import annotations

from typing import Any

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import TokenPositions, largest_share, token_positions
from fna.samplers.common.roles import include_room


def _body(
    op: Builder,
    include: str,  # [B, N] or [1, N] int32
    exclude: str,  # [B, N] or [1, N] int32
    *,
    num_landmarks: int,
    prefix_tokens: int,
) -> str:  # [B, N] int32
    """Write 1 for tokens that are guaranteed, -1 for those excluded, 0 for free ones."""
    prefix = min(prefix_tokens, num_landmarks)
    include_flag, exclude_flag = op.Cast(include, to="BOOL"), op.Cast(exclude, to="BOOL")
    positions = token_positions(op, include)
    wanted = _first_of(op, include_flag, [max(1, include_room(num_landmarks, prefix))], positions)
    barred = _first_of(op, exclude_flag, largest_share(op, positions.num_tokens), positions)
    barred = op.And(barred, op.Not(wanted))
    own_prefix = op.And(op.Not(barred), op.Less(positions.position, prefix - 0.5))
    return str(op.Sub(op.Cast(op.Or(wanted, own_prefix), to="INT32"), op.Cast(barred, to="INT32")))


def _first_of(op: Builder, flag: str, room: Any, positions: TokenPositions) -> str:
    """Write the first `room` tokens of a mask, of each item."""
    value = op.Mul(op.Cast(flag, to="FLOAT"), positions.from_end)
    largest, _ = op.TopK(value, room, axis=1, largest=1, sorted=1, outputs=2)
    return str(op.And(flag, op.GreaterOrEqual(value, op.ReduceMin(largest, axes=[1], keepdims=1))))


def _from_torch(write, include, exclude, num_landmarks, prefix_tokens) -> Any:  # type: ignore[no-untyped-def]
    from onnxscript import opset18

    include = opset18.Sub(exclude, exclude) if include is None else include
    exclude = opset18.Sub(include, include) if exclude is None else exclude
    return write(include, exclude, num_landmarks=num_landmarks, prefix_tokens=prefix_tokens)


LANDMARK_ROLES = Operator(
    "LandmarkRoles",
    inputs=(FormalParameter("include", "INT32"), FormalParameter("exclude", "INT32")),
    outputs=(FormalParameter("role", "INT32"),),
    attributes=(FormalAttribute("num_landmarks"), FormalAttribute("prefix_tokens")),
    body=_body,
    torch_operators={"landmark_roles": _from_torch},
)
