"""Which nodes of an ONNX file belong to which transformer block.

A block runs from where the residual stream enters it to where it enters the next. The attention operators are anchors: an
`fna` node, a softmax whose result is multiplied, or the standard `Attention`. Between two anchors the stream's last
tensor that everything passes through, and that also flows past the next attention, is where the next block begins.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from onnx import GraphProto, ModelProto, NodeProto

from fna.errors import InvalidArgumentError
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import approximating_operators, is_attention

_SHAPE_ONLY = ("Shape", "Size")
_PRODUCTS = ("MatMul", "Einsum", "FusedMatMul")
_PASSED = ("Cast", "Dropout", "Identity", "Where", "Reshape", "QuantizeLinear", "DequantizeLinear")

_BLOCK_IN_NAME = re.compile(r"^/blocks\.(\d+)/|/fna_block_(\d+)(?:/|$)")
"""As `traced_node_name` and `grafted_node_name` write it; `fna.export.passes.lower` puts the names of inlined nodes behind it."""
_SCOPES = "pkg.torch.onnx.name_scopes"
"""The node metadata in which PyTorch's exporter writes the modules that a node comes from, the outermost first."""

Consumers = dict[str, list[int]]
"""Indices of the nodes that use a tensor's values, by its name."""


def traced_node_name(block: int, op_type: str) -> str:
    """Return the name of an `fna` node of a traced file."""
    return f"/blocks.{block}/{op_type}"


def grafted_node_name(attention: str, block: int) -> str:
    """Return the name of the `fna` node that takes the place of the node named `attention`."""
    return f"{attention}/fna_block_{block}"


def block_of_name(name: str) -> int | None:
    """Return the block number that a node's name holds, as the functions above write it; None where it holds none."""
    match = _BLOCK_IN_NAME.search(name)
    return int(match[1] or match[2]) if match else None


def attention_block(node: NodeProto) -> int | None:
    """Return the block number of an FNA or focal node, or of a node inlined from one of a traced file. None for others."""
    match = _BLOCK_IN_NAME.search(node.name)
    if match is None:
        return None
    step = node.name[match.end() :].partition("/")[0]
    wanted = approximating_operators() if match[1] else ("",)
    return block_of_name(node.name) if step in wanted else None


def module_scopes(node: NodeProto) -> list[str]:
    """Return the paths of the modules that a node of a trace comes from, the outermost first; none where a tool dropped them."""
    written = next((noted.value for noted in node.metadata_props if noted.key == _SCOPES), "[]")
    try:
        return [str(scope) for scope in ast.literal_eval(written)]
    except (ValueError, SyntaxError):
        return []


def block_ends(model: ModelProto, num_blocks: int) -> dict[int, str]:
    """Return the tensor in which each block ends: the residual stream that enters the next block.

    A last block whose end cannot be told from what comes after it is left out.

    Args:
        model: with its nodes in topological order.
        num_blocks: attention blocks, as the file's plan counts them.

    Raises:
        InvalidArgumentError: if the file does not hold that many attention operators.
    """
    nodes = list(model.graph.node)
    _, ends = _borders(nodes, _consumers(model.graph), num_blocks)
    return {block: nodes[end].output[0] for block, end in enumerate(ends) if end is not None}


def find_blocks(model: ModelProto, num_blocks: int) -> dict[str, int]:
    """Return the block number of each output tensor of a node; tensors outside all blocks are left out.

    Args:
        model: with its nodes in topological order.
        num_blocks: attention blocks, as the file's plan counts them.

    Raises:
        InvalidArgumentError: if the file does not hold that many attention operators.
    """
    nodes = list(model.graph.node)
    consumers = _consumers(model.graph)
    starts, ends = _borders(nodes, consumers, num_blocks)
    return {
        name: block
        for block, (start, end) in enumerate(zip(starts, ends, strict=True))
        for index in _between(nodes, consumers, start, end)
        for name in nodes[index].output
    }


def _borders(
    nodes: Sequence[NodeProto], consumers: Consumers, num_blocks: int
) -> tuple[list[int | None], list[int | None]]:
    """The nodes that write the residual stream that enters each block, and that leaves it."""
    attention_ends = [_attention_end(node, index, nodes, consumers) for index, node in enumerate(nodes)]
    anchors = sorted({index for index in attention_ends if index is not None})
    if len(anchors) != num_blocks:
        raise InvalidArgumentError(
            f"the file's plan has {num_blocks} attention blocks, but {len(anchors)} attention operators are recognised in it, so "
            "blocks cannot be told apart"
        )
    starts = [
        _stream_before(nodes, consumers, left, right) for left, right in zip([None, *anchors], anchors, strict=False)
    ]
    return starts, [*starts[1:], _stream_after(nodes, consumers, anchors, starts)]


def _attention_end(node: NodeProto, index: int, nodes: Sequence[NodeProto], consumers: Consumers) -> int | None:
    """The node in which attention that starts at `node` ends: itself, or where the softmax meets the values."""
    ours = is_attention(node.domain, node.op_type)
    if ours or (node.domain != DOMAIN and node.op_type == "Attention"):
        return index
    if node.op_type != "Softmax":
        return None
    waiting = [(index, 0)]
    while waiting:
        place, depth = waiting.pop(0)
        for follower in _next(nodes, consumers, place):
            if nodes[follower].op_type in _PRODUCTS:
                return follower
            if nodes[follower].op_type in _PASSED and depth < 4:
                waiting.append((follower, depth + 1))
    return None


def _consumers(graph: GraphProto) -> Consumers:
    """Indices of the nodes that use a tensor's values; those that use its shape alone do not count."""
    consumers: Consumers = {}
    for index, node in enumerate(graph.node):
        if node.op_type not in _SHAPE_ONLY:
            for name in dict.fromkeys(node.input):
                consumers.setdefault(name, []).append(index)
    return consumers


def _next(nodes: Sequence[NodeProto], consumers: Consumers, index: int) -> list[int]:
    return [follower for name in nodes[index].output for follower in consumers.get(name, [])]


def _reached(nodes: Sequence[NodeProto], consumers: Consumers, start: int, without: int | None = None) -> set[int]:
    reached, waiting = set(), [start]
    while waiting:
        for follower in _next(nodes, consumers, waiting.pop()):
            if follower not in reached and follower != without:
                reached.add(follower)
                waiting.append(follower)
    return reached


def _leading_to(nodes: Sequence[NodeProto], consumers: Consumers, target: int) -> set[int]:
    producers = {name: index for index, node in enumerate(nodes) for name in node.output}
    leading, waiting = set(), [target]
    while waiting:
        node = nodes[waiting.pop()]
        for name in node.input:
            index = producers.get(name)
            if index is not None and index not in leading and nodes[index].op_type not in _SHAPE_ONLY:
                leading.add(index)
                waiting.append(index)
    return leading


def _bottlenecks(nodes: Sequence[NodeProto], consumers: Consumers, path: Sequence[int], target: int) -> list[int]:
    """Nodes of `path`, in order, that everything on it passes through on its way to `target`."""
    inside, furthest, bottlenecks = {*path, target}, -1, []
    for index in path:
        if furthest <= index:
            bottlenecks.append(index)
        furthest = max([furthest, *(follower for follower in _next(nodes, consumers, index) if follower in inside)])
    return bottlenecks


def _stream_before(nodes: Sequence[NodeProto], consumers: Consumers, left: int | None, right: int) -> int | None:
    """The node whose output is the residual stream that enters the block of attention `right`."""
    leading = _leading_to(nodes, consumers, right)
    path = sorted(leading if left is None else leading & _reached(nodes, consumers, left))
    for index in reversed(_bottlenecks(nodes, consumers, path, right)):
        if any(not nodes[other].output or other > right for other in _reached(nodes, consumers, index, without=right)):
            return index
    return None


def _stream_after(
    nodes: Sequence[NodeProto], consumers: Consumers, anchors: Sequence[int], starts: Sequence[int | None]
) -> int | None:
    """The end of the last block: the bottleneck at the same place behind its attention as in the block before."""
    last = anchors[-1]
    behind = sorted(_reached(nodes, consumers, last))
    if len(anchors) == 1 or starts[-1] is None:
        return None
    before = sorted(_leading_to(nodes, consumers, anchors[-1]) & _reached(nodes, consumers, anchors[-2]))
    places = _bottlenecks(nodes, consumers, before, anchors[-1])
    place = places.index(starts[-1])
    bottlenecks = _bottlenecks(nodes, consumers, behind, len(nodes))
    same = [index for index in bottlenecks[place:] if nodes[index].op_type == nodes[starts[-1]].op_type]
    return same[0] if same else None


def _between(nodes: Sequence[NodeProto], consumers: Consumers, start: int | None, end: int | None) -> list[int]:
    """The nodes after the block's first tensor up to its last."""
    if start is None:
        reached = set(range(len(nodes)))
    else:
        reached = _reached(nodes, consumers, start)
    if end is None:
        return sorted(reached)
    return sorted((reached & _leading_to(nodes, consumers, end)) | {end})
