"""The lowerings of a file."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto

from fna.errors import InvalidArgumentError
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import attach_functions
from fna.export.passes.lower import lower


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two samplers and two attention nodes, with metadata."""
    info = onnx.helper.make_tensor_value_info
    floats = [info(name, TensorProto.FLOAT, ["B", "H", "N", "D"]) for name in ("query", "key", "value")]
    hidden = info("hidden", TensorProto.FLOAT, ["B", "N", "C"])
    bias = info("bias", TensorProto.FLOAT, [1, 8])
    settings = {"scale": 0.5, "iterations": 6, "exact_rows": 1}
    attend = FAST_NYSTROM_ATTENTION.make_node
    nodes = [
        FARTHEST_POINT_SAMPLING.make_node(["hidden"], ["far"], "/blocks.0/fps", num_landmarks=8),
        attend(["query", "key", "value", "far", "bias"], ["middle"], "/blocks.0/fna", **settings),
        NORM_GRID_LANDMARKS.make_node(["hidden"], ["near"], "/blocks.1/norm", num_landmarks=8, prefix_tokens=1),
        onnx.helper.make_node("Relu", ["middle"], ["positive"], name="relu"),
        attend(["positive", "key", "value", "near", "bias"], ["out"], "/blocks.1/fna", **settings),
    ]
    graph = onnx.helper.make_graph(
        nodes, "g", [*floats, hidden, bias], [info("out", TensorProto.FLOAT, ["B", "H", "N", "D"])]
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    attach_functions(made, TensorProto.FLOAT)
    made.metadata_props.add(key="fna.source", value="test")
    return made


def test_portable_holds_standard_operators_only(model: onnx.ModelProto) -> None:
    lowered = lower(model, "portable")
    onnx.checker.check_model(lowered, full_check=True)
    assert not lowered.functions
    assert {node.domain for node in lowered.graph.node} == {""}
    assert [entry.domain for entry in lowered.opset_import] == [""]


def test_fused_is_opset_23_with_two_attentions_for_each_fna_node(model: onnx.ModelProto) -> None:
    lowered = lower(model, "fused")
    onnx.checker.check_model(lowered, full_check=True)
    assert not lowered.functions
    assert [(entry.domain, entry.version) for entry in lowered.opset_import] == [("", 23)]
    attentions = [node.name for node in lowered.graph.node if node.op_type == "Attention"]
    assert attentions == ["/blocks.0/fna/exact", "/blocks.0/fna/mixed", "/blocks.1/fna/exact", "/blocks.1/fna/mixed"]
    names = [node.name for node in lowered.graph.node if node.name]
    assert len(set(names)) == len(names)


def test_plugin_keeps_the_plugins_nodes_and_no_function(model: onnx.ModelProto) -> None:
    lowered = lower(model, "plugin")
    assert not lowered.functions
    custom = [node for node in lowered.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in custom] == [
        "FarthestPointSampling",
        "FastNystromAttention",
        "FastNystromAttention",
    ]
    assert all(not node.overload for node in custom)
    fields = {item.name for item in custom[1].attribute}
    assert fields == {"scale", "iterations", "exact_rows", "plugin_version", "plugin_namespace"}


def test_inlined_nodes_are_named_after_their_block_and_no_name_occurs_twice(model: onnx.ModelProto) -> None:
    lowered = lower(model, "portable")
    names = [node.name for node in lowered.graph.node]
    assert len(set(names)) == len(names)
    owners = {name.split("/")[1] if name.startswith("/") else name for name in names}
    assert owners == {"blocks.0", "blocks.1", "relu"}
    outputs = [output for node in lowered.graph.node for output in node.output]
    assert len(set(outputs)) == len(outputs)


def test_lowering_keeps_metadata_and_leaves_its_input_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    for form in ("portable", "fused", "plugin"):
        assert [entry.value for entry in lower(model, form).metadata_props] == ["test"]
    assert model.SerializeToString(deterministic=True) == before


def test_a_plugin_lowered_file_cannot_be_made_portable_again(model: onnx.ModelProto) -> None:
    with pytest.raises(InvalidArgumentError, match=r"/blocks\.0/fps.*no function"):
        lower(lower(model, "plugin"), "portable")


def test_an_unknown_lowering_is_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(
        InvalidArgumentError,
        match="'fast'.*portable, fused, decomposed, plugin, onnxruntime, onnxruntime-cpu or onnxruntime-kernels",
    ):
        lower(model, "fast")  # type: ignore[arg-type]
