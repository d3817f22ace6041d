"""The body of FocalAttention on onnxruntime, against its PyTorch twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.passes.lower import lower
from fna.focal import focal_attention
from fna.focal_keys import focal_keys

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)
LEVELS = ((1, 0), (2, 1), (4, 3))
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def focal_model(opset: int, element: int = TensorProto.FLOAT, *, mask: bool = False, **attributes: Any) -> ModelProto:
    inputs = dict.fromkeys(("query", "key", "value"), element)
    inputs |= dict.fromkeys(("tile_queries", "tile_keys"), TensorProto.INT32)
    inputs |= {"tile_bias": TensorProto.FLOAT, "places": TensorProto.INT32}
    if mask:
        inputs["key_mask"] = TensorProto.INT32
    settings = {"scale": 0.25, "prefix_tokens": 1, "hot": 3} | attributes
    return one_node_model(FOCAL_ATTENTION, inputs, {"out": element}, opset, element, **settings)


def focal_inputs(prefix: int = 1, element: int = TensorProto.FLOAT) -> dict[str, Any]:
    torch.manual_seed(5)
    tokens = prefix + 7 * 9
    tensors = {name: torch.randn(2, 3, tokens, 16).numpy().astype(NUMPY[element]) for name in ("query", "key", "value")}
    lists = focal_keys((7, 9), prefix, 4, LEVELS, 2)
    return tensors | {
        "tile_queries": lists.queries,
        "tile_keys": lists.keys,
        "tile_bias": lists.bias,
        "places": lists.places,
    }


def twin(inputs: dict[str, Any], *, prefix: int = 1, hot: int = 3, mask: Any = None) -> Any:
    query, key, value = (torch.from_numpy(inputs[name]) for name in ("query", "key", "value"))
    return focal_attention(
        query, key, value, patches=(7, 9), prefix_tokens=prefix, tile=4, levels=LEVELS, hot=hot, seed=2, scale=0.25,
        key_mask=None if mask is None else torch.from_numpy(mask),
    ).numpy()  # fmt: skip


@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("opset", OPSETS)
def test_body_equals_pytorch_inlined_or_not(opset: int, hot: int) -> None:
    model, inputs = focal_model(opset, hot=hot), focal_inputs()
    for form in (model, lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs)[0], twin(inputs, hot=hot), rtol=0, atol=2e-6)


@pytest.mark.parametrize("prefix", [0, 5])
def test_prefix_tokens_are_those_of_the_attribute(prefix: int) -> None:
    inputs = focal_inputs(prefix)
    out = run(focal_model(18, prefix_tokens=prefix), inputs)[0]
    np.testing.assert_allclose(out, twin(inputs, prefix=prefix), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 2], ids=["mask of all images", "a mask an image"])
def test_masked_tokens_are_keys_of_nobody(rows: int) -> None:
    inputs = focal_inputs()
    mask = (np.random.default_rng(1).random((rows, 64)) < 0.3).astype(np.int32)
    out = run(focal_model(18, mask=True), inputs | {"key_mask": mask})[0]
    np.testing.assert_allclose(out, twin(inputs, mask=mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("opset", [14, 18, 24])
def test_half_precision_is_computed_in_fp32_inside(opset: int) -> None:
    inputs = focal_inputs(element=TensorProto.FLOAT16)
    out = run(focal_model(opset, TensorProto.FLOAT16), inputs)[0]
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, twin(inputs), rtol=2e-3, atol=2e-3)
