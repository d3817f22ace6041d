"""Nodes written as expressions: what differs between opsets, constants, loops and names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from fna.errors import InvalidArgumentError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET, Builder

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)


def run(op: Builder, result: str, values: Any, rank: int) -> Any:
    graph = helper.make_graph(
        op.nodes,
        "test",
        [helper.make_tensor_value_info("values", TensorProto.FLOAT, values.shape)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [None] * rank)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", op.opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"values": values})[0]


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceSum", "ReduceSumSquare", "ReduceMean"])
@pytest.mark.parametrize("opset", OPSETS)
def test_axes_of_a_reduction_are_written_alike_at_every_opset(opset: int, op_type: str) -> None:
    op = Builder(opset)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = op.Unsqueeze(getattr(op, op_type)("values", axes=[1], keepdims=0), axes=[0])
    function = {
        "ReduceMax": np.max, "ReduceSum": np.sum, "ReduceMean": np.mean,
        "ReduceSumSquare": lambda array, axis: np.sum(array**2, axis),
    }[op_type]  # fmt: skip
    np.testing.assert_allclose(run(op, result, values, 2), function(values, 1)[None])


def test_equal_expressions_are_one_node() -> None:
    op = Builder(18)
    assert op.Add(op.Exp("values"), 1.0) == op.Add(op.Exp("values"), 1.0) != op.Add(op.Exp("values"), 2.0)
    assert [node.op_type for node in op.nodes] == ["Exp", "Constant", "Add", "Constant", "Add"]


def test_equal_constants_are_one_and_numbers_have_the_type_of_their_kind() -> None:
    op = Builder(18)
    scaled = op.Mul(op.Add("values", 2.0), 2.0)
    op.Gather(op.Shape(scaled), [0])
    op.Squeeze(scaled, axes=[0])
    constants = [node.attribute[0].t for node in op.nodes if node.op_type == "Constant"]
    assert [(tensor.data_type, list(tensor.dims)) for tensor in constants] == [
        (TensorProto.FLOAT, []),
        (TensorProto.INT64, [1]),
    ]


@pytest.mark.parametrize("opset", OPSETS)
def test_a_loop_uses_values_from_outside_it(opset: int) -> None:
    op = Builder(opset)
    doubled = op.Mul("values", 2.0)

    def step(op: Builder, _number: str, going: str, total: str) -> tuple[str, str]:
        return op.Identity(going), op.Add(total, op.Mul(doubled, 2.0))

    body = op.subgraph(
        step,
        {"number": ("INT64", []), "going": ("BOOL", []), "total": ("FLOAT", [3])},
        [("BOOL", []), ("FLOAT", [3])],
    )
    result = op.Loop(4, None, "values", body=body)
    np.testing.assert_array_equal(run(op, result, np.ones(3, np.float32), 1), [17.0] * 3)


def test_names_are_told_apart_and_kept() -> None:
    op = Builder(18, prefix="/blocks.3/")
    first, second = op.Softmax("values", name="core"), op.Exp("values", name="core")
    top, places = op.TopK(first, [1], outputs=2)
    assert (first, second) == ("/blocks.3/core", "/blocks.3/core_2")
    assert (top, places) == ("/blocks.3/TopK_0", "/blocks.3/TopK_1")


def test_types_that_are_known_need_no_cast() -> None:
    known, half, unknown = Builder(18, types={"query": 1}), Builder(18, types={"query": 10}), Builder(18)
    for op in (known, half, unknown):
        op.as_type_of(op.as_float("query"), "query")
    assert [[node.op_type for node in op.nodes] for op in (known, half, unknown)] == [
        [],
        ["Cast", "Cast"],
        ["Cast", "CastLike"],
    ]


def test_what_no_opset_has_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="opset 25 was asked for.*14 to 24"):
        Builder(25)
    with pytest.raises(AttributeError):
        Builder(18).softmax("values")
