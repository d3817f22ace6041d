"""GuidedPicks: `fna.samplers.common.roles.guided_picks` in ONNX."""

from __future__ import annotations

from typing import Any

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import first_free, own_tokens, token_positions
from fna.samplers.common.roles import most_guaranteed


def _body(op: Builder, role: str, picks: str, *, num_landmarks: int) -> str:  # [B, N], [B, S] int32 -> [B, S] int32
    """Write: guaranteed tokens, then as many picks as there is room for.

    Token 0, which sampling starts at, is the first free one or stands for it.
    """
    most = most_guaranteed(num_landmarks, 0, by_norm=False)
    own = own_tokens(op, role, token_positions(op, role), most, num_landmarks)
    picks_float = op.Cast(picks, to="FLOAT")
    first = op.Cast(first_free(op, role), to="FLOAT")
    moved = op.Where(op.Less(picks_float, 0.5), first, picks_float)
    rank = op.Expand(op.Cast(own.rank, to="INT64"), op.Shape(picks))
    chosen = op.Where(own.is_own, own.token, op.GatherElements(moved, rank, axis=1))
    return str(op.Cast(chosen, to="INT32"))


def _from_torch(write, role, picks) -> Any:  # type: ignore[no-untyped-def]
    return write(role, picks, num_landmarks=int(picks.shape[1]))


GUIDED_PICKS = Operator(
    "GuidedPicks",
    inputs=(FormalParameter("role", "INT32"), FormalParameter("picks", "INT32")),
    outputs=(FormalParameter("landmarks", "INT32"),),
    attributes=(FormalAttribute("num_landmarks"),),
    body=_body,
    torch_operators={"guided_picks": _from_torch},
)
