"""How many tokens a landmark stands for: its weight, whose logarithm is added to its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.samplers.common.record import Expressions
from fna.samplers.common.selection import check_landmark_count


def landmark_bias(
    num_tokens: int,
    num_landmarks: int,
    *,
    method: str = DEFAULT_SAMPLER,
    prefix_tokens: int = 1,
    device: torch.device | str | None = None,
) -> Tensor:  # [1, S], fp32
    """Return `log(weight)` of each landmark, where a landmark's weight is the number of tokens that it stands for.

    Prefix tokens, and the tokens that `norm-grid` took for their norm, stand for themselves (bias 0). The evenly spaced rest
    share the other tokens equally. Under `fps` and `random` every weight is 1.

    Args:
        num_tokens: N.
        num_landmarks: S, from 1 to N.
        method: the sampler whose landmarks these are, in the order in which `select_landmarks` returns them.
        prefix_tokens: class and register tokens at the front.
        device: where the result is made.

    Returns:
        fp32 `[1, S]`, the same for every image.

    Raises:
        InvalidArgumentError: for a sampler that there is not.
        InvalidLandmarksError: for a number of landmarks out of range.
    """
    sampler = find_sampler(method)
    check_landmark_count(num_landmarks, num_tokens)
    own = sampler.stand_alone(num_landmarks, prefix_tokens)
    if own == num_landmarks:
        return torch.zeros(1, num_landmarks, device=device)
    weight = (num_tokens - own) / (num_landmarks - own)
    index = torch.arange(num_landmarks, device=device)[None]
    return torch.log(torch.where(index < own, 1.0, weight))


def landmark_bias_nodes(op: Expressions, num_tokens: str, num_landmarks: int, own: int) -> str:  # fp32 [1, S]
    """Write `landmark_bias` for a number of tokens (int64, `[1]`) that is only known at run time; `own` stand alone."""
    spaced = num_landmarks - own
    weight = op.Div(op.Sub(op.Cast(num_tokens, to="FLOAT"), [[float(own)]]), [[float(spaced)]])
    bias: str = op.Mul(op.Log(weight), [[0.0] * own + [1.0] * spaced])
    return bias
