"""The bodies with ONNX Attention inside, lowered and run on onnxruntime, against their PyTorch twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.attention import fast_nystrom_attention
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.registry import model_opset
from fna.export.passes.lower import lower
from fna.focal import focal_attention
from fna.focal_keys import focal_keys
from fna.special_tokens import masked_attention

NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
TOLERANCE = {TensorProto.FLOAT: 2e-5, TensorProto.FLOAT16: 4e-3}
SCALE = 0.25
every_type = pytest.mark.parametrize("element", NUMPY, ids=["fp32", "fp16"])
every_opset = pytest.mark.parametrize("opset", [18, 23, 24])


def attention_tensors(element: int, tokens: int = 37) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    return {
        name: generator.standard_normal((2, 3, tokens, 16)).astype(NUMPY[element]) for name in ("query", "key", "value")
    }


def check_fused(model: ModelProto, inputs: dict[str, Any], expected: Any, element: int, attentions: int) -> None:
    fused = lower(model, "fused")
    assert model_opset(fused) == max(23, model_opset(model))
    assert [node.domain for node in fused.graph.node if node.domain] == []
    assert sum(node.op_type == "Attention" for node in fused.graph.node) == attentions
    (out,) = run(fused, inputs)
    assert out.dtype == NUMPY[element]
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE[element])


def as_fp32(inputs: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


@every_type
@every_opset
@pytest.mark.parametrize("landmarks", [1, 9])
@pytest.mark.parametrize("mask", [None, "hidden", "sink"])
def test_fast_nystrom_attention_equals_pytorch(opset: int, element: int, landmarks: int, mask: str | None) -> None:
    generator = np.random.default_rng(4)
    inputs = attention_tensors(element)
    inputs["landmarks"] = np.stack([generator.permutation(37)[:landmarks] for _ in range(2)]).astype(np.int32)
    inputs["landmark_bias"] = generator.random((2, landmarks), np.float32)
    kinds = dict.fromkeys(("query", "key", "value"), element)
    kinds |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT}
    settings: dict[str, Any] = {"scale": SCALE, "iterations": 6, "exact_rows": 1}
    tensors = as_fp32(inputs)
    more: dict[str, Any] = {}
    if mask is not None:
        inputs["key_mask"] = (generator.random((2, 37)) < 0.2).astype(np.int32)
        kinds["key_mask"] = TensorProto.INT32
        settings["sink"] = int(mask == "sink")
        more = {"key_mask": torch.from_numpy(inputs["key_mask"]), "sink": mask == "sink"}
    expected = fast_nystrom_attention(
        tensors["query"], tensors["key"], tensors["value"], tensors["landmarks"],
        landmark_bias=tensors["landmark_bias"], scale=SCALE, exact_rows=True, **more,
    )  # fmt: skip
    model = one_node_model(FAST_NYSTROM_ATTENTION, kinds, {"out": element}, opset, element, **settings)
    check_fused(model, inputs, expected.numpy(), element, attentions=2)


@every_type
@every_opset
@pytest.mark.parametrize("sink", [False, True])
def test_masked_attention_equals_pytorch(opset: int, element: int, sink: bool) -> None:
    inputs = attention_tensors(element)
    inputs["key_mask"] = (np.random.default_rng(5).random((1, 37)) < 0.2).astype(np.int32)
    kinds = dict.fromkeys(("query", "key", "value"), element) | {"key_mask": TensorProto.INT32}
    model = one_node_model(MASKED_ATTENTION, kinds, {"out": element}, opset, element, scale=SCALE, sink=int(sink))
    tensors = as_fp32(inputs)
    expected = masked_attention(tensors["query"], tensors["key"], tensors["value"], tensors["key_mask"], SCALE, sink)
    check_fused(model, inputs, expected.numpy(), element, attentions=1)


@every_type
@every_opset
@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("mask", [None, "some", "all patches"])
def test_focal_attention_equals_pytorch(opset: int, element: int, hot: int, mask: str | None) -> None:
    levels = ((1, 0), (2, 1), (4, 3))
    inputs = attention_tensors(element, 1 + 7 * 9)
    lists = focal_keys((7, 9), 1, 4, levels, 2)
    inputs |= {"tile_queries": lists.queries, "tile_keys": lists.keys, "tile_bias": lists.bias, "places": lists.places}
    kinds = dict.fromkeys(("query", "key", "value"), element)
    kinds |= dict.fromkeys(("tile_queries", "tile_keys"), TensorProto.INT32)
    kinds |= {"tile_bias": TensorProto.FLOAT, "places": TensorProto.INT32}
    if mask:
        inputs["key_mask"] = (np.random.default_rng(6).random((2, 64)) < 0.3).astype(np.int32)
        if mask == "all patches":  # hot keys are masked then too, and the prefix token is all that is left
            inputs["key_mask"][:] = np.arange(64) >= 1
        kinds["key_mask"] = TensorProto.INT32
    tensors = as_fp32(inputs)
    expected = focal_attention(
        tensors["query"], tensors["key"], tensors["value"],
        patches=(7, 9), prefix_tokens=1, tile=4, levels=levels, hot=hot, seed=2, scale=SCALE,
        key_mask=tensors.get("key_mask"),
    )  # fmt: skip
    model = one_node_model(
        FOCAL_ATTENTION, kinds, {"out": element}, opset, element, scale=SCALE, prefix_tokens=1, hot=hot
    )
    check_fused(model, inputs, expected.numpy(), element, attentions=2)
