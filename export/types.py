"""Number types in ONNX: those of each precision, and those of a file's tensors, by ONNX's inference, for files of any size."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

from fna.precision import Precision

ONNX_TYPES: dict[Precision, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
PRECISION_OF: dict[int, Precision] = {kind: name for name, kind in ONNX_TYPES.items()}

_SMALL = 4096
"""Bytes; tensors up to this size may hold shapes, which inference reads."""


def infer_types(model: ModelProto) -> GraphProto:
    """Return the graph, without its larger weights, as inference annotates it.

    Inference copies the model into one message of at most 2 GiB, and needs no weights.
    """
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    for tensor in skeleton.graph.initializer:
        if len(tensor.raw_data) > _SMALL:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left-out")
    return onnx.shape_inference.infer_shapes(skeleton).graph


def static_shapes(values: Iterable[ValueInfoProto]) -> dict[str, list[int]]:
    """Return the sides of each value by its name, 0 for those that are open."""
    return {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in values}


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every tensor whose type is known, by name."""
    graph = infer_types(model)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}
