"""The ONNX function bodies on onnxruntime, against their PyTorch twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from fna.attention import fast_nystrom_attention
from fna.errors import InvalidArgumentError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.functions import (
    ATTENTION,
    DOMAIN,
    FARTHEST_POINTS,
    NORM_GRID,
    PLUGIN_FIELDS,
    FunctionVariant,
    attach_functions,
    fna_nodes,
    make_function,
)
from fna.export.passes.lower import lower
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def attention_model(
    opset: int, element: int = TensorProto.FLOAT, *, typed: bool = True, **attributes: Any
) -> ModelProto:
    names = ("query", "key", "value")
    inputs = [helper.make_tensor_value_info(name, element, ["B", "H", "N", "D"]) for name in names]
    inputs.append(helper.make_tensor_value_info("landmarks", TensorProto.INT32, ["L", "S"]))
    inputs.append(helper.make_tensor_value_info("landmark_bias", TensorProto.FLOAT, ["L", "S"]))
    output = helper.make_tensor_value_info("out", element, ["B", "H", "N", "D"])
    settings = {"scale": 0.25, "iterations": 6, "exact_rows": 1} | PLUGIN_FIELDS | attributes
    node = helper.make_node(
        ATTENTION, [value.name for value in inputs], ["out"], name="/blocks.3/fna", domain=DOMAIN, **settings
    )
    return finish(node, inputs, [output], opset, element if typed else TensorProto.UNDEFINED)


def sampler_model(op_type: str, opset: int, **attributes: Any) -> ModelProto:
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["B", "N", "C"])
    output = helper.make_tensor_value_info("landmarks", TensorProto.INT32, ["B", "S"])
    node = helper.make_node(
        op_type, ["features"], ["landmarks"], name=f"/blocks.3/{op_type}", domain=DOMAIN, **attributes
    )
    return finish(node, [features], [output], opset, TensorProto.FLOAT)


def finish(node: onnx.NodeProto, inputs: list[Any], outputs: list[Any], opset: int, element: int) -> ModelProto:
    graph = helper.make_graph([node], "test", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    attach_functions(model, element)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto, inputs: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)[0]


def attention_inputs(rows: int, element: int = TensorProto.FLOAT) -> dict[str, Any]:
    tensors = {name: torch.randn(2, 3, 37, 16).numpy().astype(NUMPY[element]) for name in ("query", "key", "value")}
    landmarks = torch.stack([torch.randperm(37)[:9] for _ in range(rows)]).int().numpy()
    return tensors | {"landmarks": landmarks, "landmark_bias": torch.rand(rows, 9).numpy()}


def twin(inputs: dict[str, Any], **settings: Any) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return fast_nystrom_attention(
        tensors["query"], tensors["key"], tensors["value"], tensors["landmarks"],
        landmark_bias=tensors["landmark_bias"], scale=0.25, **settings,
    ).numpy()  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2], ids=["shared landmarks", "landmarks per item"])
@pytest.mark.parametrize("exact_rows", [0, 1])
@pytest.mark.parametrize("opset", OPSETS)
def test_attention_body_equals_pytorch_inlined_or_not(opset: int, exact_rows: int, rows: int) -> None:
    model = attention_model(opset, exact_rows=exact_rows)
    inputs = attention_inputs(rows)
    expected = twin(inputs, exact_rows=bool(exact_rows))
    for form in (model, lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("typed", [True, False], ids=["typed body", "body for any type"])
@pytest.mark.parametrize("opset", [15, 18, 24])
def test_half_precision_is_computed_in_fp32_inside(opset: int, typed: bool) -> None:
    inputs = attention_inputs(2, TensorProto.FLOAT16)
    out = run(attention_model(opset, TensorProto.FLOAT16, typed=typed), inputs)
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, twin(inputs, exact_rows=True), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_iterations_are_those_of_the_attribute(iterations: int) -> None:
    inputs = attention_inputs(1)
    out = run(attention_model(18, iterations=iterations), inputs)
    np.testing.assert_allclose(out, twin(inputs, exact_rows=True, iterations=iterations), rtol=0, atol=2e-5)


@pytest.mark.parametrize("opset", OPSETS)
def test_farthest_points_equal_pytorchs_ties_included(opset: int) -> None:
    features = torch.randn(2, 50, 6)
    features[1, 20:40] = features[1, :20]
    model = sampler_model(FARTHEST_POINTS, opset, num_landmarks=24, **PLUGIN_FIELDS)
    expected = farthest_points_reference(features, 24).numpy()
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(run(form, {"features": features.numpy()}), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 50])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_norm_grid_equals_pytorchs(prefix: int, count: int) -> None:
    features = torch.randn(3, 50, 6)
    model = sampler_model(NORM_GRID, 18, num_landmarks=count, prefix_tokens=prefix)
    expected = norm_grid_reference(features, count, prefix).numpy()
    np.testing.assert_array_equal(run(model, {"features": features.numpy()}), expected)


@pytest.mark.parametrize("opset", OPSETS)
def test_norm_grid_body_exists_for_every_opset(opset: int) -> None:
    features = torch.randn(1, 40, 6)
    model = sampler_model(NORM_GRID, opset, num_landmarks=12, prefix_tokens=1)
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(
            run(form, {"features": features.numpy()}), norm_grid_reference(features, 12, 1).numpy()
        )


def two_block_model(first: dict[str, Any], second: dict[str, Any]) -> ModelProto:
    model = attention_model(18, **first)
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "/blocks.4/fna", "middle", "out"
    model.graph.node[0].output[0] = "middle"
    for key, value in second.items():
        next(item for item in again.attribute if item.name == key).i = value
    model.graph.node.append(again)
    attach_functions(model, TensorProto.FLOAT)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_blocks_that_need_different_bodies_live_in_one_file() -> None:
    model = two_block_model({"iterations": 2, "exact_rows": 0}, {"iterations": 6, "exact_rows": 1})
    assert len({node.overload for node in fna_nodes(model.graph)}) == 2
    inputs = attention_inputs(1)
    middle = twin(inputs, iterations=2)
    expected = twin(inputs | {"query": middle}, exact_rows=True)
    for form in (model, lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs), expected, rtol=0, atol=4e-5)


def test_blocks_that_need_the_same_body_share_it() -> None:
    model = two_block_model({}, {})
    assert len(model.functions) == 1
    assert model.functions[0].overload == ""


@pytest.mark.parametrize("opset", [13, 25])
def test_other_opsets_are_refused_by_number(opset: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"opset {opset}.*14 to 24"):
        make_function(FunctionVariant(ATTENTION, TensorProto.FLOAT), opset)


def test_opset_14_needs_to_know_the_type() -> None:
    with pytest.raises(InvalidArgumentError, match="CastLike"):
        make_function(FunctionVariant(ATTENTION), 14)
