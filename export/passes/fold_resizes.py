"""Resizing of constants, done when the file is written.

A model that takes images of several sizes resizes its position embedding as it runs; in a file of one size that is a constant.
TensorRT and TensorRT-RTX refuse to resize with antialiasing, as timm's models do it.
"""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from fna.runtime import open_session, run_session


def fold_constant_resizes(model: ModelProto) -> int:
    """Compute each Resize that depends on no input of the model, in place, by ONNX Runtime.

    Args:
        model: whose constants are in it, in types that ONNX Runtime resizes on a CPU: fp32.

    Returns:
        How many were computed.
    """
    graph = model.graph
    constant = _constant_nodes(graph)
    resized = [node.output[0] for node in constant if node.op_type == "Resize"]
    if not resized:
        return 0
    read = {name for node in constant for name in node.input}
    outputs = [helper.make_empty_tensor_value_info(name) for name in resized]
    stored = [tensor for tensor in graph.initializer if tensor.name in read]
    alone = helper.make_model(
        helper.make_graph(constant, "constants", [], outputs, stored),
        opset_imports=[imported for imported in model.opset_import if imported.domain == ""],
        ir_version=model.ir_version,
    )
    values = run_session(open_session(alone, name="the model's constants", once=True), {})
    for node in constant:
        if node.op_type == "Resize":
            graph.node.remove(node)
            graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
    _drop_unread(graph, [node for node in constant if node.op_type != "Resize"], read)
    return len(resized)


def _constant_nodes(graph: GraphProto) -> list[NodeProto]:
    """The nodes that lead to a Resize of a constant, in the graph's order."""
    makers: dict[str, set[int]] = {tensor.name: set() for tensor in graph.initializer}
    wanted: set[int] = set()
    for index, node in enumerate(graph.node):
        names = [name for name in node.input if name]
        if node.domain == "" and not node.op_type.startswith("Random") and all(name in makers for name in names):
            leading = {index}.union(*(makers[name] for name in names))
            makers.update(dict.fromkeys(node.output, leading))
            if node.op_type == "Resize":
                wanted |= leading
    return [graph.node[index] for index in sorted(wanted)]


def _drop_unread(graph: GraphProto, nodes: list[NodeProto], names: set[str]) -> None:
    """Remove those of the nodes, and then of the constants by name, that nothing reads any more."""
    for node in reversed(nodes):
        if not set(node.output) & _read(graph):
            graph.node.remove(node)
    unread = names - _read(graph)
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unread]:
        graph.initializer.remove(tensor)


def _read(graph: GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
