"""Exact blocks of traced files as ONNX Attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto
from operator_files import run

from fna.export.passes.fuse_exact import fuse_exact_attention
from fna.export.passes.lower import lower
from fna.export.passes.precision import cast_model
from fna.export.sources.loading import LoadedModel
from fna.export.trace import TraceOptions, trace_model
from fna.plan import Plan, uniform_plan

TOKENS = 1 + 4 * 4
PIXELS = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)


@pytest.fixture(scope="module")
def traced(tiny_model: LoadedModel) -> ModelProto:
    """The tiny model of four blocks, FNA in the last two."""
    model, _ = trace_model(tiny_model, uniform_plan(4, layers="2-3", landmarks=6), TraceOptions(56, 56))
    return model


def attentions(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Attention"]


def outputs(model: ModelProto) -> list[Any]:
    return run(model, {model.graph.input[0].name: PIXELS})


def test_every_attention_of_a_traced_file_is_one_or_two_nodes(traced: ModelProto) -> None:
    fused = lower(traced, "fused")
    onnx.checker.check_model(fused, full_check=True)
    assert len(attentions(fused)) == 2 + 2 * 2
    assert sum(node.op_type == "Softmax" for node in fused.graph.node) == 2  # the cores
    for ours, portable in zip(outputs(fused), outputs(lower(traced, "portable")), strict=True):
        np.testing.assert_allclose(ours, portable, rtol=0, atol=2e-5)


def test_nothing_of_the_replaced_chain_is_left(traced: ModelProto) -> None:
    graph = lower(traced, "fused").graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert [node.name for node in graph.node if not read & set(node.output)] == []


def test_half_precision_attention_takes_half_and_its_error_is_that_of_the_islands(traced: ModelProto) -> None:
    half = cast_model(traced, "fp16")
    fused = lower(half, "fused")
    made_by = {output: node for node in fused.graph.node for output in node.output}
    for node in attentions(fused):
        for name in node.input:
            maker = made_by[name]
            widened = maker.op_type == "Cast" and maker.attribute[0].i == TensorProto.FLOAT
            assert not widened, f"{node.name} reads {name} in fp32"
    for ours, islands, exact in zip(outputs(fused), outputs(lower(half, "portable")), outputs(traced), strict=True):
        error, allowed = np.linalg.norm(ours - exact), np.linalg.norm(islands - exact)
        assert error < 1.5 * allowed + 1e-6
        assert error > 0


def test_masked_blocks_and_mixed_heads_compute_the_same_fused(tiny_model: LoadedModel) -> None:
    fields = {
        "num_blocks": 4,
        "blocks": [{"block": 2, "landmarks": 6, "heads": [0]}, {"block": 3, "landmarks": 6}],
        "masks": [{"blocks": "1", "tokens": [2, 7]}],
    }
    model, _ = trace_model(tiny_model, Plan.model_validate(fields), TraceOptions(56, 56))
    fused = lower(model, "fused")
    assert len(attentions(fused)) == 1 + 1 + (1 + 2) + 2
    for ours, portable in zip(outputs(fused), outputs(lower(model, "portable")), strict=True):
        np.testing.assert_allclose(ours, portable, rtol=0, atol=2e-5)


def test_the_exact_attention_of_grafted_files_is_left_alone(traced: ModelProto) -> None:
    grafted = ModelProto()
    grafted.CopyFrom(traced)
    for entry in grafted.metadata_props:
        if entry.key == "fna.origin":
            entry.value = "graft"
    assert len(attentions(lower(grafted, "fused"))) == 2 * 2
    assert len(attentions(lower(grafted, "fused", fuse_exact=True))) == 2 + 2 * 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_without_an_attention_operator_gets_the_products_that_it_fuses(
    traced: ModelProto, precision: Any
) -> None:
    """The scale on the queries, then MatMul, Softmax, MatMul, all in the file's type; in the form with the plugin, too."""
    low = cast_model(traced, precision)
    for lowering in ("decomposed", "plugin"):
        graph = onnx.shape_inference.infer_shapes(lower(low, lowering)).graph  # type: ignore[arg-type]
        kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
        makers = {output: node for node in graph.node for output in node.output}
        softmaxes = [node for node in graph.node if node.op_type == "Softmax" and "FastNystrom" not in node.name]
        assert len(softmaxes) == 2
        for softmax in softmaxes:
            product = makers[softmax.input[0]]
            (reader,) = (node for node in graph.node if softmax.output[0] in node.input)
            scaled, keys = (makers[name] for name in product.input)
            assert [node.op_type for node in (scaled, keys, product, reader)] == [
                "Mul",
                "Transpose",
                "MatMul",
                "MatMul",
            ]
            assert {kinds[name] for node in (scaled, product, softmax, reader) for name in node.output} == {
                kinds[scaled.input[0]]
            }
            assert kinds[scaled.input[0]] == getattr(TensorProto, {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision])


def test_the_decomposed_form_is_no_further_off_than_the_islands(traced: ModelProto) -> None:
    half = cast_model(traced, "fp16")
    every = (outputs(lower(half, "decomposed")), outputs(lower(half, "portable")), outputs(traced))
    for ours, islands, exact in zip(*every, strict=True):
        assert 0 < np.linalg.norm(ours - exact) < 1.5 * np.linalg.norm(islands - exact) + 1e-6


def test_files_in_fp32_have_that_form_already(traced: ModelProto) -> None:
    names = [node.op_type for node in lower(traced, "portable").graph.node]
    assert [node.op_type for node in lower(traced, "decomposed").graph.node] == names


def test_no_product_with_a_row_for_each_token_is_fp32_in_a_half_precision_file(traced: ModelProto) -> None:
    half = cast_model(traced, "fp16")

    def wide_products(model: ModelProto) -> list[str]:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        known = {value.name: value.type.tensor_type for value in [*inferred.value_info, *inferred.output]}
        return [
            node.name
            for node in inferred.node
            if node.op_type == "MatMul"
            and known[node.output[0]].elem_type == TensorProto.FLOAT
            and TOKENS
            in [
                side.dim_value
                for name in (*node.input, *node.output)
                if name in known
                for side in known[name].shape.dim
            ]
        ]

    assert len(wide_products(lower(half, "portable"))) == 2 * 4
    assert wide_products(lower(half, "fused")) == []


def test_weights_that_a_file_hands_out_and_nothing_reads_are_not_attention() -> None:
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("MatMul", ["query", "key"], ["scores"]),
        onnx.helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
    ]
    shapes = {"query": [1, 2, 8, 4], "key": [1, 2, 4, 8]}
    inputs = [info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = onnx.helper.make_graph(nodes, "g", inputs, [info("weights", TensorProto.FLOAT, [1, 2, 8, 8])])
    assert fuse_exact_attention(graph) == 0
