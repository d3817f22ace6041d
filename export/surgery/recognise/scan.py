"""The table of a file: every attention block in it, what it is, and whether FNA can stand for it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_graphsurgeon as gs

from fna.export.blocks import module_scopes
from fna.export.surgery.graph.files import node_proto, one_line
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import (
    STANDARD_DOMAINS,
    GraphView,
    input_names,
    output_names,
    subgraphs,
)
from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.patterns import PATTERNS, unknown_attention
from fna.export.surgery.recognise.rows import Decision, RefusedError, Row

MALFORMED = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, ZeroDivisionError)
"""What reading a graph that breaks the rules of ONNX (missing inputs, attributes of other types) ends in."""


def scan(graph: GraphView, points: list[ShapePoint]) -> list[Row]:
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


def _row_for(context: Context, index: int, node: gs.Node, block: int) -> Row | None:
    pattern = next((pattern for pattern in PATTERNS if pattern.starts_at(node)), None)
    if pattern is None:
        return None
    family = node.op if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op}"
    row = Row(block, block_name(node), family, index, Decision.ELIGIBLE)
    try:
        row.attention = pattern.read(context, node, row)
    except RefusedError as error:
        row.decision, row.reason = Decision.REFUSED, str(error)
    except MALFORMED as error:
        row.decision = Decision.REFUSED
        row.reason = f"the graph around it is malformed ({type(error).__name__}: {one_line(error)})"
    if row.attention is None:
        return None if row.decision is Decision.ELIGIBLE else row
    attention = row.attention
    row.heads, row.head_size, row.tokens, row.scale = (
        attention.heads,
        attention.head_size,
        attention.tokens,
        attention.scale,
    )
    return row


def _rows_in_body(body: gs.Graph, owner: gs.Node, anchor: int, block: int) -> Iterator[Row]:
    """Attention in the body of an If, Loop or Scan is listed and refused."""
    products = {
        name for node in body.nodes if node.op in ("MatMul", "Einsum", "FusedMatMul") for name in input_names(node)
    }
    for node in body.nodes:
        softmax = node.op == "Softmax" and any(name in products for name in output_names(node))
        if softmax or unknown_attention.PATTERN.starts_at(node):
            yield Row(
                block, block_name(node), node.op, anchor, Decision.REFUSED,
                f"it lies in the body of {owner.op} {owner.name!r}",
            )  # fmt: skip
            block += 1
        for inner in subgraphs(node):
            for row in _rows_in_body(inner, node, anchor, block):
                yield row
                block += 1


def block_name(node: gs.Node) -> str:
    """The module path that an exporter left in a node's name or metadata; else the node's name."""
    modules = [scope for scope in module_scopes(node_proto(node))[:-1] if scope]
    if modules:
        return modules[-1]
    name = node.name or (node.outputs[0].name if node.outputs else node.op)
    head, _, _ = name.rpartition("/")
    return head.strip("/") if re.search(r"\w", head) else name
