"""8 bits for the linear layers: what is quantised, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from tiny_files import SIDE

from fna.errors import InvalidArgumentError
from fna.export.metadata import read_metadata
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.passes.precision import cast_model
from fna.export.passes.quantize import quantize_model
from fna.export.preprocessing import Preprocessing, bundled_photographs
from fna.export.types import tensor_types
from fna.files import load_onnx, save_model
from fna.runtime import open_session, run_session

Find = Callable[[str], Path]


@pytest.fixture(scope="module")
def pixels() -> list[NDArray[np.float32]]:
    """Photographs, in the preprocessing of the tiny model."""
    return [Preprocessing().apply(image, SIDE, SIDE)[None] for _, image in bundled_photographs()]


def outputs_of(path: Path, image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = open_session(path)
    return list(run_session(session, {session.get_inputs()[0].name: image}).values())


def relative_error(wanted: list[NDArray[np.float32]], found: list[NDArray[np.float32]]) -> float:
    return max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in zip(wanted, found, strict=True))


def types_by_operator(model: ModelProto, op_type: str) -> set[int]:
    types = tensor_types(model)
    return {types[node.input[0]] for node in model.graph.node if node.op_type == op_type}


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_int8_is_for_linear_layers_and_costs_little(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]], name: str
) -> None:
    source = load_onnx(tiny_file(name))
    model = quantize_model(source, pixels).model
    save_model(model, tmp_path / "int8.onnx")
    producers = {value: node for node in model.graph.node for value in node.output}
    quantized = [
        node
        for node in model.graph.node
        if any(producers[value].op_type == "DequantizeLinear" for value in node.input if value in producers)
        and node.op_type != "Shape"
    ]
    assert {node.op_type for node in quantized} <= {"MatMul", "Gemm"}
    assert len(quantized) == 24  # query, key, value, projection and two of the MLP, in four blocks
    zero_points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name in zero_points]
    assert all(array.dtype == np.int8 and not array.any() for array in values)  # TensorRT takes symmetric ones only
    error = relative_error(outputs_of(tiny_file(name), pixels[0]), outputs_of(tmp_path / "int8.onnx", pixels[0]))
    assert 1e-4 < error < 3e-2
    assert read_metadata(model, name).quantized == "int8"


def test_int8_and_fp16_together_keep_quantised_products_whole(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]]
) -> None:
    model = cast_model(quantize_model(load_onnx(tiny_file("grafted")), pixels).model, "fp16")
    producers = {value: node for node in model.graph.node for value in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    for node in products:
        kinds = {producers[value].op_type for value in node.input if value in producers}
        assert "DequantizeLinear" not in kinds or kinds == {"DequantizeLinear"}
    assert types_by_operator(model, FAST_NYSTROM_ATTENTION.name) == {TensorProto.FLOAT16}
    save_model(model, tmp_path / "both.onnx")
    error = relative_error(outputs_of(tiny_file("grafted"), pixels[0]), outputs_of(tmp_path / "both.onnx", pixels[0]))
    assert error < 3e-2


def test_int8_without_photographs_is_refused(tiny_file: Find) -> None:
    with pytest.raises(InvalidArgumentError, match="give --images"):
        quantize_model(load_onnx(tiny_file("traced")), [])
