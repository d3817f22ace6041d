"""Putting new nodes into a graph and taking out what nothing needs any more, by onnx-graphsurgeon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs
from onnx import NodeProto, TensorProto
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from fna.export.surgery.graph.files import import_model, original_model
from fna.export.surgery.graph.view import GraphView, input_names, output_names


def insert_nodes(
    view: GraphView, inserted: Mapping[int, Sequence[NodeProto]], initializers: Mapping[str, TensorProto]
) -> gs.Graph:
    """Return a new graph in which the node at each index of `inserted` gives way to others, which write its result.

    Args:
        view: the graph as it was read; it stays as it is.
        inserted: new nodes by the index of the node whose place they take.
        initializers: constants that the new nodes read.
    """
    graph = import_model(original_model(view.graph), view.folder)
    idle = [node for index, node in enumerate(graph.nodes) if index not in view.live]
    tensors = graph.tensors()
    tensors |= {name: OnnxImporter.import_tensor(tensor) for name, tensor in initializers.items()}
    nodes: list[gs.Node] = []
    for index, node in enumerate(graph.nodes):
        if index not in inserted:
            nodes.append(node)
            continue
        # further outputs of a fused operator are not read
        node.inputs.clear()
        node.outputs.clear()
        nodes += [wire(new, tensors, graph) for new in inserted[index]]
    graph.nodes = nodes
    remove_unneeded(graph, idle)
    _sort(graph)
    return graph


def wire(node: NodeProto, tensors: dict[str, gs.Tensor], graph: gs.Graph) -> gs.Node:
    """Make a node of a graph that reads and writes `tensors`; those that are new are added to them."""
    wired = OnnxImporter.import_node(node, {}, tensors, graph.opset, graph.import_domains)
    vars(wired)["original"] = node
    return wired


def remove_unneeded(graph: gs.Graph, idle: Sequence[gs.Node]) -> None:
    """Remove what no output needs, but of `idle`, which nothing needed before, only what lost its inputs.

    Bodies and functions stay as they are.
    """
    view = GraphView(graph)
    known = {tensor.name for tensor in graph.inputs} | {
        name for name, tensor in view.tensors.items() if isinstance(tensor, gs.Constant)
    }
    known.update(name for index in view.live for name in output_names(view.nodes[index]))
    kept = []
    for node in idle:
        if all(not name or name in known for name in input_names(node)) and node.outputs:
            known.update(output_names(node))
            kept += [tensor for tensor in node.outputs if tensor.name]
    outputs = list(graph.outputs)
    graph.outputs = [*outputs, *kept]
    graph.cleanup(recurse_subgraphs=False, recurse_functions=False)
    graph.outputs = outputs


def _sort(graph: gs.Graph) -> None:
    """Sort by levels where a new node stands before what it reads; an order that is valid stays as it is."""
    known: set[str] = set()
    written = {name for node in graph.nodes for name in output_names(node)}
    for node in graph.nodes:
        if any(name in written and name not in known for name in input_names(node) if name):
            graph.toposort(recurse_subgraphs=False, recurse_functions=False)
            return
        known.update(output_names(node))
