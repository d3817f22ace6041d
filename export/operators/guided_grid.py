"""GuidedGrid: `fna.samplers.common.roles.guided_grid` in ONNX."""

from __future__ import annotations

from fna.export.operators.builder import Builder
from fna.export.operators.record import FormalAttribute, FormalParameter, Operator
from fna.export.operators.shared_expressions import is_away, largest_share, own_tokens, token_positions
from fna.samplers.common.roles import most_guaranteed


def _body(
    op: Builder,
    role: str,  # [B, N] int32
    *,
    num_landmarks: int,
    prefix_tokens: int,
    middles: int,
) -> tuple[str, str]:  # [B, S] int32 and fp32
    """Write: guaranteed tokens, then free ones evenly spaced, and the bias.

    The p-th token outside a sorted set t is `p + #{j : t_j - j <= p}`; here t are the tokens that are not free.
    """
    most = most_guaranteed(num_landmarks, prefix_tokens, by_norm=bool(middles))
    positions = token_positions(op, role)
    own = own_tokens(op, role, positions, most, num_landmarks)
    away = op.Cast(is_away(op, role), to="FLOAT")
    room = op.Min(op.Add([most], largest_share(op, positions.num_tokens)), positions.num_tokens)
    largest, _ = op.TopK(op.Mul(away, positions.from_end), room, axis=1, largest=1, sorted=1, outputs=2)
    nowhere = op.Mul(positions.num_tokens_float, 2.0)
    taken = op.Where(op.Greater(largest, 0.5), op.Sub(positions.num_tokens_float, largest), nowhere)
    shift = op.Sub(taken, op.Cast(op.Range(0, op.Squeeze(room, axes=[0]), 1), to="FLOAT"))

    free = op.Sub(positions.num_tokens_float, op.ReduceSum(away, axes=[1], keepdims=1))
    spaced = op.Max(op.Sub(float(num_landmarks), own.total), 1.0)
    place = op.Cast(_spread(op, own.rank, free, spaced, bool(middles)), to="FLOAT")
    beyond = op.Greater(op.Unsqueeze(shift, axes=[1]), op.Unsqueeze(place, axes=[2]))
    skipped = op.ReduceSum(op.Cast(op.Not(beyond), to="FLOAT"), axes=[2], keepdims=0)
    landmarks = op.Cast(op.Where(own.is_own, own.token, op.Add(place, skipped)), to="INT32")
    log_weight = op.Log(op.Div(op.Sub(positions.num_tokens_float, own.total), spaced))
    return landmarks, op.Where(own.is_own, 0.0, log_weight)


def _spread(op: Builder, rank_float: str, free_float: str, spaced_float: str, middles: bool) -> str:
    """Write `middles_of_stretches` or `evenly_spaced` of `fna.samplers.common.spacing`, in whole numbers."""
    rank, free, spaced = (op.Cast(value, to="INT64") for value in (rank_float, free_float, spaced_float))
    twice = op.Mul(2, rank)
    if middles:
        return str(op.Div(op.Mul(op.Add(twice, 1), free), op.Mul(2, spaced)))
    gaps = op.Max(op.Sub(spaced, 1), 1)
    even = op.Div(op.Add(op.Mul(twice, op.Sub(free, 1)), gaps), op.Mul(2, gaps))
    return str(op.Where(op.Greater(spaced_float, 1.0), even, op.Div(free, 2)))


GUIDED_GRID = Operator(
    "GuidedGrid",
    inputs=(FormalParameter("role", "INT32"),),
    outputs=(FormalParameter("landmarks", "INT32"), FormalParameter("landmark_bias", "FLOAT")),
    attributes=(
        FormalAttribute("num_landmarks"),
        FormalAttribute("prefix_tokens"),
        FormalAttribute("middles", default=0),
    ),
    body=_body,
    torch_operators={"guided_grid": None},
)
