"""ONNX Attention as TensorRT takes it, and the attention layers of the real TensorRT-RTX's networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tiny_engines import write_model

from fna.engines.builder.attention import allow_decomposition, check_attention, prepare_attention
from fna.errors import BuildError
from fna.export.passes.lower import lower
from fna.files import load_onnx

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


@pytest.fixture(params=TYPES)
def fused(request: pytest.FixtureRequest, tmp_path: Path) -> ModelProto:
    return lower(load_onnx(write_model(tmp_path / "tiny.onnx", element_type=TYPES[request.param])), "fused")


def test_queries_are_scaled_before_attention_and_no_softmax_precision_is_left(fused: ModelProto) -> None:
    before = fused.SerializeToString(deterministic=True)
    prepared = prepare_attention(fused)
    assert fused.SerializeToString(deterministic=True) == before
    makers = {output: node for node in prepared.graph.node for output in node.output}
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in prepared.graph.initializer}
    attentions = [node for node in prepared.graph.node if node.op_type == "Attention"]
    assert [node.name for node in attentions] == ["/blocks.0/fna/exact", "/blocks.0/fna/mixed"]
    for node, unprepared in zip(
        attentions, (node for node in fused.graph.node if node.op_type == "Attention"), strict=True
    ):
        assert {item.name: helper.get_attribute_value(item) for item in node.attribute} == {"scale": 1.0}
        product = makers[node.input[0]]
        assert (product.op_type, product.input[0]) == ("Mul", unprepared.input[0])
        assert constants[product.input[1]] == np.float32(0.25)
        assert list(node.input[1:3]) == list(unprepared.input[1:3])


def test_a_bias_is_read_as_one_row_and_not_as_one_for_each_query(fused: ModelProto) -> None:
    """onnxruntime needs the rows; the builder reads them all, and fails on large constant ones in fp32."""
    prepared = prepare_attention(fused)
    makers = {output: node for node in prepared.graph.node for output in node.output}
    (biased,) = [node for node in prepared.graph.node if node.op_type == "Attention" and len(node.input) == 4]
    assert makers[biased.input[3]].op_type in ("Unsqueeze", "Cast")
    unprepared = next(node for node in fused.graph.node if node.name == biased.name)
    assert next(node for node in fused.graph.node if unprepared.input[3] in node.output).op_type == "Expand"
    assert unprepared.input[3] not in makers


def test_a_file_without_attention_is_left_as_it_is(tmp_path: Path) -> None:
    portable = lower(load_onnx(write_model(tmp_path / "tiny.onnx")), "portable")
    assert prepare_attention(portable) is portable


def test_the_parsed_network_has_one_attention_layer_for_each_of_the_file(fused: ModelProto) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    prepared = prepare_attention(fused)
    assert parser.parse(prepared.SerializeToString())
    layers = allow_decomposition(trt, network)
    assert layers == 2
    check_attention("TensorRT-RTX", prepared, layers)
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            assert layer.attention.decomposable


def test_a_network_that_lost_an_attention_is_refused_with_the_way_out(fused: ModelProto) -> None:
    with pytest.raises(
        BuildError, match=r"made 1 attention layers of the 2 in the file; build with --lowering portable"
    ):
        check_attention("TensorRT-RTX", fused, 1)
