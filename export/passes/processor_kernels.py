"""FNA and focal attention as operators of this project's own in onnxruntime: one node a block, compiled for the processor.

The library that has them is `fna.plugins.processor_library`; sessions must be given it.
"""

from __future__ import annotations

from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from fna.chebyshev import chebyshev_coefficients
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION, core_of
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import node_attributes, node_inputs
from fna.export.passes.fuse_exact import GraphIndex, swaps_heads
from fna.export.types import tensor_types
from fna.plan import ITERATIONS_OF_VERSION_1

PROCESSOR_DOMAIN = "fna.processor"
"""Another one than the operators of files have: these nodes run with the library alone."""


def name_processor_kernels(model: ModelProto) -> ModelProto:
    """Return the model with attention in fp32 that the library has in its domain, a copy where there is any; the functions stay.

    Args:
        model: whose `fna` nodes have functions. Nodes of other types or in bodies, and FNA with a key mask, stay as they are.
    """
    if not any(_has_kernel(node) for node in model.graph.node):
        return model  # without inference, which opening every other file would wait for
    types = tensor_types(model)
    named = ModelProto()
    named.CopyFrom(model)
    index = GraphIndex(named.graph)
    nodes = list(named.graph.node)
    found = [node for node in nodes if _has_kernel(node) and types.get(node.input[0]) == TensorProto.FLOAT]
    has_bodies = any(attribute.type == AttributeProto.GRAPH for node in nodes for attribute in node.attribute)
    for node in found:
        attributes = _kernel_attributes(node)
        del node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        node.domain = PROCESSOR_DOMAIN
        node.ClearField("overload")
        if not has_bodies:  # which could read what is turned
            _take_heads_last(named.graph, index, node)
    if found:
        named.opset_import.append(helper.make_opsetid(PROCESSOR_DOMAIN, 1))
    return named


def _has_kernel(node: NodeProto) -> bool:
    return FOCAL_ATTENTION.is_called_by(node) or (
        FAST_NYSTROM_ATTENTION.is_called_by(node) and "key_mask" not in node_inputs(node)
    )


def _kernel_attributes(node: NodeProto) -> dict[str, Any]:
    given = node_attributes(node)
    if FOCAL_ATTENTION.is_called_by(node):
        return {name: given[name] for name in ("scale", "prefix_tokens", "hot") if name in given}
    attributes = {name: given[name] for name in ("scale", "exact_rows") if name in given}
    core = core_of(given)
    if core is None:
        return attributes | {"iterations": given.get("iterations", ITERATIONS_OF_VERSION_1)}
    alphas, betas = zip(*chebyshev_coefficients(core.steps, core.low), strict=True)
    return attributes | {"alphas": alphas, "betas": betas}


def _take_heads_last(graph: GraphProto, index: GraphIndex, node: NodeProto) -> None:
    """Let a node read its queries and write its result as `[B, N, H, D]` where they are turned around it.

    Keys and values stay turned: the kernel reads them again and again, and they are better close together.
    """
    before = index.made_by(node.input[0], "Transpose")
    if before is not None and swaps_heads(before):
        node.attribute.append(helper.make_attribute("query_heads_last", 1))
        node.input[0] = before.input[0]
        index.readers[before.output[0]] -= 1
        if not index.readers[before.output[0]]:
            graph.node.remove(before)
    after = index.only_reader(node.output[0], "Transpose")
    if after is not None and swaps_heads(after):
        node.attribute.append(helper.make_attribute("out_heads_last", 1))
        node.output[0] = after.output[0]
        graph.node.remove(after)
