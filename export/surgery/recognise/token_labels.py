"""Which token each element of a tensor belongs to, followed through the graph by running it on labels instead of numbers.

The tokens of one tensor get numbers; operators that work token by token (projections, norms, elementwise arithmetic, views)
carry the numbers along; whatever mixes tokens yields `MIXED`. Two tensors whose labels agree hold the same tokens in the same
places, however they were reshaped, split, transposed or sliced on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from fna.export.surgery.graph import fold as folding
from fna.export.surgery.graph.shapes import BROADCAST, SAME_AS_FIRST, ShapePoint
from fna.export.surgery.graph.view import (
    MICROSOFT,
    STANDARD_DOMAINS,
    GraphView,
    attribute,
    input_names,
    output_names,
    words,
)

Labels = NDArray[np.int32]
MIXED = -1
CONSTANT = -2
"""A token that does not depend on the image: class and register tokens, before the first block."""

LARGEST_LABELLED = 3 << 24
"""Elements; tensors above this are not labelled, so the block is refused."""

VIEWS = words("Reshape Transpose Squeeze Unsqueeze Flatten Identity Slice Gather Split Expand Tile Concat")
NORMS = words("""
    LayerNormalization RMSNormalization SimplifiedLayerNormalization LpNormalization SkipLayerNormalization
    SkipSimplifiedLayerNormalization""")
REDUCTIONS = words("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceL1 ReduceSumSquare ReduceProd")
MIXES_TOKENS = words("CumSum InstanceNormalization GroupNormalization MeanVarianceNormalization LRN Softmax LogSoftmax")


class CannotLabelError(Exception):
    """Labels cannot be formed: a shape is unknown or a tensor too large."""


def run_view(node: gs.Node, data: NDArray[Any], point: ShapePoint, graph: GraphView) -> list[NDArray[Any]]:
    """Apply a view operator to any array, with its other inputs taken from the values known at `point`."""
    if node.op in ("Reshape", "Expand", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Tile", "Split"):
        shape = point.shapes.get(node.outputs[0].name)
        if node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten") and shape is not None:
            return [data.reshape(shape)]
        values = [data, *(point.values.get(name) if name else None for name in input_names(node)[1:])]
        if node.op == "Expand" and shape is not None:
            return [np.broadcast_to(data, shape)]
        return folding.fold(node, values, graph.opset)
    if node.op == "Transpose":
        return [np.transpose(data, attribute(node, "perm"))]
    if node.op == "Identity":
        return [data]
    raise folding.CannotFoldError


def label_tokens(
    graph: GraphView,
    point: ShapePoint,
    source: str,
    targets: Sequence[str],
    channel_axis: int,
) -> dict[str, Labels]:
    """Number the tokens of `source` (all axes but the channels) and follow them to `targets`.

    Raises:
        CannotLabelError: if a shape on the way is unknown or too large.
    """
    shape = _shape_of(point, source)
    tokens = np.arange(int(np.prod(shape, dtype=np.int64)) // max(1, shape[channel_axis]), dtype=np.int32)
    kept = [size for axis, size in enumerate(shape) if axis != channel_axis % len(shape)]
    start = np.broadcast_to(np.expand_dims(tokens.reshape(kept), channel_axis % len(shape)), shape)
    return follow(graph, point, {source: start}, targets)


def follow(graph: GraphView, point: ShapePoint, labels: dict[str, Labels], targets: Sequence[str]) -> dict[str, Labels]:
    """Carry labels forward from the tensors that have them to `targets`."""
    known = dict(labels)
    for index in _between(graph, set(labels), targets):
        node = graph.nodes[index]
        try:
            results = _outputs(graph, node, known, point)
        except (ValueError, IndexError, TypeError) as error:
            raise CannotLabelError(f"the tokens cannot be followed through {node.op} {node.name!r}") from error
        for name, result in zip(output_names(node), results, strict=False):
            if name and name not in labels:
                known[name] = result
    return known


def _between(graph: GraphView, sources: set[str], targets: Sequence[str]) -> list[int]:
    """Nodes on a way from a source to a target, in order."""
    needed: set[int] = set()
    todo = [graph.producer[name] for name in targets if name in graph.producer and name not in sources]
    while todo:
        index = todo.pop()
        if index in needed:
            continue
        needed.add(index)
        for name in input_names(graph.nodes[index]):
            if name in graph.producer and name not in sources and name in graph.data:
                todo.append(graph.producer[name])
    reached = set(sources)
    order = []
    for index in sorted(needed):
        node = graph.nodes[index]
        if any(name in reached for name in input_names(node)):
            reached.update(output_names(node))
            order.append(index)
    return order


def _shape_of(point: ShapePoint, name: str) -> tuple[int, ...]:
    shape = point.shapes.get(name)
    if shape is None:
        raise CannotLabelError(f"the shape of {name!r} is not known")
    if int(np.prod(shape, dtype=np.float64)) > LARGEST_LABELLED:
        raise CannotLabelError(f"{name!r} of shape {list(shape)} is too large")
    return shape


def _mixed(point: ShapePoint, name: str) -> Labels:
    return np.broadcast_to(np.int32(MIXED), _shape_of(point, name))


def _merge(parts: Sequence[Labels], shape: tuple[int, ...]) -> Labels:
    """Labels of an elementwise result: those of the operands where they agree."""
    if len(parts) == 1:
        return parts[0] if parts[0].shape == shape else np.broadcast_to(parts[0], shape)
    result = np.broadcast_to(parts[0], shape)
    for part in parts[1:]:
        if part is not parts[0]:
            result = np.where(result == np.broadcast_to(part, shape), result, np.int32(MIXED))
    return result


def _keep(shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    gone = {axis % len(shape) for axis in axes}
    return tuple(1 if axis in gone else size for axis, size in enumerate(shape))


def _reduce(labels: Labels, axes: tuple[int, ...]) -> Labels:
    """The common label along `axes` (kept with size 1), `MIXED` where there is none."""
    low = labels
    for axis in axes:
        index = axis % labels.ndim
        if low.strides[index] == 0 or low.shape[index] == 1:
            low = np.take(low, [0], axis=index)
            continue
        first = np.take(low, [0], axis=index)
        low = np.where((low == first).all(axis=index, keepdims=True), first, np.int32(MIXED))
    return low


@dataclass(frozen=True)
class Labelled:
    """What a rule of labels looks at: a node, and the labels of those of its inputs that have some."""

    graph: GraphView
    node: gs.Node
    inputs: list[Labels | None]
    point: ShapePoint

    @property
    def known(self) -> list[Labels]:
        """Labels of the inputs that have some."""
        return [labels for labels in self.inputs if labels is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return _shape_of(self.point, self.node.outputs[0].name)

    def everywhere(self, labels: Labels) -> list[Labels]:
        """The same labels for all results, broadcast to the shape of the first."""
        return [np.broadcast_to(labels, self.shape)] * len(self.node.outputs)


LabelRule = Callable[[Labelled], list[Labels] | None]
"""What labels a node's results have; None where the rule does not apply, so that tokens count as mixed."""


def _outputs(graph: GraphView, node: gs.Node, labels: dict[str, Labels], point: ShapePoint) -> list[Labels]:
    at = Labelled(graph, node, [labels.get(name) for name in input_names(node)], point)
    if node.op in ("Shape", "Size") or (not at.known and node.op != "Concat"):
        return []
    if node.op not in VIEWS:
        _shape_of(point, node.outputs[0].name)
    rule = LABEL_RULES.get(node.op) if node.domain in (*STANDARD_DOMAINS, MICROSOFT) or node.op in VIEWS else None
    results = rule(at) if rule is not None else None
    return results if results is not None else [_mixed(point, name) for name in output_names(node)]


def _view(at: Labelled) -> list[Labels] | None:
    if at.inputs[0] is None:
        return None
    try:
        return [result.astype(np.int32, copy=False) for result in run_view(at.node, at.inputs[0], at.point, at.graph)]
    except (folding.CannotFoldError, ValueError, IndexError):
        return None


def _concat(at: Labelled) -> list[Labels]:
    parts = []
    for name, labels in zip(input_names(at.node), at.inputs, strict=True):
        label = MIXED if name in at.graph.data else CONSTANT
        parts.append(np.broadcast_to(np.int32(label), _shape_of(at.point, name)) if labels is None else labels)
    return [np.concatenate(parts, axis=int(attribute(at.node, "axis", 0)))]


def _norm(at: Labelled) -> list[Labels] | None:
    first = at.inputs[0]
    if first is None:
        return None
    axis = int(attribute(at.node, "axis", -1))
    axes = (axis,) if at.node.op == "LpNormalization" else tuple(range(axis % first.ndim, first.ndim))
    return at.everywhere(_merge([_reduce(labels, axes) for labels in at.known], _keep(at.shape, axes)))


def _reduction(at: Labelled) -> list[Labels] | None:
    first = at.inputs[0]
    if first is None:
        return None
    axes = folding.axes_of(at.node, [None, *(at.point.values.get(name) for name in input_names(at.node)[1:])])
    return [_reduce(first, tuple(range(first.ndim)) if axes is None else tuple(axes)).reshape(at.shape)]


def _product(at: Labelled) -> list[Labels] | None:
    """A product of tokens with weights; of two tensors of data, it mixes tokens."""
    left, right = at.inputs[:2] if len(at.inputs) > 1 else (None, None)
    if (left is None) == (right is None) or all(name in at.graph.data for name in input_names(at.node)[:2]):
        return None
    if attribute(at.node, "transBatchA", 0) or attribute(at.node, "transBatchB", 0):
        return None
    swap = bool(attribute(at.node, "transA" if left is not None else "transB", 0))
    labels = left if left is not None else right
    assert labels is not None
    reduced = _reduce(labels, (-1 if (left is not None) != swap else -2,))
    return at.everywhere(np.swapaxes(reduced, -1, -2) if swap else reduced)


def _gemm(at: Labelled) -> list[Labels] | None:
    left = at.inputs[0]
    if left is None or len(at.known) != 1:
        return None
    swap = bool(attribute(at.node, "transA", 0))
    reduced = _reduce(left, (-2 if swap else -1,))
    return at.everywhere(reduced.T if swap else reduced)


def _convolution(at: Labelled) -> list[Labels] | None:
    """A convolution that keeps the size of its input."""
    first = at.inputs[0]
    if first is None or first.shape[2:] != at.shape[2:] or first.shape[0] != at.shape[0]:
        return None
    return at.everywhere(_reduce(first, (1,)))


def _einsum(at: Labelled) -> list[Labels] | None:
    equation = str(attribute(at.node, "equation", "")).replace(" ", "")
    if len(at.known) != 1 or "->" not in equation or "." in equation:
        return None
    terms, out = equation.split("->")
    term, labels = next((t, x) for t, x in zip(terms.split(","), at.inputs, strict=True) if x is not None)
    gone = tuple(axis for axis, letter in enumerate(term) if letter not in out)
    letters = [letter for letter in term if letter in out]
    order = [letters.index(letter) for letter in out if letter in letters]
    moved = np.transpose(np.squeeze(_reduce(labels, gone), axis=gone), order)
    added = tuple(axis for axis, letter in enumerate(out) if letter not in letters)
    return at.everywhere(np.expand_dims(moved, added))


def _first_input(at: Labelled) -> list[Labels] | None:
    return None if at.inputs[0] is None else [at.inputs[0]]


def _elementwise(at: Labelled) -> list[Labels]:
    return [_merge(at.known, at.shape)] * len(at.node.outputs)


def _mixing(at: Labelled) -> list[Labels] | None:
    return None


LABEL_RULES: dict[str, LabelRule] = {
    **dict.fromkeys(SAME_AS_FIRST | BROADCAST | words("QuantizeLinear DequantizeLinear"), _elementwise),
    **dict.fromkeys(VIEWS, _view),
    "Concat": _concat,
    **dict.fromkeys(MIXES_TOKENS, _mixing),
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(words("MatMul FusedMatMul MatMulInteger"), _product),
    "Gemm": _gemm,
    "Einsum": _einsum,
    "Conv": _convolution,
    "RotaryEmbedding": _first_input,
    "DynamicQuantizeLinear": _first_input,  # one scale for the whole tensor says nothing about tokens
}
