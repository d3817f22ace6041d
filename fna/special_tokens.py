"""Which tokens of a Vision Transformer are not ordinary patches: prefix, massive and artifact tokens; and masking them.

Massive tokens have an exceptional norm and act as attention sinks; artifact tokens are patches that the class token looks at
more than at itself (arXiv 2507.16018). Both are found per image, by functions of tensors that standard operators can say.
Masks are int32 `[B, N]`, 1 where a token is masked, so that they reach TensorRT as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidShapeError

_PREFIX_PARAMETERS = ("cls_token", "class_embedding", "class_token", "distillation_token", "dist_token")
_PREFIX_ROWS = ("register_tokens", "reg_token", "storage_tokens")

MINIMAL_GAP = math.log(3)
"""Smallest gap in the sorted log norms that separates massive tokens: the smallest of them has three times the norm of the next.

Between what was measured on DINOv2-S, which has none (the class token alone stands out, by 2.02 at most; docs/tokens.md), and what
is published of models that have them (about 10: Darcet et al., "Vision transformers need registers", arXiv 2309.16588).
"""

LARGEST_SHARE = 8
"""At most one token in so many is massive: the gap is looked for among that many largest norms, never at the small end."""

MASKED_SCORE = 16384.0
"""What masking takes off a score. A weight is 0 in fp32 from 104 below the largest on, so an ordinary key hides every masked one;
a row that has masked keys only attends to them as if they were not masked. A power of two that fp16 and bf16 can hold."""


def detect_prefix_tokens(vision_model: nn.Module) -> int:
    """Count the class, distillation and register tokens that a model puts before its patch tokens.

    Found by the parameters that hold them: one token each for class and distillation tokens, one per row for registers.

    Args:
        vision_model: the model or the tower whose patch tokens are meant, not a model with further towers.

    Returns:
        0 for models without such tokens (SigLIP), 1 for ViT, CLIP and DINOv2, 2 for distilled DeiT, 5 for DINOv2 with registers
        and DINOv3.
    """
    count = 0
    for name, parameter in vision_model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in _PREFIX_PARAMETERS:
            count += 1
        elif leaf in _PREFIX_ROWS:
            count += parameter.shape[-2]
    return count


def find_massive_tokens(
    hidden: Tensor,  # [B, N, C]
    *,
    minimal_gap: float = MINIMAL_GAP,
) -> tuple[Tensor, Tensor]:  # bool [B, N], fp32 [B]
    """Find the tokens above the largest gap in the sorted log norms.

    Args:
        hidden: the residual stream, such as a block's output; any floating-point type.
        minimal_gap: gaps smaller than this (a difference of natural logarithms) separate nothing.

    Returns:
        Which tokens are massive, prefix tokens among them, and the largest gap of each item. Fewer than two tokens: none, 0.

    Raises:
        InvalidShapeError, InvalidDtypeError: for what is not `[B, N, C]` floating-point.
    """
    if hidden.dim() != 3:
        raise InvalidShapeError(
            f"hidden states have shape {list(hidden.shape)}, but [B, N, C] (3 dimensions) is needed"
        )
    if not hidden.is_floating_point():
        raise InvalidDtypeError(f"hidden states are {hidden.dtype}, but a floating-point type is needed")
    log_norms = _log_squared_norms(hidden) / 2  # [B, N]
    if hidden.shape[1] < 2:
        return torch.zeros_like(log_norms, dtype=torch.bool), log_norms.new_zeros(hidden.shape[0])
    top = log_norms.topk(_most_massive(hidden.shape[1]) + 1, dim=1).values  # descending
    gap, place = (top[:, :-1] - top[:, 1:]).max(dim=1)
    threshold = top.gather(1, place[:, None])
    return (log_norms >= threshold) & (gap >= minimal_gap)[:, None], gap


def class_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    scale: float,
) -> Tensor:  # [B, N], fp32
    """How much the first token, the class token, attends to each token: the mean over the heads, in fp32."""
    scores = (query[:, :, :1].float() * scale) @ key.float().mT
    return torch.softmax(scores, dim=-1).mean(dim=1).squeeze(1)


def find_artifact_tokens(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    *,
    scale: float,
    prefix_tokens: int,
) -> Tensor:  # [B, N], bool
    """Find the patch tokens that draw more attention from the class token than the class token itself does.

    Args:
        query: queries of one attention block.
        key: its keys.
        scale: factor on the scores.
        prefix_tokens: class and register tokens at the front, which are never artifacts; at least 1.

    Raises:
        InvalidArgumentError: for a model without a class token.
    """
    if prefix_tokens < 1:
        raise InvalidArgumentError(
            "artifact tokens are those that the class token looks at, but this model has none; mask massive tokens instead"
        )
    attention = class_attention(query, key, scale)
    position = torch.arange(attention.shape[1], device=attention.device)
    return (attention > attention[:, :1]) & (position >= prefix_tokens)


@torch.library.custom_op("fna::massive_tokens", mutates_args=())
def massive_tokens_mask(hidden: Tensor, prefix_tokens: int) -> Tensor:
    """Mask `[B, N]` int32 of the massive patch tokens of `[B, N, C]`; prefix tokens are never masked."""
    massive, _ = find_massive_tokens(hidden)
    position = torch.arange(hidden.shape[1], device=hidden.device)
    return (massive & (position >= prefix_tokens)).int()


@massive_tokens_mask.register_fake
def _massive_tokens_fake(hidden: Tensor, prefix_tokens: int) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=torch.int32)


@torch.library.custom_op("fna::artifact_tokens", mutates_args=())
def artifact_tokens_mask(query: Tensor, key: Tensor, scale: float, prefix_tokens: int) -> Tensor:
    """Mask `[B, N]` int32 of the artifact tokens by query and key `[B, H, N, D]`."""
    return find_artifact_tokens(query, key, scale=scale, prefix_tokens=prefix_tokens).int()


@artifact_tokens_mask.register_fake
def _artifact_tokens_fake(query: Tensor, key: Tensor, scale: float, prefix_tokens: int) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.int32)


def listed_tokens_mask(
    tokens: tuple[int, ...],
    num_tokens: int,
    device: torch.device | str | None = None,
) -> Tensor:  # [1, N], int32
    """Mask of given token indices, the same for every image.

    Raises:
        InvalidArgumentError: for an index that is no token.
    """
    if isinstance(num_tokens, int) and tokens and max(tokens) >= num_tokens:  # open sizes are checked by nobody
        raise InvalidArgumentError(
            f"the plan lists token {max(tokens)}, but there are {num_tokens} tokens; it is for another resolution"
        )
    position = torch.arange(num_tokens, device=device)
    return (position[:, None] == torch.tensor(tokens, dtype=torch.int64, device=device)).any(dim=1).int()[None]


def masked_scores(
    key_mask: Tensor,  # [B, K] or [1, K], int32
    query_mask: Tensor,  # [B, Q] or [1, Q], int32
    sink: bool,
    dtype: torch.dtype,
) -> Tensor:  # [B, 1, Q or 1, K]
    """What masking takes off the scores of Q queries against K keys: `MASKED_SCORE` where the key is masked.

    With `sink`, queries that are masked themselves keep all their keys.
    """
    dropped = key_mask.to(dtype)[:, None, None, :] * MASKED_SCORE
    return dropped * (1 - query_mask.to(dtype))[:, None, :, None] if sink else dropped


@torch.library.custom_op("fna::masked_attention", mutates_args=())
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    scale: float,
    sink: bool,
) -> Tensor:
    """Exact self-attention of `[B, H, N, D]` with masked keys `[B, N]` or `[1, N]`; the twin of FNA with a `key_mask`."""
    offset = -masked_scores(key_mask, key_mask, sink, query.dtype)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=offset, scale=scale).contiguous()


@masked_attention.register_fake
def _masked_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, scale: float, sink: bool
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _most_massive(num_tokens: int) -> int:
    return max(1, num_tokens // LARGEST_SHARE)


def _log_squared_norms(hidden: Tensor) -> Tensor:
    squared = hidden.double() if hidden.dtype == torch.float64 else hidden.float()
    # Zero tokens get the smallest normal number, so that no logarithm is infinite.
    return squared.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny).log()
