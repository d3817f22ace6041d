"""Raising a file's opset keeps what its nodes compute, on onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from operator_files import run

from fna.errors import InvalidArgumentError
from fna.export.operators.registry import model_opset
from fna.export.passes.raise_opset import raise_opset


def one_node(opset: int, op_type: str, inputs: dict[str, Any], **attributes: Any) -> ModelProto:
    """A file whose input is `x` `[2, 4, 6, 6]`; further inputs are constants."""
    node = helper.make_node(op_type, ["x", *inputs], ["y"], name="node", **attributes)
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in inputs.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model.metadata_props.add(key="fna.source", value="test")
    return model


SIZES = np.array([2, 4, 9, 9], np.int64)
GRID = np.random.default_rng(1).uniform(-1, 1, (2, 5, 5, 2)).astype(np.float32)
CASES = {
    "mean over axes that were an attribute": one_node(14, "ReduceMean", {}, axes=[2, 3], keepdims=1),
    "largest": one_node(14, "ReduceMax", {}, axes=[1], keepdims=0),
    "resize": one_node(
        18, "Resize", {"roi": np.zeros(0, np.float32), "scales": np.zeros(0, np.float32), "sizes": SIZES},
        mode="cubic", coordinate_transformation_mode="half_pixel",
    ),
    "grid sample with a mode of the old name": one_node(16, "GridSample", {"grid": GRID}, mode="bilinear"),
    "softmax": one_node(14, "Softmax", {}, axis=-1),
    "average pool": one_node(14, "AveragePool", {}, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "group normalization, whose scale became one a channel": one_node(
        18, "GroupNormalization", {"s": np.array([1.5, 0.5], np.float32), "b": np.array([0.1, 0.2], np.float32)}, num_groups=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_raised_file_computes_the_same(name: str) -> None:
    model = CASES[name]
    raised = raise_opset(model, 23)
    assert model_opset(raised) == 23
    assert [(entry.key, entry.value) for entry in raised.metadata_props] == [("fna.source", "test")]
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(raised, {"x": x})[0], run(model, {"x": x})[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("opset", [14, 18])
def test_nodes_of_other_domains_and_references_to_weights_are_kept(opset: int) -> None:
    model = one_node(opset, "Add", {"w": np.ones(6, np.float32)})
    model.graph.node.append(helper.make_node("Custom", ["y"], ["z"], name="custom", domain="fna", scale=0.5))
    model.opset_import.append(helper.make_opsetid("fna", 2))
    model.graph.output[0].name = "z"
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.data"), ("offset", "0"), ("length", "24")):
        weights.external_data.add(key=key, value=value)
    raised = raise_opset(model, 23)
    assert {entry.domain: entry.version for entry in raised.opset_import} == {"": 23, "fna": 2}
    custom = next(node for node in raised.graph.node if node.domain == "fna")
    assert (custom.op_type, custom.name, custom.attribute[0].f) == ("Custom", "custom", 0.5)
    (kept,) = raised.graph.initializer
    assert {entry.key: entry.value for entry in kept.external_data}["location"] == "w.data"


def test_what_cannot_be_raised_is_refused_with_the_way_out() -> None:
    model = one_node(14, "NoSuchOperator", {})
    with pytest.raises(InvalidArgumentError, match="opset 14 cannot be raised to opset 23.*portable"):
        raise_opset(model, 23)
