"""Focal attention: near patches exactly, far cells by one sampled patch each, and a few hot keys for everyone.

Training-free like FNA, and strong where FNA is weak: where attention is local. `fna.focal_keys` has the static lists of keys.
`focal_attention` checks its arguments and calls the operator `fna::focal_attention`; `focal_attention_reference` is the
arithmetic, and the twin that every other form is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidShapeError
from fna.focal_keys import FAR_BELOW, Levels, focal_keys
from fna.special_tokens import MASKED_SCORE

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def focal_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    *,
    patches: tuple[int, int],
    prefix_tokens: int,
    tile: int = 8,
    levels: Levels = ((1, 0), (2, 2)),
    hot: int = 16,
    seed: int = 0,
    scale: float | None = None,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], bool or int32
) -> Tensor:  # [B, H, N, D]
    """Approximate softmax self-attention over a grid of patches.

    Args:
        query: queries, fp16, bf16, fp32 or fp64; the result has this type. Sums and softmax are fp32 (fp64 for fp64).
        key: keys, of the query's type and shape.
        value: values, likewise.
        patches: rows and columns of patches; N is their product plus `prefix_tokens`.
        prefix_tokens: class and register tokens at the front. Exact as keys of all tokens; exact as queries.
        tile: side of the tiles that patch queries go in.
        levels: (size, gap), finest first: `((1, 0), (2, 2), (4, 6))` samples cells of 2 x 2 patches from 2 patches away from the tile
            on, cells of 4 x 4 from 6 on. `((1, 0),)` is exact attention.
        hot: patches whose keys score highest against the mean patch query, per image and head: exact keys of all tiles.
        seed: of the draw of the far cells' patches.
        scale: factor on the scores; `D ** -0.5` if None.
        key_mask: tokens (non-zero) that nobody attends to. A far cell whose drawn patch is masked is left out.

    Raises:
        InvalidShapeError, InvalidDtypeError, InvalidArgumentError: naming what was given.
    """
    _check_inputs(query, key, value)
    tokens = query.shape[2]
    if prefix_tokens < 0 or prefix_tokens + patches[0] * patches[1] != tokens:
        raise InvalidArgumentError(
            f"{prefix_tokens} prefix tokens and {patches[0]} x {patches[1]} patches were given, but there are {tokens} tokens"
        )
    check_hot(hot, tokens - prefix_tokens)
    lists = focal_keys(tuple(patches), prefix_tokens, tile, tuple(tuple(level) for level in levels), seed)
    mask = None
    if key_mask is not None:
        if key_mask.dim() != 2 or key_mask.shape[0] not in (1, query.shape[0]) or key_mask.shape[1] != tokens:
            raise InvalidShapeError(
                f"key_mask has shape {list(key_mask.shape)}, but [{query.shape[0]}, {tokens}] or [1, {tokens}] is needed"
            )
        mask = key_mask.ne(0).to(torch.int32)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.fna.focal_attention(
        query, key, value, *lists.tensors(query.device), mask, prefix_tokens, int(hot), factor
    )


def check_hot(hot: int, num_patches: int) -> None:
    """Refuse a number of hot keys that cannot be chosen.

    Raises:
        InvalidArgumentError: naming both numbers.
    """
    if not 0 <= hot <= num_patches:
        raise InvalidArgumentError(f"hot is {hot}, but there are {num_patches} patches; use 0 to {num_patches}")


def focal_attention_reference(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    tile_queries: Tensor,  # [T, Q], int32
    tile_keys: Tensor,  # [T, K], int32
    tile_bias: Tensor,  # [T, K], fp32
    places: Tensor,  # [N - prefix], int32
    key_mask: Tensor | None,  # [B, N] or [1, N], int32
    prefix_tokens: int,
    hot: int,
    scale: float,
) -> Tensor:  # [B, H, N, D]
    """Compute focal attention from checked arguments and the lists of `focal_keys`; nothing else."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, keys, values = query.to(dtype) * scale, key.to(dtype), value.to(dtype)
    taken_off = keys.new_zeros(keys.shape[:3])  # [B, H, N], off the scores of masked keys
    if key_mask is not None:
        taken_off = taken_off + (key_mask.to(dtype) * MASKED_SCORE)[:, None]

    tiles, lists = tile_queries.long(), tile_keys.long()
    hot_tokens = find_hot_keys(queries, keys, taken_off, prefix_tokens, hot)  # [B, H, hot]
    at_hot = hot_tokens[..., None].expand(-1, -1, -1, keys.shape[3])
    # A hot key is a key of its own, so no tile lists it a second time.
    once = taken_off.scatter(2, hot_tokens, -FAR_BELOW)

    query_tiles = queries[:, :, tiles]  # [B, H, T, Q, D]
    listed_scores = query_tiles @ keys[:, :, lists].mT + (tile_bias.to(dtype) - once[:, :, lists])[:, :, :, None]
    hot_scores = query_tiles @ keys.gather(2, at_hot).mT[:, :, None] - taken_off.gather(2, hot_tokens)[:, :, None, None]
    weights = torch.softmax(torch.cat([listed_scores, hot_scores], dim=-1), dim=-1)  # [B, H, T, Q, K + hot]
    listed, extra = weights.split([lists.shape[1], hot], dim=-1)
    patches = listed @ values[:, :, lists] + extra @ values.gather(2, at_hot)[:, :, None]

    whole = queries[:, :, :prefix_tokens] @ keys.mT - taken_off[:, :, None]
    out = torch.cat([torch.softmax(whole, dim=-1) @ values, patches.flatten(2, 3)[:, :, places.long()]], dim=2)
    return out.to(query.dtype)


def find_hot_keys(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    taken_off: Tensor,  # [B, H, N], off each key's score
    prefix_tokens: int,
    hot: int,
) -> Tensor:  # [B, H, hot], int64
    """The patch tokens whose keys score highest against the mean patch query, per image and head."""
    mean_query = query[:, :, prefix_tokens:].mean(dim=2, keepdim=True)
    scores = (key[:, :, prefix_tokens:] @ mean_query.mT).squeeze(-1) - taken_off[:, :, prefix_tokens:]
    return scores.topk(hot, dim=-1).indices + prefix_tokens


@torch.library.custom_op("fna::focal_attention", mutates_args=())
def _focal_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile_queries: Tensor,
    tile_keys: Tensor,
    tile_bias: Tensor,
    places: Tensor,
    key_mask: Tensor | None,
    prefix_tokens: int,
    hot: int,
    scale: float,
) -> Tensor:
    return focal_attention_reference(
        query, key, value, tile_queries, tile_keys, tile_bias, places, key_mask, prefix_tokens, hot, scale
    )


@_focal_op.register_fake
def _focal_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile_queries: Tensor,
    tile_keys: Tensor,
    tile_bias: Tensor,
    places: Tensor,
    key_mask: Tensor | None,
    prefix_tokens: int,
    hot: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.prefix_tokens, ctx.hot, ctx.scale = inputs
    ctx.has_mask = tensors[-1] is not None
    ctx.save_for_backward(*(tensor for tensor in tensors if tensor is not None))


def _focal_backward(ctx, grad):  # type: ignore[no-untyped-def]
    query, key, value, tile_queries, tile_keys, tile_bias, places, *rest = ctx.saved_tensors
    mask = rest[0] if ctx.has_mask else None
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(True) for tensor in (query, key, value)]
        query, key, value = leaves
        out = focal_attention_reference(
            query, key, value, tile_queries, tile_keys, tile_bias, places, mask, ctx.prefix_tokens, ctx.hot, ctx.scale
        )
        return (*torch.autograd.grad(out, leaves, grad), *[None] * 8)


_focal_op.register_autograd(_focal_backward, setup_context=_save_for_backward)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() != 4:
        raise InvalidShapeError(f"query has shape {list(query.shape)}, but [B, H, N, D] (4 dimensions) is needed")
    if query.dtype not in FLOAT_DTYPES:
        raise InvalidDtypeError(f"query is {query.dtype}, but a floating-point type is needed")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise InvalidShapeError(
                f"{name} has shape {list(tensor.shape)}, but the query's, {list(query.shape)}, is needed"
            )
        if tensor.dtype != query.dtype:
            raise InvalidDtypeError(f"{name} is {tensor.dtype}, but the query's type, {query.dtype}, is needed")
