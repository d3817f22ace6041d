"""Exact blocks of traced files as onnxruntime's own operator."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto
from operator_files import run

from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel
from fna.export.trace import TraceOptions, trace_model
from fna.plan import Plan, uniform_plan

PIXELS = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)


def own_operators(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.domain == "com.microsoft"]


@pytest.mark.parametrize("layers", ["none", "2-3"])
def test_every_exact_block_is_one_operator_that_computes_the_same(tiny_model: LoadedModel, layers: str) -> None:
    traced, _ = trace_model(tiny_model, uniform_plan(4, layers=layers, landmarks=6), TraceOptions(56, 56))
    lowered = lower(traced, "onnxruntime")
    exact = 4 if layers == "none" else 2
    assert [node.op_type for node in own_operators(lowered)] == ["MultiHeadAttention"] * exact
    assert sum(node.op_type == "Softmax" for node in lowered.graph.node) == (4 - exact) * 3
    read = {name for node in lowered.graph.node for name in node.input} | {out.name for out in lowered.graph.output}
    assert [node.name for node in lowered.graph.node if not read & set(node.output)] == []
    inputs = {traced.graph.input[0].name: PIXELS}
    for ours, portable in zip(run(lowered, inputs), run(lower(traced, "portable"), inputs), strict=True):
        np.testing.assert_allclose(ours, portable, rtol=0, atol=2e-5)


def test_attention_on_some_heads_of_a_block_stays_as_it_is(tiny_model: LoadedModel) -> None:
    plan = Plan.model_validate({"num_blocks": 4, "blocks": [{"block": 2, "landmarks": 6, "heads": [0]}]})
    traced, _ = trace_model(tiny_model, plan, TraceOptions(56, 56))
    lowered = lower(traced, "onnxruntime")
    assert len(own_operators(lowered)) == 3
    inputs = {traced.graph.input[0].name: PIXELS}
    for ours, portable in zip(run(lowered, inputs), run(lower(traced, "portable"), inputs), strict=True):
        np.testing.assert_allclose(ours, portable, rtol=0, atol=2e-5)


def test_grafted_files_keep_their_own_exact_attention(tiny_model: LoadedModel) -> None:
    traced, _ = trace_model(tiny_model, uniform_plan(4, layers="none"), TraceOptions(56, 56))
    grafted = onnx.ModelProto.FromString(traced.SerializeToString())
    for entry in grafted.metadata_props:
        if entry.key == "fna.origin":
            entry.value = "graft"
    assert own_operators(lower(grafted, "onnxruntime")) == []
