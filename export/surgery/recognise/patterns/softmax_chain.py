"""A softmax between two products, spelt as one operator or as exp(x) / sum(exp(x)): what exporters write without fusion."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import MICROSOFT, STANDARD_DOMAINS, attribute, input_names
from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.match import find_core
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Attention, RefusedError, Row


def read(context: Context, node: gs.Node, row: Row) -> Attention | None:
    """Find the products above and below a softmax; None where it is no attention."""
    anchor = _softmax_at(context, node)
    if anchor is None:
        return None
    scores, axis = anchor
    result = node.outputs[0].name
    rank = len(context.points[0].shapes.get(result) or ())
    if rank == 0:
        if not _stands_between_products(context, node):
            return None
        raise RefusedError(f"the shape of {result!r} could not be inferred")
    core = find_core(context, scores, result, axis % rank)
    if core is None:
        return None
    row.family, row.scale = core.family, core.scale
    return identify(context, core)


def _stands_between_products(context: Context, node: gs.Node) -> bool:
    """Whether a softmax whose shape is unknown has a product right above and below it."""
    above = context.graph.source(node.inputs[0].name)
    below = [context.graph.nodes[i].op for i in context.graph.readers(node.outputs[0].name)]
    return above is not None and above.op in ("MatMul", "Add", "Div", "Mul", "Where") and "MatMul" in below


def _softmax_at(context: Context, node: gs.Node) -> tuple[str, int] | None:
    """The scores and the axis of a softmax, spelt as one operator or as exp / sum(exp)."""
    if node.op == "Softmax" and node.domain in STANDARD_DOMAINS:
        return node.inputs[0].name, int(attribute(node, "axis", -1))
    if node.op == "BiasSoftmax" and node.domain == MICROSOFT:
        if context.bounds.find(node.inputs[1].name).single is None:
            raise RefusedError("a mask or position bias is added to its scores (BiasSoftmax)")
        return node.inputs[0].name, -1
    if node.op == "Exp" and node.domain in STANDARD_DOMAINS:
        return _exponential_of_logarithm(context, node)
    if node.op != "Div" or node.domain not in STANDARD_DOMAINS:
        return None
    above, below = (context.graph.source(name) for name in input_names(node))
    if above is None or below is None or above.op != "Exp":
        return None
    if below.op in ("Add", "Max", "Clip") and above.op == "Exp":
        inner = next((context.graph.source(n) for n in input_names(below) if n in context.graph.data), None)
        if inner is not None and inner.op == "ReduceSum" and inner.inputs[0].name == above.outputs[0].name:
            raise RefusedError("its softmax has something added to the sum of exponentials")
        return None
    if below.op != "ReduceSum" or below.inputs[0].name != above.outputs[0].name or not attribute(below, "keepdims", 1):
        return None
    axis = _single_axis(context, below)
    return None if axis is None else (above.inputs[0].name, axis)


def _single_axis(context: Context, node: gs.Node) -> int | None:
    """The axis of a reduction over one axis that keeps it."""
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        value = context.points[0].values.get(node.inputs[1].name)
        axes = None if value is None else value.reshape(-1).tolist()
    if axes is None or len(axes) != 1 or not attribute(node, "keepdims", 1):
        return None
    return int(axes[0])


def _exponential_of_logarithm(context: Context, node: gs.Node) -> tuple[str, int] | None:
    """`exp(log_softmax(x))` and `exp(x - logsumexp(x))`."""
    above = context.graph.source(node.inputs[0].name)
    if above is None:
        return None
    if above.op == "LogSoftmax":
        return above.inputs[0].name, int(attribute(above, "axis", -1))
    if above.op == "Sub":
        total = context.graph.source(above.inputs[1].name)
        if total is not None and total.op == "ReduceLogSumExp" and total.inputs[0].name == above.inputs[0].name:
            axis = _single_axis(context, total)
            return None if axis is None else (above.inputs[0].name, axis)
    return None


PATTERN = AttentionPattern("softmax", lambda node: node.op in ("Softmax", "BiasSoftmax", "Exp", "Div"), read)
