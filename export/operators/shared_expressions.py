"""What the bodies of several operators say about tokens. Comparisons are of fp32, which every builder takes."""

from __future__ import annotations

from typing import NamedTuple

from fna.export.operators.builder import Builder
from fna.special_tokens import LARGEST_SHARE


class TokenPositions(NamedTuple):
    """Where the tokens are.

    Attributes:
        num_tokens: N, int64 `[1]`.
        num_tokens_float: the same, fp32.
        position: 0 to N - 1, fp32 `[N]`.
        from_end: N less the position: the first of some tokens have the largest values.
    """

    num_tokens: str
    num_tokens_float: str
    position: str
    from_end: str


class OwnTokens(NamedTuple):
    """The guaranteed tokens in ascending order, for each of the S landmarks.

    Attributes:
        token: fp32 `[B, S]`, the guaranteed token that a landmark is, where it is one.
        is_own: bool `[B, S]`, whether it is one.
        total: how many there are, fp32 `[B, 1]`.
        rank: of a landmark that is not, among those, fp32 `[B, S]`.
    """

    token: str
    is_own: str
    total: str
    rank: str


def token_positions(op: Builder, like: str) -> TokenPositions:
    """Write the positions of the tokens of a tensor `[B, N]`."""
    num_tokens = op.Gather(op.Shape(like), [1])
    num_tokens_float = op.Cast(num_tokens, to="FLOAT")
    position = _position(op, num_tokens)
    return TokenPositions(num_tokens, num_tokens_float, position, op.Sub(num_tokens_float, position))


def is_patch(op: Builder, like: str, prefix_tokens: int) -> str:
    """Write which tokens of a tensor `[B, N]` are patches, bool `[N]`."""
    position = _position(op, op.Gather(op.Shape(like), [1]))
    return str(op.Greater(position, prefix_tokens - 0.5))


def largest_share(op: Builder, num_tokens: str) -> str:
    """Write `fna.samplers.common.roles.exclude_room`: how many tokens can be massive, or excluded; int64 `[1]`."""
    return str(op.Max(op.Div(num_tokens, [LARGEST_SHARE]), [1]))


def squared_norms(op: Builder, features: str) -> str:
    """Write the squared norms `[B, N]`, fp32, of features `[B, N, C]`."""
    return str(op.ReduceSumSquare(op.Cast(features, to="FLOAT"), axes=[2], keepdims=0))


def is_away(op: Builder, role: str) -> str:
    """Write which tokens are not free: guaranteed or excluded."""
    return str(op.Greater(op.Abs(op.Cast(role, to="FLOAT")), 0.5))


def first_free(op: Builder, role: str) -> str:
    """Write the first free token of each item, int64 `[B, 1]`."""
    free = op.Cast(op.Not(is_away(op, role)), to="FLOAT")
    return str(op.ArgMax(free, axis=1, keepdims=1, select_last_index=0))


def own_tokens(op: Builder, role: str, positions: TokenPositions, most: int, num_landmarks: int) -> OwnTokens:
    """Write which landmarks are guaranteed tokens, of which there are at most `most`."""
    own = op.Cast(op.Greater(op.Cast(role, to="FLOAT"), 0.5), to="FLOAT")
    count = op.ReduceSum(own, axes=[1], keepdims=1)
    largest, _ = op.TopK(op.Mul(own, positions.from_end), [most], axis=1, largest=1, sorted=1, outputs=2)
    places = op.Sub(positions.num_tokens_float, largest)
    token = op.Gather(places, [min(slot, most - 1) for slot in range(num_landmarks)], axis=1)
    slot = [[float(slot) for slot in range(num_landmarks)]]
    return OwnTokens(token, op.Greater(count, slot), count, op.Max(op.Sub(slot, count), 0.0))


def _position(op: Builder, num_tokens: str) -> str:
    return str(op.Cast(op.Range(0, op.Squeeze(num_tokens, axes=[0]), 1), to="FLOAT"))
