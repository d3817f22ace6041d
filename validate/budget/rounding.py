"""Running fp16 and bf16 files on a CPU as a GPU would: every tensor rounded to its type.

ONNX Runtime's CPU provider has few fp16 and no bf16 kernels. It computes such nodes in fp32 and takes out the casts between
them, so that nothing is rounded and nothing overflows on the way: a file whose activations exceed 65504 passes there and is
garbage on a GPU. `round_everywhere` writes the casts down. Each operator computes in fp32 (as GPUs accumulate), and what it
hands on is rounded to the type that the file declares.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fna.errors import InputFileError
from fna.export.operators.registry import fna_nodes
from fna.export.passes.lower import lower
from fna.export.types import PRECISION_OF

LOW_TYPES = {kind: name for kind, name in PRECISION_OF.items() if name != "fp32"}
"""The types that are rounded to."""

_EXACT_OPERATORS = {
    "Reshape", "Transpose", "Identity", "Gather", "GatherElements", "GatherND", "Slice", "Concat", "Split", "Squeeze",
    "Unsqueeze", "Expand", "Flatten", "Tile", "Relu", "Max", "Min", "Where", "Neg", "Abs", "ScatterND",
    "ScatterElements", "MaxPool", "Pad", "DepthToSpace", "SpaceToDepth", "Dropout",
}  # fmt: skip
"""Operators whose results are values of their inputs, so rounding them again changes nothing."""


def has_low_types(model: ModelProto) -> bool:
    """Return whether the file holds fp16 or bf16 weights, inputs or casts to them."""
    tensors = any(tensor.data_type in LOW_TYPES for tensor in model.graph.initializer)
    inputs = any(value.type.tensor_type.elem_type in LOW_TYPES for value in model.graph.input)
    casts = any(
        attribute.name == "to" and attribute.i in LOW_TYPES
        for node in model.graph.node
        if node.op_type == "Cast"
        for attribute in node.attribute
    )
    return tensors or inputs or casts


def round_everywhere(model: ModelProto) -> ModelProto:
    """Return a model with fp32 inputs and outputs that computes in fp32 and rounds every fp16 and bf16 tensor of `model`.

    Names of tensors and nodes stay. The model must hold its own tensors (no external data).

    Raises:
        InputFileError: for low-precision tensors inside loops or branches, and where types cannot be inferred.
    """
    plain = lower(model, "portable") if any(True for _ in fna_nodes(model.graph)) else _copy(model)
    types = _tensor_types(plain)
    graph = plain.graph
    for tensor in graph.initializer:
        if tensor.data_type in LOW_TYPES:
            _widen(tensor)
    nodes: list[NodeProto] = []
    for value in graph.input:
        if value.type.tensor_type.elem_type in LOW_TYPES:
            nodes += _rounding_of_input(value, types[value.name], graph)
    for node in graph.node:
        nodes += _rounded(node, types)
    for value in graph.output:
        if value.type.tensor_type.elem_type in LOW_TYPES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return plain


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _tensor_types(model: ModelProto) -> dict[str, int]:
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # raises types of its own for malformed files
        raise InputFileError(f"the types of the file's tensors cannot be inferred: {error}") from None
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types.update((tensor.name, tensor.data_type) for tensor in graph.initializer)
    return types


def _widen(tensor: TensorProto) -> None:
    values = numpy_helper.to_array(tensor)
    if tensor.data_type == TensorProto.BFLOAT16:
        values = values.view(ml_dtypes.bfloat16) if values.dtype == np.uint16 else values
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _rounding_of_input(value: onnx.ValueInfoProto, kind: int, graph: GraphProto) -> list[NodeProto]:
    """An input keeps its name outside; inside, its readers get the rounded tensor."""
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    inside = f"{value.name}/rounded"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == value.name:
                node.input[index] = inside
    return _cast_pair(value.name, inside, kind)


def _rounded(node: NodeProto, types: dict[str, int]) -> list[NodeProto]:
    """The node with fp32 attributes, and after it the rounding of its outputs."""
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            _refuse_low_types(node, attribute)
        elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type in LOW_TYPES:
            _widen(attribute.t)
        elif attribute.name in ("to", "dtype") and attribute.i in LOW_TYPES:
            attribute.i = TensorProto.FLOAT
    if node.op_type in _EXACT_OPERATORS or node.op_type == "Constant":
        return [node]
    after: list[NodeProto] = []
    for index, name in enumerate(node.output):
        if types.get(name) in LOW_TYPES:
            node.output[index] = f"{name}/exact"
            after += _cast_pair(f"{name}/exact", name, types[name])
    return [node, *after]


def _cast_pair(source: str, target: str, kind: int) -> list[NodeProto]:
    low = f"{target}/low"
    return [
        helper.make_node("Cast", [source], [low], name=f"{low}/Cast", to=kind),
        helper.make_node("Cast", [low], [target], name=f"{target}/Cast", to=TensorProto.FLOAT),
    ]


def _refuse_low_types(node: NodeProto, attribute: AttributeProto) -> None:
    graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
    for graph in graphs:
        values = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)]
        values += [tensor.data_type for tensor in graph.initializer]
        if set(values) & set(LOW_TYPES):
            raise InputFileError(f"node {node.name!r} ({node.op_type}) computes in low precision inside its subgraph")
