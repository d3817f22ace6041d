"""Layer scale becomes part of the weights, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from fna.export.passes.fold_scales import fold_channel_scales
from fna.runtime import run_session

RANDOM = np.random.default_rng(0)
CONSTANTS = {
    "weight": RANDOM.standard_normal((4, 6), dtype=np.float32),
    "bias": RANDOM.standard_normal(6, dtype=np.float32),
    "scale": RANDOM.standard_normal(6, dtype=np.float32),
    "scalar": np.float32([0.5]),
}
TOKENS = RANDOM.standard_normal((2, 3, 4), dtype=np.float32)


def model_of(body: str, outputs: str = "float[2,3,6] out") -> ModelProto:
    """A graph of `tokens` with those of the constants that its body reads."""
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[2,3,4] tokens) => ({outputs}) {{ {body} }}'
    )
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in read
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: ModelProto) -> list[NDArray[np.float32]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(run_session(session, {"tokens": TOKENS}).values())


@pytest.mark.parametrize(
    "body",
    [
        "product = MatMul(tokens, weight) sum = Add(product, bias) out = Mul(sum, scale)",
        "product = MatMul(tokens, weight) sum = Add(bias, product) out = Mul(scale, sum)",
        "product = MatMul(tokens, weight) out = Mul(product, scale)",
    ],
)
def test_a_factor_behind_a_linear_layer_is_folded_and_the_result_stays(body: str) -> None:
    model = model_of(body)
    expected = run(model)
    assert fold_channel_scales(model.graph) == 1
    assert "Mul" not in [node.op_type for node in model.graph.node]
    assert "scale" not in [tensor.name for tensor in model.graph.initializer]
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model)[0], expected[0], rtol=1e-6, atol=1e-6)


def test_weights_that_another_layer_shares_are_not_changed_for_it() -> None:
    model = model_of(
        "product = MatMul(tokens, weight) sum = Add(product, bias) out = Mul(sum, scale)"
        " other_product = MatMul(tokens, weight) other = Add(other_product, bias)",
        "float[2,3,6] out, float[2,3,6] other",
    )
    expected = run(model)
    assert fold_channel_scales(model.graph) == 1
    for actual, reference in zip(run(model), expected, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("product = MatMul(tokens, weight) out = Mul(product, scalar)", "float[2,3,6] out"),
        ("product = MatMul(tokens, weight) out = Mul(product, scale)", "float[2,3,6] out, float[2,3,6] product"),
        (
            "product = MatMul(tokens, weight) once = Mul(product, scale) out = Add(once, product)",
            "float[2,3,6] out",
        ),
        ("product = MatMul(tokens, weight) bent = Relu(product) out = Mul(bent, scale)", "float[2,3,6] out"),
    ],
    ids=["a scalar", "the product is an output", "the product is read again", "not right behind the layer"],
)
def test_everything_else_is_left_as_it_was(body: str, outputs: str) -> None:
    model = model_of(body, outputs)
    before = model.SerializeToString()
    assert fold_channel_scales(model.graph) == 0
    assert model.SerializeToString() == before
