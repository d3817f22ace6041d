"""The table of a file: every attention block in it, what it is, and whether FNA can stand for it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from onnx import GraphProto, NodeProto

from fna.export.blocks import module_scopes
from fna.export.operators.functions import ATTENTION, MASKED_ATTENTION
from fna.export.surgery.graph.index import MICROSOFT, STANDARD_DOMAINS, Graph, attribute, one_line, subgraphs
from fna.export.surgery.graph.shapes import Point
from fna.export.surgery.recognise.fused import identify_fused, is_fused_attention
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.match import Context, find_core
from fna.export.surgery.recognise.rows import Attention, Decision, RefusedError, Row

OUR_DOMAIN = "fna"
MALFORMED = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError)
"""What reading a graph that breaks the rules of ONNX (missing inputs, attributes of other types) ends in."""


def scan(graph: Graph, points: list[Point]) -> list[Row]:
    """Find every attention block, in the order of computation."""
    context = Context(graph, points)
    rows: list[Row] = []
    for index, node in enumerate(graph.nodes):
        if index not in graph.live:
            continue
        row = _row_for(context, index, node, len(rows))
        if row is not None:
            rows.append(row)
        for body in subgraphs(node):
            rows.extend(_rows_in_body(body, node, index, len(rows)))
    return rows


def _row_for(context: Context, index: int, node: NodeProto, block: int) -> Row | None:
    name = block_name(node)
    if node.domain == OUR_DOMAIN and node.op_type in (ATTENTION, MASKED_ATTENTION):
        family, reason = ("FNA", "it is FNA") if node.op_type == ATTENTION else ("masked", "its keys are masked")
        row = Row(block, name, family, index, Decision.KEPT, f"{reason} already")
        row.scale = float(attribute(node, "scale", 0.0))
        shape = context.points[0].shapes.get(node.input[0])
        if shape is not None and len(shape) == 4:
            row.heads, row.head_size, row.tokens = shape[1], shape[3], (shape[2],)
        return row
    family = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
    row = Row(block, name, family, index, Decision.ELIGIBLE)
    try:
        if is_fused_attention(node):
            _fill(row, identify_fused(context, node, f"{name}/fna_{block}"))
            return row
        anchor = _softmax_at(context, node)
        if anchor is None:
            return None
        scores, axis = anchor
        rank = len(context.points[0].shapes.get(node.output[0]) or ())
        if rank == 0:
            core = find_core_without_shapes(context, node)
            if not core:
                return None
            raise RefusedError(f"the shape of {node.output[0]!r} could not be inferred")
        core_found = find_core(context, scores, node.output[0], axis % rank)
        if core_found is None:
            return None
        row.family = core_found.family
        row.scale = core_found.scale
        _fill(row, identify(context, core_found))
    except RefusedError as error:
        row.decision, row.reason = Decision.REFUSED, str(error)
    except MALFORMED as error:
        row.decision = Decision.REFUSED
        row.reason = f"the graph around it is malformed ({type(error).__name__}: {one_line(error)})"
    return row


def find_core_without_shapes(context: Context, node: NodeProto) -> bool:
    """Whether a softmax whose shape is unknown has a product right above and below it."""
    above = context.graph.source(node.input[0])
    below = [context.graph.nodes[i].op_type for i in context.graph.readers(node.output[0])]
    return above is not None and above.op_type in ("MatMul", "Add", "Div", "Mul", "Where") and "MatMul" in below


def _fill(row: Row, found: Attention) -> None:
    row.attention = found
    row.heads, row.head_size, row.tokens, row.scale = found.heads, found.head_size, found.tokens, found.scale


def _softmax_at(context: Context, node: NodeProto) -> tuple[str, int] | None:
    """The scores and the axis of a softmax, spelt as one operator or as exp / sum(exp)."""
    if node.op_type == "Softmax" and node.domain in STANDARD_DOMAINS:
        return node.input[0], int(attribute(node, "axis", -1))
    if node.op_type == "BiasSoftmax" and node.domain == MICROSOFT:
        if context.bounds.find(node.input[1]).single is None:
            raise RefusedError("a mask or position bias is added to its scores (BiasSoftmax)")
        return node.input[0], -1
    if node.op_type == "Exp" and node.domain in STANDARD_DOMAINS:
        return _exponential_of_logarithm(context, node)
    if node.op_type != "Div" or node.domain not in STANDARD_DOMAINS:
        return None
    above, below = (context.graph.source(name) for name in node.input)
    if above is None or below is None or above.op_type != "Exp":
        return None
    if below.op_type in ("Add", "Max", "Clip") and above.op_type == "Exp":
        inner = next((context.graph.source(n) for n in below.input if n in context.graph.data), None)
        if inner is not None and inner.op_type == "ReduceSum" and inner.input[0] == above.output[0]:
            raise RefusedError("its softmax has something added to the sum of exponentials")
        return None
    if below.op_type != "ReduceSum" or below.input[0] != above.output[0] or not attribute(below, "keepdims", 1):
        return None
    axis = _single_axis(context, below)
    return None if axis is None else (above.input[0], axis)


def _single_axis(context: Context, node: NodeProto) -> int | None:
    """The axis of a reduction over one axis that keeps it."""
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1:
        value = context.points[0].values.get(node.input[1])
        axes = None if value is None else value.reshape(-1).tolist()
    if axes is None or len(axes) != 1 or not attribute(node, "keepdims", 1):
        return None
    return int(axes[0])


def _exponential_of_logarithm(context: Context, node: NodeProto) -> tuple[str, int] | None:
    """`exp(log_softmax(x))` and `exp(x - logsumexp(x))`."""
    above = context.graph.source(node.input[0])
    if above is None:
        return None
    if above.op_type == "LogSoftmax":
        return above.input[0], int(attribute(above, "axis", -1))
    if above.op_type == "Sub":
        total = context.graph.source(above.input[1])
        if total is not None and total.op_type == "ReduceLogSumExp" and total.input[0] == above.input[0]:
            axis = _single_axis(context, total)
            return None if axis is None else (above.input[0], axis)
    return None


def _rows_in_body(body: GraphProto, owner: NodeProto, anchor: int, block: int) -> Iterator[Row]:
    """Attention in the body of an If, Loop or Scan is listed and refused."""
    products = {
        name for node in body.node if node.op_type in ("MatMul", "Einsum", "FusedMatMul") for name in node.input
    }
    for node in body.node:
        softmax = node.op_type == "Softmax" and any(name in products for name in node.output)
        if softmax or is_fused_attention(node):
            yield Row(
                block, block_name(node), node.op_type, anchor, Decision.REFUSED,
                f"it lies in the body of {owner.op_type} {owner.name!r}",
            )  # fmt: skip
            block += 1
        for inner in subgraphs(node):
            for row in _rows_in_body(inner, node, anchor, block):
                yield row
                block += 1


def block_name(node: NodeProto) -> str:
    """The module path that an exporter left in a node's name or metadata; else the node's name."""
    modules = [scope for scope in module_scopes(node)[:-1] if scope]
    if modules:
        return modules[-1]
    name = node.name or (node.output[0] if node.output else node.op_type)
    head, _, _ = name.rpartition("/")
    return head.strip("/") if re.search(r"\w", head) else name
