"""FocalAttention: `fna.focal.focal_attention_reference` in ONNX; the lists of keys are constants of the file."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fna.export.operators.builder import Builder
from fna.export.operators.onnx_attention import attention
from fna.export.operators.record import (
    FOCAL_DOMAIN_VERSION,
    MASKED_FOCAL_DOMAIN_VERSION,
    FormalAttribute,
    FormalParameter,
    Operator,
)
from fna.focal_keys import FAR_BELOW
from fna.special_tokens import MASKED_SCORE

_SWAP_LAST = (0, 1, 3, 2)
_LOWEST_BIAS = -60000.0
"""Of the fused form, whose bias may be fp16; it hides a key as well as `FAR_BELOW`."""


def _body(
    op: Builder,
    query: str,  # [B, H, N, D] T
    key: str,  # [B, H, N, D] T
    value: str,  # [B, H, N, D] T
    tile_queries: str,  # [T, Q] int32
    tile_keys: str,  # [T, K] int32
    tile_bias: str,  # [T, K] fp32
    places: str,  # [N - prefix] int32
    key_mask: str | None,  # [B, N] or [1, N] int32
    *,
    prefix_tokens: int,
    hot: int,
    cuts: tuple[int, ...] = (),
) -> str:  # [B, H, N, D] T
    """Write focal attention: everything inside is fp32; one Gather each takes queries, keys and values to the tiles.

    With `cuts` it does so for the tiles of one piece after the other: what one operator writes the next finds in the caches.
    """
    query_float, key_float, value_float = (op.as_float(tensor) for tensor in (query, key, value))
    scaled = op.Mul(query_float, op.attribute("scale"))
    taken_off = None
    if key_mask is not None:
        flags = op.Cast(op.Cast(key_mask, to="BOOL"), to="FLOAT")
        taken_off = op.Unsqueeze(op.Mul(flags, MASKED_SCORE), axes=[1])  # [B, 1, N]

    bias = op.Unsqueeze(tile_bias, axes=[0, 1])  # [1, 1, T, K]
    if hot:
        # Hot keys follow the others, so that the lists name them like any key.
        size = op.Shape(query)
        tokens = _hot_tokens(op, scaled, key_float, taken_off, prefix_tokens, hot)  # [B, H, hot]
        rows = op.Expand(op.Unsqueeze(tokens, axes=[3]), op.Concat([1, 1, 1], op.Gather(size, [3]), axis=0))
        of_each_tile = op.Concat(op.Gather(op.Shape(tile_keys), [0]), [hot], axis=0)
        places_of_hot = op.Cast(op.Add(op.Gather(size, [2]), list(range(hot))), to="INT32")
        tile_keys = op.Concat(tile_keys, op.Expand(places_of_hot, of_each_tile), axis=1)
        bias = op.Unsqueeze(op.Concat(tile_bias, op.Expand(0.0, of_each_tile), axis=1), axes=[0, 1])
        key_bias = op.Concat(_once(op, key_float, tokens), op.Expand(0.0, op.Shape(tokens)), axis=2)
        if taken_off is not None:
            spread = op.Expand(taken_off, op.Gather(size, [0, 1, 2]))
            key_bias = op.Sub(key_bias, op.Concat(spread, op.GatherElements(spread, tokens, axis=2), axis=2))
        bias = op.Add(bias, op.Gather(key_bias, tile_keys, axis=2))
        all_keys, all_values = (
            op.Concat(tensor, op.GatherElements(tensor, rows, axis=2), axis=2) for tensor in (key_float, value_float)
        )  # [B, H, N + hot, D]
    else:
        all_keys, all_values = key_float, value_float
        if taken_off is not None:
            bias = op.Sub(bias, op.Gather(taken_off, tile_keys, axis=2))

    def attend(queries_of: str, keys_of: str, bias: str) -> str:  # [B, H, T, Q, D]
        query_tiles = op.Gather(scaled, queries_of, axis=2, name="query_tiles")  # [B, H, T, Q, D]
        keys = op.Gather(all_keys, keys_of, axis=2, name="key_tiles")  # [B, H, T, K + hot, D]
        values = op.Gather(all_values, keys_of, axis=2, name="value_tiles")
        scores = op.MatMul(query_tiles, op.Transpose(keys, perm=(0, 1, 2, 4, 3)), name="scores")
        weights = op.Softmax(op.Add(scores, op.Unsqueeze(bias, axes=[3])), axis=-1, name="weights")
        return str(op.MatMul(weights, values))

    if cuts:
        sizes = [end - start for start, end in pairwise(cuts)]
        parts = (
            op.Split(tensor, sizes, axis=axis, outputs=len(sizes), name=name)
            for tensor, axis, name in ((tile_queries, 0, "queries_of"), (tile_keys, 0, "keys_of"), (bias, 2, "bias_of"))
        )
        tiles = op.Concat(*(attend(*piece) for piece in zip(*parts, strict=True)), axis=2)
    else:
        tiles = attend(tile_queries, tile_keys, bias)
    size = op.Shape(query)
    flat = op.Reshape(tiles, op.Concat(op.Gather(size, [0, 1]), [-1], op.Gather(size, [3]), axis=0))
    patches = op.Gather(flat, places, axis=2, name="patches")
    if not prefix_tokens:
        return op.as_type_of(patches, query)
    whole = op.MatMul(
        _slice(op, scaled, 0, prefix_tokens), op.Transpose(key_float, perm=_SWAP_LAST), name="prefix_scores"
    )
    if taken_off is not None:
        whole = op.Sub(whole, op.Unsqueeze(taken_off, axes=[2]))
    prefix = op.MatMul(op.Softmax(whole, axis=-1), value_float, name="prefix")
    return op.as_type_of(op.Concat(prefix, patches, axis=2), query)


def _fused_body(
    op: Builder,
    query: str,
    key: str,
    value: str,
    tile_queries: str,
    tile_keys: str,
    tile_bias: str,
    places: str,
    key_mask: str | None,
    *,
    prefix_tokens: int,
    hot: int,
) -> str:
    """Write focal attention as one ONNX Attention in which each tile is a head, and one for the prefix. Shapes as in `_body`."""
    taken_off = None
    if key_mask is not None:
        flags = op.Cast(op.Cast(key_mask, to="BOOL"), to="FLOAT")
        taken_off = op.Unsqueeze(op.Mul(flags, MASKED_SCORE), axes=[1])  # [B, 1, N]
    size = op.Shape(query)
    batch_heads, width = op.Gather(size, [0, 1]), op.Gather(size, [3])
    tile_count, key_count = (op.Gather(op.Shape(tile_keys), [axis]) for axis in (0, 1))
    query_tiles = op.Gather(query, tile_queries, axis=2, name="query_tiles")  # [B, H, T, Q, D]
    keys = op.Gather(key, tile_keys, axis=2, name="key_tiles")  # [B, H, T, K, D]
    values = op.Gather(value, tile_keys, axis=2, name="value_tiles")
    bias = op.Unsqueeze(tile_bias, axes=[0, 1])  # [1, 1, T, K]
    if taken_off is not None:
        bias = op.Sub(bias, op.Gather(taken_off, tile_keys, axis=2))
    if hot:
        query_float, key_float = op.as_float(query), op.as_float(key)
        scaled = op.Mul(query_float, op.attribute("scale"))
        tokens = _hot_tokens(op, scaled, key_float, taken_off, prefix_tokens, hot)  # [B, H, hot]
        bias = op.Add(bias, op.Gather(_once(op, key_float, tokens), tile_keys, axis=2))
        rows = op.Expand(op.Unsqueeze(tokens, axes=[3]), op.Concat([1, 1, 1], width, axis=0))
        every_tile = op.Concat(batch_heads, tile_count, [hot], width, axis=0)

        def with_hot(tiles: str, tensor: str) -> Any:
            taken = op.Unsqueeze(op.GatherElements(tensor, rows, axis=2), axes=[2])
            return op.Concat(tiles, op.Expand(taken, every_tile), axis=3)

        keys, values = with_hot(keys, key), with_hot(values, value)
        hot_bias = op.Expand(0.0, op.Shape(tokens))
        if taken_off is not None:
            spread = op.Expand(taken_off, op.Gather(op.Shape(key), [0, 1, 2]))
            hot_bias = op.Neg(op.GatherElements(spread, tokens, axis=2))
        hot_bias = op.Expand(op.Unsqueeze(hot_bias, axes=[2]), op.Concat(batch_heads, tile_count, [hot], axis=0))
        bias = op.Concat(bias, hot_bias, axis=3)
        key_count = op.Add(key_count, hot)
    one_bias_each = op.Expand(bias, op.Concat(batch_heads, tile_count, key_count, axis=0))
    flat_bias = op.Reshape(one_bias_each, op.Concat(op.Gather(size, [0]), [-1, 1], key_count, axis=0))
    flat_bias = op.as_type_of(op.Max(flat_bias, _LOWEST_BIAS), query)

    def flat(tiles: str) -> Any:  # [B, H, T, X, D] to [B, H * T, X, D]
        shape = op.Shape(tiles)
        return op.Reshape(tiles, op.Concat(op.Gather(shape, [0]), [-1], op.Gather(shape, [3, 4]), axis=0))

    scale = op.reference("scale")
    mixed = attention(op, flat(query_tiles), flat(keys), flat(values), flat_bias, scale=scale, name="tiles")
    patches = op.Gather(op.Reshape(mixed, op.Concat(batch_heads, [-1], width, axis=0)), places, axis=2, name="patches")
    if not prefix_tokens:
        return str(patches)
    prefix_bias = None if taken_off is None else op.as_type_of(op.Neg(op.Unsqueeze(taken_off, axes=[2])), query)
    prefix_queries = _slice(op, query, 0, prefix_tokens)
    prefix = attention(op, prefix_queries, key, value, prefix_bias, scale=scale, name="prefix")
    return str(op.Concat(prefix, patches, axis=2))


def _hot_tokens(
    op: Builder, query: str, key: str, taken_off: str | None, prefix_tokens: int, hot: int
) -> str:  # [B, H, hot] int64
    end = 2**31 - 1
    mean = op.ReduceMean(_slice(op, query, prefix_tokens, end), axes=[2], keepdims=1)
    patches = _slice(op, key, prefix_tokens, end)
    scores = op.Squeeze(op.MatMul(patches, op.Transpose(mean, perm=_SWAP_LAST), name="mean_scores"), axes=[3])
    if taken_off is not None:
        scores = op.Sub(scores, _slice(op, taken_off, prefix_tokens, end))
    _, tokens = op.TopK(scores, [hot], axis=2, largest=1, sorted=1, outputs=2)
    return str(op.Add(tokens, prefix_tokens))


def _once(op: Builder, key: str, tokens: str) -> str:
    """Write what keeps a hot key from being listed a second time, fp32 `[B, H, N]`."""
    size = op.Gather(op.Shape(key), [0, 1, 2])
    nothing = op.Expand(0.0, size)
    return str(op.ScatterElements(nothing, tokens, op.Expand(FAR_BELOW, op.Shape(tokens)), axis=2))


def _slice(op: Builder, tensor: str, start: int, end: int) -> str:
    return str(op.Slice(tensor, [start], [end], [2]))


def _from_torch(  # type: ignore[no-untyped-def]
    write, query, key, value, tile_queries, tile_keys, tile_bias, places, key_mask, prefix_tokens, hot, scale
) -> Any:
    mask = () if key_mask is None else (key_mask,)
    return write(
        query, key, value, tile_queries, tile_keys, tile_bias, places, *mask,
        scale=scale, prefix_tokens=prefix_tokens, hot=hot,
    )  # fmt: skip


FOCAL_ATTENTION = Operator(
    "FocalAttention",
    inputs=(
        FormalParameter("query"),
        FormalParameter("key"),
        FormalParameter("value"),
        FormalParameter("tile_queries", "INT32"),
        FormalParameter("tile_keys", "INT32"),
        FormalParameter("tile_bias", "FLOAT"),
        FormalParameter("places", "INT32"),
        FormalParameter("key_mask", "INT32", since=MASKED_FOCAL_DOMAIN_VERSION),
    ),
    outputs=(FormalParameter("out"),),
    attributes=(
        FormalAttribute("scale", "FLOAT"),
        FormalAttribute("prefix_tokens"),
        FormalAttribute("hot", default=0),
    ),
    body=_body,
    fused_body=_fused_body,
    torch_operators={"focal_attention": _from_torch},
    plugin=True,
    attends=True,
    approximates=True,
    typed=True,
    since=FOCAL_DOMAIN_VERSION,
)
