"""Exact attention as PyTorch's exporter writes it, MatMul, Softmax, MatMul, made ONNX Attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_SAME_RANK = ("Slice", "Split", "Cast", "Concat", "Gather")
"""Operators through which a value keeps the axes that its Transpose gave it; Gather with a list of indices does."""
_HEADS_FIRST = 4


@dataclass(frozen=True)
class ExactAttention:
    """One exact attention; `replaced`, up to `last`, become one node."""

    query: str  # [B, H, N, D]
    key: str  # [B, H, N, D], or [B, H, D, N] where `swap` is set
    value: str  # [B, H, N, D]
    scale: float
    swap: bool
    last: NodeProto
    replaced: tuple[NodeProto, ...]


SWAP_HEADS = [0, 2, 1, 3]
"""The Transpose between `[B, N, H, D]` and `[B, H, N, D]`, either way."""


def swaps_heads(node: NodeProto | None) -> bool:
    """Whether a Transpose is there and takes heads to where tokens were."""
    return node is not None and list(node.attribute[0].ints) == SWAP_HEADS


class GraphIndex:
    """Who makes each value, who reads it first, and how many do."""

    def __init__(self, graph: GraphProto) -> None:
        self.makers = {output: node for node in graph.node for output in node.output}
        self.first_reader = {name: node for node in reversed(graph.node) for name in node.input}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self.readers.update(value.name for value in graph.output)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def made_by(self, value: str, op_type: str) -> NodeProto | None:
        """Return the node that makes a value if it is a standard operator of that kind."""
        node = self.makers.get(value)
        return node if node is not None and node.domain == "" and node.op_type == op_type else None

    def only_reader(self, value: str, op_type: str) -> NodeProto | None:
        """Return the node of that kind that alone reads a value."""
        reader = self.first_reader.get(value)
        return reader if self.readers[value] == 1 and reader is not None and reader.op_type == op_type else None

    def past_casts(self, value: str, gone: list[NodeProto]) -> str:
        """Follow a value back through Casts that nothing else reads."""
        while (cast := self.made_by(value, "Cast")) is not None and self.readers[value] == 1:
            gone.append(cast)
            value = cast.input[0]
        return value

    def number(self, value: str) -> float | None:
        """Return a constant of one element as a number."""
        tensor = self.constants.get(value)
        if tensor is None or tensor.data_location == TensorProto.EXTERNAL or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).astype(np.float64).reshape(()))

    def is_four_dimensional(self, value: str) -> bool:
        """Whether a value has the axes of heads, by what made it."""
        node = self.makers.get(value)
        while node is not None and node.op_type in _SAME_RANK:
            node = self.makers.get(node.input[0])
        if node is None:
            return False
        if node.op_type == "Attention":
            return True
        return node.op_type == "Transpose" and len(node.attribute[0].ints) == _HEADS_FIRST


def fuse_exact_attention(graph: GraphProto) -> int:
    """Replace, in place, each exact attention without a bias by one ONNX Attention in the type of its query; softmax stays fp32.

    Args:
        graph: of opset 23 or later, traced by this project: attention blocks are `softmax(q @ k) @ v` over `[B, H, N, D]`.

    Returns:
        How many were replaced.
    """
    index = GraphIndex(graph)
    found = find_exact_attention(graph, index)
    for match in found:
        replace_nodes(graph, index, match.replaced, _attention(match))
    return len(found)


def decompose_exact_attention(graph: GraphProto, types: Mapping[str, int]) -> int:
    """Replace, in place, each exact attention with Casts around its softmax by Mul, MatMul, Softmax, MatMul in one type.

    That is what TensorRT fuses where it has no attention operator: "Constructing an attention graph using primitive INetwork
    layers", the scale on the queries before the first product ("Fused Attention" in its documentation). Its kernel's softmax is fp32.

    Args:
        graph: traced by this project, as of `fuse_exact_attention`, of any opset.
        types: ONNX element types by value.

    Returns:
        How many were replaced. Without Casts they have that form already.
    """
    index = GraphIndex(graph)
    found = [
        match
        for match in find_exact_attention(graph, index)
        if types.get(match.query) and any(node.op_type == "Cast" for node in match.replaced)
    ]
    for match in found:
        replace_nodes(graph, index, match.replaced, _products(graph, match, types[match.query]))
    return len(found)


def find_exact_attention(graph: GraphProto, index: GraphIndex) -> list[ExactAttention]:
    """Return each exact attention without a bias."""
    return [match for node in graph.node if node.op_type == "Softmax" and (match := _match(index, node))]


def _match(graph: GraphIndex, softmax: NodeProto) -> ExactAttention | None:
    gone: list[NodeProto] = [softmax]
    scores = graph.past_casts(softmax.input[0], gone)
    product = graph.made_by(scores, "MatMul")
    last = _reader_past_casts(graph, softmax, gone)
    if product is None or last is None or graph.readers[scores] != 1 or not _is_last_axis(softmax):
        return None
    query, query_scale = _unscaled(graph, product.input[0])
    key, key_scale = _unscaled(graph, product.input[1])
    value = last.input[1]
    if not graph.is_four_dimensional(value) or not graph.is_four_dimensional(query):
        return None
    straight = _before_swap(graph, key)
    return ExactAttention(
        query, straight or key, value, query_scale * key_scale, straight is None, last, (*gone, product, last)
    )


def _reader_past_casts(graph: GraphIndex, softmax: NodeProto, gone: list[NodeProto]) -> NodeProto | None:
    """Return the MatMul whose first operand a softmax is, through Casts."""
    value = softmax.output[0]
    while graph.readers[value] == 1:
        reader = graph.first_reader.get(value)
        if reader is None:
            return None
        if reader.op_type == "MatMul" and reader.input[0] == value:
            return reader
        if reader.op_type != "Cast":
            return None
        gone.append(reader)
        value = reader.output[0]
    return None


def _is_last_axis(softmax: NodeProto) -> bool:
    axes = [attribute.i for attribute in softmax.attribute if attribute.name == "axis"]
    return axes in ([], [-1], [_HEADS_FIRST - 1])


def _unscaled(graph: GraphIndex, value: str) -> tuple[str, float]:
    """Return what a value is a constant multiple of, and the factor."""
    product = graph.made_by(value, "Mul")
    factor = None if product is None else graph.number(product.input[1])
    return (value, 1.0) if product is None or factor is None else (product.input[0], factor)


def _before_swap(graph: GraphIndex, value: str) -> str | None:
    """Return the `[B, H, N, D]` whose last axes were swapped: by one Transpose, or between two Reshapes, over `[B * H, N, D]`."""
    swap = graph.made_by(value, "Transpose")
    if swap is not None and list(swap.attribute[0].ints) == [0, 1, 3, 2]:
        return str(swap.input[0])
    outer = graph.made_by(value, "Reshape")
    swap = None if outer is None else graph.made_by(outer.input[0], "Transpose")
    inner = None if swap is None else graph.made_by(swap.input[0], "Reshape")
    if swap is None or inner is None or list(swap.attribute[0].ints) != [0, 2, 1]:
        return None
    return str(inner.input[0]) if graph.is_four_dimensional(inner.input[0]) else None


def _attention(match: ExactAttention) -> list[NodeProto]:
    nodes = []
    key, name = match.key, match.last.name or match.last.output[0]
    if match.swap:
        key = f"{match.last.output[0]}/keys"
        nodes.append(helper.make_node("Transpose", [match.key], [key], name=f"{name}/keys", perm=[0, 1, 3, 2]))
    nodes.append(
        helper.make_node(
            "Attention", [match.query, key, match.value], [match.last.output[0]], name=name,
            scale=match.scale, softmax_precision=TensorProto.FLOAT,
        )
    )  # fmt: skip
    return nodes


def _products(graph: GraphProto, match: ExactAttention, kind: int) -> list[NodeProto]:
    name, output = match.last.name or match.last.output[0], match.last.output[0]
    graph.initializer.append(helper.make_tensor(f"{output}/scale", kind, [], [match.scale]))
    keys = match.key if match.swap else f"{output}/keys"
    swap = helper.make_node("Transpose", [match.key], [keys], name=f"{name}/keys", perm=[0, 1, 3, 2])
    return [
        helper.make_node("Mul", [match.query, f"{output}/scale"], [f"{output}/queries"], name=f"{name}/queries"),
        *([] if match.swap else [swap]),
        helper.make_node("MatMul", [f"{output}/queries", keys], [f"{output}/scores"], name=f"{name}/scores"),
        helper.make_node("Softmax", [f"{output}/scores"], [f"{output}/weights"], name=f"{name}/weights", axis=-1),
        helper.make_node("MatMul", [f"{output}/weights", match.value], [output], name=name),
    ]


def replace_nodes(
    graph: GraphProto, index: GraphIndex, replaced: Sequence[NodeProto], nodes: Sequence[NodeProto]
) -> None:
    """Put nodes where the last of others was, in place, and remove those with all that nothing else reads."""
    gone = {old.output[0] for old in replaced}
    kept: list[NodeProto] = []
    for node in graph.node:
        if not gone & set(node.output[:1]):
            kept.append(NodeProto.FromString(node.SerializeToString()))
        elif node.output[0] == replaced[-1].output[0]:
            kept.extend(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    for old in replaced:
        for operand in old.input:
            _remove_unread(graph, index, operand)


def _remove_unread(graph: GraphProto, index: GraphIndex, value: str) -> None:
    """Remove what makes a value that nothing reads any more."""
    if any(value in node.input for node in graph.node) or any(output.name == value for output in graph.output):
        return
    makers = [node for node in graph.node if list(node.output) == [value]]
    for node in makers:
        operands = list(node.input)
        graph.node.remove(node)
        for operand in operands:
            _remove_unread(graph, index, operand)
