"""What landmarks are chosen from: the residual stream that enters a block, and how many prefix tokens it has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import GraphView, attribute, input_names, output_names
from fna.export.surgery.recognise.rows import Attention
from fna.export.surgery.recognise.token_labels import CONSTANT, MIXED, CannotLabelError, label_tokens

FURTHEST = 400
"""Nodes looked at below an attention block for the addition that closes its residual branch."""


@dataclass(frozen=True)
class Stream:
    """Hidden states of one block: a tensor `[B, N, C]`, or `[N, B, C]` where `sequence_first`."""

    tensor: str
    sequence_first: bool


def find_stream(graph: GraphView, points: list[ShapePoint], attention: Attention) -> Stream | None:
    """The residual stream that enters a block, before its norm; None where it cannot be told.

    It is the tensor that is both what query, key and value are computed from and what the block's result is added to.
    """
    if attention.source is None:
        return None
    above = graph.needed_for({attention.source})
    candidates: list[str] = []
    below = {attention.result.tensor}
    queue = sorted(graph.readers(attention.result.tensor))
    seen: set[int] = set()
    while queue and len(seen) < FURTHEST:
        index = queue.pop(0)
        if index in seen:
            continue
        seen.add(index)
        node = graph.nodes[index]
        if node.op in ("Add", "SkipLayerNormalization", "Sum", "SkipSimplifiedLayerNormalization"):
            for name in input_names(node)[:2]:
                inside = (
                    name == attention.source
                    or graph.producer.get(name, -2) in above
                    or name in {i.name for i in graph.inputs}
                )
                if name not in below and name in graph.data and inside:
                    candidates.append(name)
        if candidates:
            break
        below.update(output_names(node))
        queue = sorted({*queue, *(reader for name in output_names(node) for reader in graph.readers(name))})
    for name in [*candidates, attention.source]:
        stream = _as_stream(graph, points, attention, name)
        if stream is not None:
            return stream
    return None


def _as_stream(graph: GraphView, points: list[ShapePoint], attention: Attention, name: str) -> Stream | None:
    shape = points[0].shapes.get(name)
    tokens = attention.tokens[0]
    if shape is None or len(shape) != 3 or points[0].types.get(name) not in (1, 10, 16):
        return None
    start = name
    if name != attention.source and graph.producer.get(name, -1) == graph.producer.get(attention.source or "", -2):
        # one operator adds the residual and norms the sum; its outputs hold the same tokens
        start = attention.source or name
    try:
        reached = label_tokens(graph, points[0], start, [attention.query.tensor], -1)
    except CannotLabelError:
        return None
    if attention.query.tensor not in reached:
        return None
    labels = reached[attention.query.tensor]
    first = labels[..., :1] if attention.query.tensor != name else labels
    values = np.unique(first)
    if values[0] < 0:
        return None
    batch = points[0].batch
    if shape[1] == tokens and (shape[0] == batch or tokens != shape[0]):
        # tokens of one image are numbered in a row
        in_order = _appears_in_order(labels, tokens, 1)
        return Stream(name, False) if in_order else None
    if shape[0] == tokens:
        return Stream(name, True) if _appears_in_order(labels, tokens, shape[1]) else None
    return None


def _appears_in_order(labels: np.ndarray, tokens: int, step: int) -> bool:
    """Whether some axis of the query holds the tokens 0, 1, 2 ... of the first image, in that order."""
    for axis, size in enumerate(labels.shape):
        if size != tokens:
            continue
        line = np.moveaxis(labels, axis, 0).reshape(tokens, -1)[:, 0]
        if (line == np.arange(tokens) * step).all():
            return True
    return False


def count_prefix_tokens(graph: GraphView, points: list[ShapePoint], stream: Stream) -> int | None:
    """Tokens at the front of a stream that do not come from the image; None where it cannot be told.

    They are put there by a Concat above the first block; blocks leave the order of tokens alone.
    """
    point = points[0]
    above = sorted(graph.needed_for({stream.tensor}), reverse=True)
    token_axis = 0 if stream.sequence_first else 1
    joins = [index for index in above if _joins_tokens(graph, point, index, stream, token_axis)]
    if not joins:
        return 0
    starts: list[tuple[str, int]] = []
    for index in above:
        node = graph.nodes[index]
        if node.op == "Concat" and node.inputs[0].name not in graph.data:
            starts += [(name, -1) for name in input_names(node) if name in graph.data]
        if node.op == "Conv" and node.outputs[0].name in graph.data:
            starts.append((node.outputs[0].name, 1))
    for join in joins[:4]:
        for name, axis in starts[-8:]:
            count = _count_constant(graph, point, name, axis, graph.nodes[join].outputs[0].name, token_axis)
            if count is not None:
                return count
    return None


def _joins_tokens(graph: GraphView, point: ShapePoint, index: int, stream: Stream, token_axis: int) -> bool:
    """Whether a node is a Concat of tokens to as many as the stream has."""
    node = graph.nodes[index]
    if node.op != "Concat" or node.outputs[0].name not in graph.data:
        return False
    shape = point.shapes.get(node.outputs[0].name)
    axis = int(attribute(node, "axis", 0))
    return shape == point.shapes.get(stream.tensor) and shape is not None and axis % len(shape) == token_axis


def _count_constant(
    graph: GraphView, point: ShapePoint, start: str, axis: int, target: str, token_axis: int
) -> int | None:
    if point.shapes.get(start) is None:
        return None
    try:
        labels = label_tokens(graph, point, start, [target], axis).get(target)
    except CannotLabelError:
        return None
    if labels is None or labels.ndim != 3:
        return None
    line = labels[:, 0, 0] if token_axis == 0 else labels[0, :, 0]
    if (line == MIXED).any():
        return None
    return int(np.argmax(line != CONSTANT)) if (line != CONSTANT).any() else len(line)
