"""Above a softmax: from the scores to the product of queries and keys, through scales, masks and views.

What is neither understood nor provably without effect is a reason to refuse.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import MICROSOFT, STANDARD_DOMAINS, GraphView, input_names
from fna.export.surgery.recognise.context import PRODUCTS, Context, axis_through_view, describe, dropout_is_off
from fna.export.surgery.recognise.layout import is_view, scalar_factor, scalar_of, widens
from fna.export.surgery.recognise.masks import constant_mask_kind
from fna.export.surgery.recognise.products import mixes_heads, reaches_product
from fna.export.surgery.recognise.rows import RefusedError

NOT_A_MASK = "scores altered by"


@dataclass
class Above:
    """The product that the scores come from."""

    product: int
    scores: str
    axis: int
    factor: float


def walk_up(context: Context, scores: str, axis: int) -> Above | None:
    """Follow the scores to the product of queries and keys; None if they come from no product at all.

    Refusals carry the reason; the caller decides whether this softmax is attention.
    """
    graph = context.graph
    factor = 1.0
    for _ in range(64):
        node = graph.source(scores)
        if node is None:
            return None
        index = graph.producer[scores]
        op_type = node.op
        _check_single_reader(graph, scores)
        if op_type in PRODUCTS and node.domain in (*STANDARD_DOMAINS, MICROSOFT):
            return Above(index, scores, axis, factor)
        if op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise RefusedError("its scores are quantized (attention inside quantize/dequantize pairs)")
        if op_type in ("Cast", "Identity", "CastLike") or (op_type == "Dropout" and dropout_is_off(context, node)):
            if op_type == "Cast" and context.points[0].types.get(node.inputs[0].name) not in (1, 10, 11, 16):
                raise RefusedError(f"{NOT_A_MASK} {describe(node)}")
            scores = node.inputs[0].name
            continue
        if is_view(node):
            axis = axis_through_view(context, node, axis, upward=True)
            scores = node.inputs[0].name
            continue
        scaled = scalar_factor(graph, context.points, node)
        if scaled is not None:
            scores, number = scaled
            factor *= number
            continue
        if op_type in ("Mul", "Div"):
            raise RefusedError(_temperature_reason(context, node))
        if op_type == "Neg":
            scores, factor = node.inputs[0].name, -factor
            continue
        if op_type in ("Add", "Sub", "Sum", "BiasSoftmax"):
            scores = _through_addition(context, node)
            continue
        if op_type == "Where":
            scores = _through_where(context, node)
            continue
        if op_type in ("Max", "Clip", "Min"):
            scores = _through_clip(context, node)
            continue
        if op_type == "Tanh":
            raise RefusedError("its scores are capped by Tanh (softcap)")
        if op_type in ("Conv", "ConvTranspose"):
            raise RefusedError(f"head mixing before the softmax ({describe(node)}: talking heads)")
        if op_type == "Concat":
            raise RefusedError(f"its scores are joined with others ({describe(node)}: attention sink or bias token)")
        raise RefusedError(f"{NOT_A_MASK} {describe(node)}")
    raise RefusedError("its scores pass through too many nodes")


def _check_single_reader(graph: GraphView, scores: str) -> None:
    """Scores that something else needs would still be computed in full, so nothing would be gained."""
    if scores in graph.outputs:
        raise RefusedError("its scores are an output of the graph")
    harmless = ("Shape", "Size", "ReduceMax", "ReduceLogSumExp", "IsNaN", "CastLike")
    readers = [graph.nodes[i] for i in graph.readers(scores) if graph.nodes[i].op not in harmless]
    if len(readers) > 1:
        raise RefusedError(f"its scores are read by {' and '.join(sorted({describe(node) for node in readers}))}")


def _temperature_reason(context: Context, node: gs.Node) -> str:
    graph = context.graph
    constants = [name for name in input_names(node) if name not in graph.data]
    if not constants:
        return f"its scores are multiplied by a value that depends on data ({describe(node)})"
    shape = context.points[0].shapes.get(constants[0])
    if scalar_of(context.points[:1], graph, constants[0]) is not None:
        return f"its scale changes with the input's size ({describe(node)})"
    return f"its temperature is not one scalar (shape {list(shape or ())}: per head or learned, {describe(node)})"


def _through_addition(context: Context, node: gs.Node) -> str:
    """The operand of an addition that carries the scores, once the other is proven to be without effect."""
    graph = context.graph
    names = input_names(node)
    if node.op == "Sub":
        main, other = names
        source = graph.source(other)
        if source is not None and source.op == "ReduceMax" and source.inputs[0].name == main:
            return main
        candidates = [main]
    else:
        candidates = [name for name in names if name in graph.data and reaches_product(context, name)]
    if not candidates:
        if any(mixes_heads(context, name) for name in names):
            raise RefusedError(f"head mixing before the softmax ({describe(node)}: talking heads)")
        raise RefusedError(f"{NOT_A_MASK} {describe(node)}")
    if len(candidates) > 1:
        raise RefusedError(
            f"a position bias computed from the queries, or a second product, is added to its scores ({describe(node)})"
        )
    main = candidates[0]
    for other in names:
        if other == main:
            continue
        bounds = context.bounds.find(other)
        if bounds.single is not None and not widens(context.points, main, node.outputs[0].name):
            continue
        raise RefusedError(_mask_reason(context, other, node))
    return main


def _mask_reason(context: Context, mask: str, node: gs.Node) -> str:
    """Say what kind of mask or bias this is."""
    graph = context.graph
    if mask in graph.data:
        return f"its mask or bias depends on data ({describe(node)}: padding mask or position bias)"
    value = context.points[0].values.get(mask)
    if value is None:
        value = graph.constant(mask)
    return f"{constant_mask_kind(context, mask, value)} ({describe(node)})"


def _through_where(context: Context, node: gs.Node) -> str:
    graph = context.graph
    condition, yes, no = input_names(node)
    bounds = context.bounds.find(condition)
    chosen = yes if bounds.low > 0 else no if bounds.high == 0 else None
    if chosen is not None and not widens(context.points, chosen, node.outputs[0].name):
        return chosen
    fills = [name for name in (yes, no) if name not in graph.data]
    if fills and condition not in graph.data:
        value = context.points[0].values.get(condition)
        if value is None:
            value = graph.constant(condition)
        if value is not None and fills[0] == yes:
            value = ~value.astype(bool)
        raise RefusedError(f"{constant_mask_kind(context, condition, value)} ({describe(node)})")
    if condition in graph.data:
        raise RefusedError(f"its mask depends on data ({describe(node)}: padding mask)")
    raise RefusedError(f"{NOT_A_MASK} {describe(node)}")


def _through_clip(context: Context, node: gs.Node) -> str:
    """A lower limit at the type's lowest value, or an upper one at its highest, does nothing."""
    graph = context.graph
    names = [name for name in input_names(node) if name]
    data = [name for name in names if name in graph.data]
    if len(data) == 1:
        limits = [context.bounds.find(name) for name in names if name != data[0]]
        largest = 6.5e4 if context.points[0].types.get(data[0]) == 10 else 1e30
        harmless = {
            "Max": all(limit.high <= -largest for limit in limits),
            "Min": all(limit.low >= largest for limit in limits),
            "Clip": all(limit.high <= -largest or limit.low >= largest for limit in limits),
        }
        if harmless[node.op] and not widens(context.points, data[0], node.outputs[0].name):
            return data[0]
    raise RefusedError(f"{NOT_A_MASK} {describe(node)}")
