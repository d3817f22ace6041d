"""Focal attention as an operator of this project's own in onnxruntime: one node a block, compiled for the processor.

The library that has it is `fna.plugins.processor_library`; sessions must be given it.
"""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import fna_nodes, node_attributes
from fna.export.passes.fuse_exact import GraphIndex
from fna.export.types import tensor_types

PROCESSOR_DOMAIN = "fna.processor"
"""Another one than the operators of files have: these nodes run with the library alone."""

_SWAP_HEADS = [0, 2, 1, 3]
_ATTRIBUTES = ("scale", "prefix_tokens", "hot")


def name_processor_kernels(model: ModelProto) -> ModelProto:
    """Return a copy in which focal attention in fp32 is `fna.processor::FocalAttention`; the functions stay.

    Args:
        model: whose `fna` nodes have functions. Nodes of other types stay as they are.
    """
    types = tensor_types(model)
    named = ModelProto()
    named.CopyFrom(model)
    index = GraphIndex(named.graph)
    found = [
        node
        for node in fna_nodes(named.graph)
        if FOCAL_ATTENTION.is_called_by(node) and types.get(node.input[0]) == TensorProto.FLOAT
    ]
    for node in found:
        attributes = {name: value for name, value in node_attributes(node).items() if name in _ATTRIBUTES}
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        node.domain = PROCESSOR_DOMAIN
        node.ClearField("overload")
        _take_heads_last(named.graph, index, node)
    if found:
        named.opset_import.append(helper.make_opsetid(PROCESSOR_DOMAIN, 1))
    return named


def _take_heads_last(graph: GraphProto, index: GraphIndex, node: NodeProto) -> None:
    """Let a node read its queries and write its result as `[B, N, H, D]` where they are turned around it.

    Keys and values stay turned: the kernel reads them again and again, and they are better close together.
    """
    before = index.made_by(node.input[0], "Transpose")
    if before is not None and list(before.attribute[0].ints) == _SWAP_HEADS:
        node.attribute.append(helper.make_attribute("query_heads_last", 1))
        node.input[0] = before.input[0]
    after = index.only_reader(node.output[0], "Transpose")
    if after is not None and list(after.attribute[0].ints) == _SWAP_HEADS:
        node.attribute.append(helper.make_attribute("out_heads_last", 1))
        node.output[0] = after.output[0]
        graph.node.remove(after)
    if before is not None and not any(before.output[0] in other.input for other in graph.node):
        graph.node.remove(before)
