"""Below a softmax: from the attention weights to their product with the values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fna.export.surgery.graph.view import GraphView, input_names, output_names
from fna.export.surgery.recognise.context import PRODUCTS, Context, axis_through_view, describe, dropout_is_off
from fna.export.surgery.recognise.layout import is_view, scalar_factor
from fna.export.surgery.recognise.rows import RefusedError


@dataclass(frozen=True)
class Below:
    """The product that the attention weights end in."""

    product: int
    weights: str
    axis: int


def walk_down(context: Context, weights: str, axis: int) -> Below:
    """Follow the attention weights to their product with the values; `axis` is the one the softmax sums over."""
    graph = context.graph
    for _ in range(64):
        if weights in graph.outputs:
            raise RefusedError("its attention weights are an output of the graph")
        readers = [i for i in graph.readers(weights) if graph.nodes[i].op not in ("Shape", "Size")]
        guard = _nan_guard(graph, weights, readers)
        if guard is not None:
            weights = guard
            continue
        if not readers:
            raise RefusedError("nothing reads its attention weights")
        if len(readers) > 1:
            named = ", ".join(sorted({describe(graph.nodes[i]) for i in readers}))
            raise RefusedError(f"its attention weights are read by more than the product with the values: {named}")
        index = readers[0]
        node = graph.nodes[index]
        if node.op in PRODUCTS:
            others = [name for name in input_names(node)[:2] if name != weights]
            if len(others) == 1 and others[0] in graph.data:
                return Below(index, weights, axis)
            raise RefusedError(f"head mixing after the softmax ({describe(node)} with constant weights: talking heads)")
        if node.op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            raise RefusedError("its attention weights are quantized")
        if node.op in ("Cast", "Identity", "Dropout", "CastLike"):
            if (
                node.op == "Dropout"
                and len(node.outputs) > 1
                and any(graph.readers(n) for n in output_names(node)[1:] if n)
            ):
                raise RefusedError("the mask of a Dropout on its attention weights is read")
            if node.op == "Dropout" and not dropout_is_off(context, node):
                raise RefusedError("a Dropout in training mode acts on its attention weights")
            weights = node.outputs[0].name
            continue
        if is_view(node) and node.inputs[0].name == weights and len(node.outputs) == 1:
            axis = axis_through_view(context, node, axis)
            weights = node.outputs[0].name
            continue
        scaled = scalar_factor(graph, context.points, node)
        if scaled is not None and abs(scaled[1] - 1.0) < 1e-9:
            weights = node.outputs[0].name
            continue
        if node.op in ("Conv", "Concat"):
            raise RefusedError(f"head mixing after the softmax ({describe(node)})")
        raise RefusedError(f"its attention weights are altered by {describe(node)}")
    raise RefusedError("its attention weights pass through too many nodes")


def _nan_guard(graph: GraphView, weights: str, readers: Sequence[int]) -> str | None:
    """`Where(IsNaN(w), 0, w)`, which only acts where a whole row is masked."""
    kinds = {graph.nodes[i].op for i in readers}
    if not readers or not kinds <= {"IsNaN", "Where"} or "Where" not in kinds:
        return None
    wheres = [graph.nodes[i] for i in readers if graph.nodes[i].op == "Where"]
    checks = [graph.nodes[i] for i in readers if graph.nodes[i].op == "IsNaN"]
    if len(wheres) != 1 or len(checks) != 1:
        return None
    where, check = wheres[0], checks[0]
    condition, fill, kept = (tensor.name for tensor in where.inputs)
    alone = len(graph.readers(condition)) == 1
    if condition == check.outputs[0].name and kept == weights and fill not in graph.data and alone:
        return where.outputs[0].name
    return None
