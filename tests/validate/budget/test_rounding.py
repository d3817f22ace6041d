"""Low precision on a CPU: every tensor rounded to its type, which onnxruntime by itself does not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

from fna.errors import InputFileError
from fna.validate.budget.rounding import has_low_types, round_everywhere
from fna.validate.budget.runners import OnnxRunner

UP_AND_DOWN = """<ir_version: 8, opset_import: ["" : 18]>
g ({kind}[1,3,2,2] x, {kind}[1] c) => ({kind}[1,3,2,2] y) {{ a = Mul(x, c) y = Div(a, c) }}"""


def model_of(kind: str, factor: float) -> ModelProto:
    """`x * c / c`, with c a constant."""
    model = parser.parse_model(UP_AND_DOWN.format(kind=kind))
    types = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    value = torch.tensor([factor]).to(types[kind])
    raw = value.view(torch.int16).numpy().tobytes()
    element = TensorProto.FLOAT16 if kind == "float16" else TensorProto.BFLOAT16
    model.graph.initializer.append(helper.make_tensor("c", element, [1], raw, raw=True))
    del model.graph.input[1]
    return model


def run(model: ModelProto, pixels: np.ndarray) -> np.ndarray:
    return OnnxRunner(model, Path(), "test").run(pixels)["y"]


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_every_result_is_rounded_as_pytorch_rounds(kind: str, dtype: torch.dtype) -> None:
    pixels = torch.rand(1, 3, 2, 2)
    factor = torch.tensor([3.3]).to(dtype)
    expected = ((pixels.to(dtype) * factor) / factor).float().numpy()
    rounded = round_everywhere(model_of(kind, 3.3))
    np.testing.assert_array_equal(run(rounded, pixels.numpy()), expected)
    assert (expected != pixels.numpy()).any()
    assert not has_low_types(ModelProto())


def test_an_overflow_in_between_shows_although_onnxruntime_hides_it() -> None:
    model, pixels = model_of("float16", 1000.0), np.full((1, 3, 2, 2), 100.0, np.float32)
    assert np.isfinite(run(model, pixels)).all()
    assert np.isinf(run(round_everywhere(model), pixels)).all()


def test_names_stay_and_inputs_and_outputs_are_fp32() -> None:
    rounded = round_everywhere(model_of("float16", 2.0))
    assert [item.type.tensor_type.elem_type for item in (*rounded.graph.input, *rounded.graph.output)] == [1, 1]
    assert {"a", "y"} <= {name for node in rounded.graph.node for name in node.output}
    onnx.checker.check_model(rounded, full_check=True)


def test_an_fp32_model_has_no_low_types() -> None:
    model = parser.parse_model(UP_AND_DOWN.format(kind="float"))
    assert not has_low_types(model)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float16), "c"))
    assert has_low_types(model)


def test_low_precision_inside_a_loop_is_refused_by_name() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float16[1,3,2,2] x, bool b) => (float16[1,3,2,2] y) {
        y = If (b) <
            then_branch = t () => (float16[1,3,2,2] p) { p = Add(x, x) },
            else_branch = e () => (float16[1,3,2,2] q) { q = Mul(x, x) }
        >
    }"""
    model = parser.parse_model(text)
    model.graph.node[0].name = "choice"
    with pytest.raises(InputFileError, match="node 'choice' .If. computes in low precision inside its subgraph"):
        round_everywhere(model)
