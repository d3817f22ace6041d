"""Files broken on purpose, one thing each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from fna.export.operators.registry import attach_functions
from fna.files import load_onnx


def break_file(source: Path, target: Path, change: Callable[[ModelProto], None]) -> Path:
    model = load_onnx(source)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def attention_node(model: ModelProto, block: int) -> NodeProto:
    return next(node for node in model.graph.node if node.name == f"/blocks.{block}/FastNystromAttention")


def swap_key_and_value(model: ModelProto, block: int) -> None:
    node = attention_node(model, block)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def change_scale(model: ModelProto, block: int) -> None:
    next(item for item in attention_node(model, block).attribute if item.name == "scale").f *= 1.1


def leave_out_an_iteration(model: ModelProto, block: int) -> None:
    next(item for item in attention_node(model, block).attribute if item.name == "iterations").i = 5
    attach_functions(model, onnx.TensorProto.FLOAT)


def change_weight(model: ModelProto, scope: str, factor: float) -> None:
    """Scale the weight of the linear layer of one module, a path such as `model.encoder.layer.1.mlp.fc1`."""
    for node in model.graph.node:
        scopes = next((entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes")), "")
        if node.op_type == "MatMul" and f"'{scope}'" in scopes:
            tensor = next(item for item in model.graph.initializer if item.name == node.input[1])
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((values * factor).astype(values.dtype), tensor.name))
            return
    raise AssertionError(f"no linear layer in {scope}")


def set_weight_to_nan(model: ModelProto, scope: str) -> None:
    change_weight(model, scope, float("nan"))
