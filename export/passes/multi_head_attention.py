"""Exact attention of a traced file made com.microsoft MultiHeadAttention, onnxruntime's own operator and mostly its fastest form."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import GraphProto, NodeProto, helper

from fna.export.passes.fuse_exact import ExactAttention, GraphIndex, find_exact_attention, replace_nodes, swaps_heads
from fna.export.types import static_shapes

ONNXRUNTIME_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class _Tokens:
    """Where heads are split and joined: everything between is one operator's."""

    operands: tuple[str, str, str]  # query, key, value, [B, N, H D] each
    heads: int
    joined: NodeProto  # makes [B, N, H D]
    between: tuple[NodeProto, ...]


def fuse_multi_head_attention(graph: GraphProto) -> int:
    """Replace, in place, each exact attention on all heads of a block by one com.microsoft MultiHeadAttention.

    Args:
        graph: traced by this project, with the shapes of its values.

    Returns:
        How many were replaced. Attention on some of the heads stays as it is.
    """
    index = GraphIndex(graph)
    shapes = static_shapes(graph.value_info)
    count = 0
    for match in find_exact_attention(graph, index):
        tokens = _tokens(index, shapes, match)
        if tokens is None:
            continue
        fused = helper.make_node(
            "MultiHeadAttention", list(tokens.operands), [tokens.joined.output[0]], domain=ONNXRUNTIME_DOMAIN,
            name=match.last.name or match.last.output[0], num_heads=tokens.heads, scale=match.scale,
        )  # fmt: skip
        replace_nodes(graph, index, (*match.replaced, *tokens.between, tokens.joined), [fused])
        count += 1
    return count


def _tokens(index: GraphIndex, shapes: dict[str, list[int]], match: ExactAttention) -> _Tokens | None:
    heads = shapes.get(match.query, [0, 0])[1]
    operands = [_before_split(index, shapes, value) for value in (match.query, match.key, match.value)]
    swap = index.only_reader(match.last.output[0], "Transpose")
    joined = None if swap is None else index.only_reader(swap.output[0], "Reshape")
    if match.swap or not heads or swap is None or joined is None or not swaps_heads(swap):
        return None
    query, key, value = operands
    if query is None or key is None or value is None or len(shapes.get(joined.output[0], ())) != len("BNC"):
        return None
    return _Tokens((query, key, value), heads, joined, (swap,))


def _before_split(index: GraphIndex, shapes: dict[str, list[int]], value: str) -> str | None:
    """Return the `[B, N, H D]` that `[B, H, N, D]` was split from."""
    swap = index.made_by(value, "Transpose")
    split = None if swap is None else index.made_by(swap.input[0], "Reshape")
    if swap is None or split is None or not swaps_heads(swap):
        return None
    return str(split.input[0]) if len(shapes.get(split.input[0], ())) == len("BNC") else None
