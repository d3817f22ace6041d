"""Which token each element of a tensor belongs to, followed through the graph by running it on labels instead of numbers.

The tokens of one tensor get numbers; operators that work token by token (projections, norms, elementwise arithmetic, views)
carry the numbers along; whatever mixes tokens yields `MIXED`. Two tensors whose labels agree hold the same tokens in the same
places, however they were reshaped, split, transposed or sliced on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from fna.export.surgery.graph import fold as folding
from fna.export.surgery.graph.index import MICROSOFT, STANDARD_DOMAINS, Graph, attribute, words
from fna.export.surgery.graph.shapes import BROADCAST, SAME_AS_FIRST, Point

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


def run_view(node: NodeProto, data: NDArray[Any], point: Point) -> list[NDArray[Any]]:
    """Apply a view operator to any array, with its other inputs taken from the values known at `point`."""
    if node.op_type in ("Reshape", "Expand", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Tile", "Split"):
        shape = point.shapes.get(node.output[0])
        if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten") and shape is not None:
            return [data.reshape(shape)]
        values = [data, *(point.values.get(name) if name else None for name in node.input[1:])]
        if node.op_type == "Expand" and shape is not None:
            return [np.broadcast_to(data, shape)]
        return folding.fold(node, values)
    if node.op_type == "Transpose":
        return [np.transpose(data, attribute(node, "perm"))]
    if node.op_type == "Identity":
        return [data]
    raise folding.CannotFoldError


def label_tokens(
    graph: Graph,
    point: Point,
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


def follow(graph: Graph, point: Point, labels: dict[str, Labels], targets: Sequence[str]) -> dict[str, Labels]:
    """Carry labels forward from the tensors that have them to `targets`."""
    found = dict(labels)
    for index in _between(graph, set(labels), targets):
        node = graph.nodes[index]
        try:
            results = _outputs(graph, node, found, point)
        except (ValueError, IndexError, TypeError) as error:
            raise CannotLabelError(f"the tokens cannot be followed through {node.op_type} {node.name!r}") from error
        for name, result in zip(node.output, results, strict=False):
            if name and name not in labels:
                found[name] = result
    return found


def _between(graph: Graph, sources: set[str], targets: Sequence[str]) -> list[int]:
    """Nodes on a way from a source to a target, in order."""
    needed: set[int] = set()
    todo = [graph.producer[name] for name in targets if name in graph.producer and name not in sources]
    while todo:
        index = todo.pop()
        if index in needed:
            continue
        needed.add(index)
        for name in graph.nodes[index].input:
            if name in graph.producer and name not in sources and name in graph.data:
                todo.append(graph.producer[name])
    reached = set(sources)
    order = []
    for index in sorted(needed):
        node = graph.nodes[index]
        if any(name in reached for name in node.input):
            reached.update(node.output)
            order.append(index)
    return order


def _shape_of(point: Point, name: str) -> tuple[int, ...]:
    shape = point.shapes.get(name)
    if shape is None:
        raise CannotLabelError(f"the shape of {name!r} is not known")
    if int(np.prod(shape, dtype=np.float64)) > LARGEST_LABELLED:
        raise CannotLabelError(f"{name!r} of shape {list(shape)} is too large")
    return shape


def _outputs(graph: Graph, node: NodeProto, found: dict[str, Labels], point: Point) -> list[Labels]:
    inputs = [found.get(name) for name in node.input]
    given = [item for item in inputs if item is not None]
    op_type = node.op_type
    if op_type in ("Shape", "Size"):
        return []
    if op_type == "Split" or (op_type in VIEWS and op_type != "Concat" and inputs[0] is not None):
        try:
            return [item.astype(np.int32, copy=False) for item in run_view(node, _whole(inputs[0]), point)]
        except (folding.CannotFoldError, ValueError, IndexError):
            return [_mixed(point, name) for name in node.output]
    if op_type == "Concat":
        return [_concat(graph, node, found, point)]
    if not given:
        return []
    shape = _shape_of(point, node.output[0])
    if op_type in MIXES_TOKENS or node.domain not in (*STANDARD_DOMAINS, MICROSOFT):
        return [_mixed(point, name) for name in node.output]
    if op_type in NORMS and inputs[0] is not None:
        axis = int(attribute(node, "axis", -1))
        axes = tuple(range(axis % inputs[0].ndim, inputs[0].ndim)) if op_type not in ("LpNormalization",) else (axis,)
        merged = _merge([_reduce(item, axes) for item in given], _keep(shape, axes))
        normed = np.broadcast_to(merged, shape)
        return [normed] * len(node.output)
    if op_type in REDUCTIONS and inputs[0] is not None:
        values = [None, *(point.values.get(name) for name in node.input[1:])]
        axes_list = folding.axes_of(node, values)
        axes = tuple(range(inputs[0].ndim)) if axes_list is None else tuple(axes_list)
        return [_reduce(inputs[0], axes).reshape(shape)]
    if (
        op_type in ("MatMul", "FusedMatMul", "MatMulInteger")
        and _one_of_two(inputs)
        and not _is_data_product(graph, node)
    ):
        side = 0 if inputs[0] is not None else 1
        if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
            return [_mixed(point, node.output[0])]
        swap = bool(attribute(node, "transA" if side == 0 else "transB", 0))
        axis = (-1 if side == 0 else -2) if not swap else (-2 if side == 0 else -1)
        reduced = _reduce(_whole(inputs[side]), (axis,))
        if swap:
            reduced = np.swapaxes(reduced, -1, -2)
        return [np.broadcast_to(reduced, shape)]
    if op_type == "DynamicQuantizeLinear" and inputs[0] is not None:
        # one scale for the whole tensor says nothing about tokens
        return [inputs[0]]
    if op_type == "Gemm" and inputs[0] is not None and len(given) == 1:
        axis = -2 if attribute(node, "transA", 0) else -1
        reduced = _reduce(inputs[0], (axis,))
        return [np.broadcast_to(reduced.T if attribute(node, "transA", 0) else reduced, shape)]
    if op_type == "Einsum" and len(given) == 1:
        return [_einsum(node, inputs, shape)]
    if (
        op_type == "Conv"
        and inputs[0] is not None
        and inputs[0].shape[2:] == shape[2:]
        and inputs[0].shape[0] == shape[0]
    ):
        return [np.broadcast_to(_reduce(inputs[0], (1,)), shape)]
    if op_type == "RotaryEmbedding" and inputs[0] is not None:
        return [inputs[0]]
    if op_type in SAME_AS_FIRST or op_type in BROADCAST or op_type in ("QuantizeLinear", "DequantizeLinear"):
        return [_merge(given, shape)] * len(node.output)
    return [_mixed(point, name) for name in node.output]


def _one_of_two(inputs: Sequence[Labels | None]) -> bool:
    return len(inputs) > 1 and (inputs[0] is None) != (inputs[1] is None)


def _is_data_product(graph: Graph, node: NodeProto) -> bool:
    return all(name in graph.data for name in node.input[:2])


def _whole(labels: Labels | None) -> Labels:
    assert labels is not None
    return labels


def _mixed(point: Point, name: str) -> Labels:
    return np.broadcast_to(np.int32(MIXED), _shape_of(point, name))


def _merge(items: Sequence[Labels], shape: tuple[int, ...]) -> Labels:
    """Labels of an elementwise result: those of the operands where they agree."""
    if len(items) == 1:
        return items[0] if items[0].shape == shape else np.broadcast_to(items[0], shape)
    result = np.broadcast_to(items[0], shape)
    for item in items[1:]:
        if item is not items[0]:
            result = np.where(result == np.broadcast_to(item, shape), result, np.int32(MIXED))
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


def _concat(graph: Graph, node: NodeProto, found: dict[str, Labels], point: Point) -> Labels:
    axis = int(attribute(node, "axis", 0))
    parts = []
    for name in node.input:
        labels = found.get(name)
        if labels is None:
            label = MIXED if name in graph.data else CONSTANT
            labels = np.broadcast_to(np.int32(label), _shape_of(point, name))
        parts.append(labels)
    return np.concatenate(parts, axis=axis)


def _einsum(node: NodeProto, inputs: list[Labels | None], shape: tuple[int, ...]) -> Labels:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    if "->" not in equation or "." in equation:
        return np.broadcast_to(np.int32(MIXED), shape)
    terms, out = equation.split("->")
    for term, labels in zip(terms.split(","), inputs, strict=True):
        if labels is None:
            continue
        gone = tuple(axis for axis, letter in enumerate(term) if letter not in out)
        reduced = _reduce(labels, gone)
        index = np.squeeze(reduced, axis=gone)
        letters = [letter for letter in term if letter in out]
        order = [letters.index(letter) for letter in out if letter in letters]
        index = np.transpose(index, order)
        for axis, letter in enumerate(out):
            if letter not in letters:
                index = np.expand_dims(index, axis)
        return np.broadcast_to(index, shape)
    return np.broadcast_to(np.int32(MIXED), shape)
