"""The body of FastNystromAttention on onnxruntime, against its PyTorch twin; with masked keys: tests/export/test_masking.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.attention import fast_nystrom_attention
from fna.errors import InvalidArgumentError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import attach_functions, fna_nodes
from fna.export.passes.lower import lower
from fna.plan import ITERATIONS_OF_VERSION_1

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def attention_model(
    opset: int, element: int = TensorProto.FLOAT, *, typed: bool = True, **attributes: Any
) -> ModelProto:
    inputs = dict.fromkeys(("query", "key", "value"), element)
    inputs |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT}
    settings = {"scale": 0.25, "exact_rows": 1} | attributes
    body = element if typed else TensorProto.UNDEFINED
    return one_node_model(FAST_NYSTROM_ATTENTION, inputs, {"out": element}, opset, body, **settings)


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
def test_body_equals_pytorch_inlined_or_not(opset: int, exact_rows: int, rows: int) -> None:
    model = attention_model(opset, exact_rows=exact_rows)
    inputs = attention_inputs(rows)
    expected = twin(inputs, exact_rows=bool(exact_rows))
    for form in (model, lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs)[0], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("typed", [True, False], ids=["typed body", "body for any type"])
@pytest.mark.parametrize("opset", [15, 18, 24])
def test_half_precision_is_computed_in_fp32_inside(opset: int, typed: bool) -> None:
    inputs = attention_inputs(2, TensorProto.FLOAT16)
    out = run(attention_model(opset, TensorProto.FLOAT16, typed=typed), inputs)[0]
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, twin(inputs, exact_rows=True), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_iterations_are_those_of_the_attribute(iterations: int) -> None:
    inputs = attention_inputs(1)
    out = run(attention_model(18, iterations=iterations), inputs)[0]
    np.testing.assert_allclose(out, twin(inputs, exact_rows=True, iterations=iterations), rtol=0, atol=2e-5)


def test_a_node_without_iterations_has_those_of_the_first_files() -> None:
    model = attention_model(18)
    (node,) = fna_nodes(model.graph)
    kept = [attribute for attribute in node.attribute if attribute.name != "iterations"]
    assert len(kept) == len(node.attribute) - 1
    del node.attribute[:]
    node.attribute.extend(kept)
    attach_functions(model, TensorProto.FLOAT)
    inputs = attention_inputs(1)
    expected = twin(inputs, exact_rows=True, iterations=ITERATIONS_OF_VERSION_1)
    np.testing.assert_allclose(run(model, inputs)[0], expected, rtol=0, atol=2e-5)


def two_block_model(first: dict[str, Any], second: dict[str, Any]) -> ModelProto:
    model = attention_model(18, **first)
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "/blocks.4/fna", "middle", "out"
    model.graph.node[0].output[0] = "middle"
    for key, value in second.items():
        next(attribute for attribute in again.attribute if attribute.name == key).i = value
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
        np.testing.assert_allclose(run(form, inputs)[0], expected, rtol=0, atol=4e-5)


def test_blocks_that_need_the_same_body_share_it() -> None:
    model = two_block_model({}, {})
    assert len(model.functions) == 1
    assert model.functions[0].overload == ""


def test_opset_14_needs_to_know_the_type() -> None:
    with pytest.raises(InvalidArgumentError, match="CastLike"):
        attention_model(14, typed=False)
