"""Files of one node of domain `fna`, and running them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, helper

from fna.export.operators.record import Operator
from fna.export.operators.registry import attach_functions

_RANKS = {"query": 4, "key": 4, "value": 4, "out": 4, "hidden": 3, "features": 3, "places": 1}


def one_node_model(
    operator: Operator,
    inputs: dict[str, int],
    outputs: dict[str, int],
    opset: int,
    element: int = TensorProto.FLOAT,
    **settings: Any,
) -> ModelProto:
    """A file with one node of ours and its function, checked; every tensor's sizes are open.

    Args:
        operator: whose node it is.
        inputs: ONNX type of each, by name.
        outputs: likewise.
        opset: version of the standard operators.
        element: the type that the body is written for.
        settings: the node's attributes.
    """
    node = operator.make_node(list(inputs), list(outputs), f"/blocks.3/{operator.name}", **settings)
    graph = helper.make_graph(
        [node], "test", [_open(*named) for named in inputs.items()], [_open(*named) for named in outputs.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    attach_functions(model, element)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto, inputs: dict[str, Any], library: Path | None = None) -> list[Any]:
    """The file's outputs on onnxruntime, with a library of operators where it needs one."""
    options = onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    outputs: list[Any] = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)
    return outputs


def _open(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [f"{name}{axis}" for axis in range(_RANKS.get(name, 2))])
