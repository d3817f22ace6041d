"""What matching looks things up in, and the words for what it finds: axes, sides, cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from fna.export.surgery.graph.bounds import BoundsFinder
from fna.export.surgery.graph.fold import CannotFoldError
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import GraphView, words
from fna.export.surgery.recognise.rows import RefusedError
from fna.export.surgery.recognise.token_labels import run_view

PRODUCTS = words("MatMul FusedMatMul Einsum Gemm")


@dataclass(frozen=True)
class Axes:
    """What the axes of a product's operand are: the batch axes (heads among them), the token axis, the summed axis."""

    batch: tuple[int, ...]
    token: int
    channel: int


@dataclass(frozen=True)
class Side:
    """One operand of an attention product."""

    tensor: str
    axes: Axes


@dataclass
class Core:
    """Softmax(scale * Q K^T) V as found, before its layouts are understood."""

    query: Side
    key: Side
    value: Side
    scale: float
    output: str
    output_axes: Axes
    family: str
    packed_heads: int | None = None
    """Where given, the channel axis of query, key, value and output holds this many heads, one after another."""


class Context:
    """What matching looks things up in."""

    def __init__(self, graph: GraphView, points: list[ShapePoint]) -> None:
        self.graph = graph
        self.points = points
        self.bounds = BoundsFinder(graph, points)

    def rank(self, name: str) -> int:
        """Rank of a tensor; refuses where it is not known."""
        shape = self.points[0].shapes.get(name)
        if shape is None:
            raise RefusedError(f"the shape of {name!r} could not be inferred")
        return len(shape)

    def shape(self, name: str, point: ShapePoint | None = None) -> tuple[int, ...]:
        """Shape of a tensor at one of the points; refuses where it is not known."""
        shape = (point or self.points[0]).shapes.get(name)
        if shape is None:
            raise RefusedError(f"the shape of {name!r} could not be inferred")
        return shape


def describe(node: gs.Node) -> str:
    """A node as refusals name it."""
    return f"{node.op} {node.name!r}" if node.name else node.op


def dropout_is_off(context: Context, node: gs.Node) -> bool:
    """Whether a Dropout does nothing, as in inference."""
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    return context.bounds.find(node.inputs[2].name).high == 0


def axis_through_view(context: Context, node: gs.Node, axis: int, *, upward: bool = False) -> int:
    """Where one axis of a tensor goes through a view, found by running the view on that axis's coordinates."""
    source, target = node.inputs[0].name, node.outputs[0].name
    inside, outside = context.shape(source), context.shape(target)
    try:
        if not upward:
            return _follow_axis(context, node, inside, outside, axis)
        for candidate in range(len(inside)):
            if inside[candidate] == outside[axis]:
                try:
                    if _follow_axis(context, node, inside, outside, candidate) == axis:
                        return candidate
                except RefusedError:
                    continue
    except (CannotFoldError, ValueError, IndexError):
        pass
    raise RefusedError(f"a view of its scores splits or merges the axis of the keys ({describe(node)})")


def _follow_axis(context: Context, node: gs.Node, inside: Sequence[int], outside: Sequence[int], axis: int) -> int:
    coordinate = np.arange(inside[axis]).reshape([-1 if i == axis else 1 for i in range(len(inside))])
    moved = run_view(node, np.broadcast_to(coordinate, inside), context.points[0], context.graph)[0]
    if moved.shape != tuple(outside):
        raise RefusedError(f"a view of its scores is not understood ({describe(node)})")
    for candidate in range(len(outside)):
        if outside[candidate] != inside[axis] or outside[candidate] < 2:
            continue
        wanted = np.arange(outside[candidate]).reshape([-1 if i == candidate else 1 for i in range(len(outside))])
        if (moved == wanted).all():
            return candidate
    raise RefusedError(f"a view of its scores splits or merges the axis of the keys ({describe(node)})")
