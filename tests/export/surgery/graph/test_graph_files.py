"""What onnx-graphsurgeon would lose or let pass, one test for each reason why the module of files exists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper

from fna.errors import InputFileError
from fna.export.surgery.graph.files import (
    export_model,
    import_model,
    load_model,
    open_graph,
    put_weights_in,
    stored_value,
    was_sorted,
)
from fna.export.surgery.graph.view import GraphView

FOLDER = Path()


def parse(text: str) -> ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20, "theirs" : 1]> {text}')


def chain() -> ModelProto:
    """Two nodes and a weight."""
    model = parse("""g (float[1, 4] x) => (float[1, 4] y) <float[4] weight = {1, 2, 3, 4}> {
        scaled = Mul (x, weight)
        y = Relu (scaled)
    }""")
    model.graph.node[0].name, model.graph.node[1].name = "scale", "end"
    return model


# ---------------------------------------------------------------- refused in one line


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("y = Relu (x) \n y = Neg (x)", "'y' is written more than once"),
        ("y = Relu (nothing)", "reads 'nothing', which nothing in the file computes"),
        ("z = Add (x, y) \n y = Relu (z)", "cycle"),
        ("y = Add (x, y)", "reads its own output 'y'"),
        ("z = Relu (x)", "graph output 'y' is computed by nothing"),
    ],
)
def test_graphs_that_break_the_rules_are_refused_by_name(body: str, said: str) -> None:
    with pytest.raises(InputFileError, match=said):
        import_model(parse(f"g (float[1] x) => (float[1] y) {{ {body} }}"), FOLDER)


def test_a_file_without_standard_operators_is_refused() -> None:
    model = chain()
    del model.opset_import[0]
    with pytest.raises(InputFileError, match="standard operator set"):
        import_model(model, FOLDER)


# ---------------------------------------------------------------- nothing else changes


def test_an_untouched_model_is_written_byte_for_byte() -> None:
    model = chain()
    model.doc_string, model.producer_name, model.domain, model.model_version = "notes", "their exporter", "theirs", 3
    model.metadata_props.add(key="author", value="someone")
    model.graph.doc_string = "their graph"
    model.graph.metadata_props.add(key="step", value="7")
    node = model.graph.node[0]
    node.doc_string, node.overload = "why it is scaled", "second"
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['a', 'b']")
    model.graph.value_info.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, [1, 4]))
    model.graph.value_info[0].doc_string = "noted"
    annotation = model.graph.quantization_annotation.add(tensor_name="scaled")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="weight")
    assert export_model(import_model(model, FOLDER)) == model


def test_attributes_that_graphsurgeon_skips_survive_even_an_edit() -> None:
    model = chain()
    tensors = AttributeProto(name="theirs", type=AttributeProto.TENSORS)
    tensors.tensors.append(numpy_helper.from_array(np.ones(2, np.float32), "kept"))
    model.graph.node[1].attribute.append(tensors)
    model.graph.node[1].doc_string = "kept too"
    assert export_model(import_model(model, FOLDER)).graph.node[1] == model.graph.node[1]
    graph = import_model(model, FOLDER)
    graph.nodes[1].op = "Neg"
    written = export_model(graph).graph.node[1]
    assert (written.op_type, written.doc_string) == ("Neg", "kept too")
    assert list(written.attribute) == [tensors]


def test_edits_are_written() -> None:
    graph = import_model(chain(), FOLDER)
    graph.nodes[0].name = "renamed"
    graph.nodes[1].attrs["alpha"] = 0.5
    graph.nodes[1].op = "LeakyRelu"
    graph.tensors()["weight"].values = np.zeros(4, np.float32)
    graph.outputs[0].shape = [1, None]
    written = export_model(graph).graph
    assert written.node[0].name == "renamed"
    assert helper.get_attribute_value(written.node[1].attribute[0]) == 0.5
    assert not numpy_helper.to_array(written.initializer[0]).any()
    assert not written.output[0].type.tensor_type.shape.dim[1].HasField("dim_value")


def test_inputs_with_a_default_value_and_unread_weights_stay() -> None:
    model = chain()
    model.graph.input.insert(0, helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "unread"))
    assert export_model(import_model(model, FOLDER)) == model


def with_body() -> ModelProto:
    model = parse("""g (float[1, 4] x, bool test) => (float[1, 4] y) <float[4] weight = {1, 2, 3, 4}> {
        y = If (test) <
            then_branch = yes () => (float[1, 4] a) { a = Mul (x, weight) },
            else_branch = no () => (float[1, 4] b) { b = Identity (x) }
        >
    }""")
    model.graph.node[0].attribute[0].g.node[0].doc_string = "inside"
    return model


def test_bodies_keep_what_they_read_from_outside() -> None:
    model = with_body()
    assert export_model(import_model(model, FOLDER)) == model
    view = GraphView(import_model(model, FOLDER))
    assert view.consumers["x"] == [0]


def test_an_edit_of_a_body_is_written() -> None:
    graph = import_model(with_body(), FOLDER)
    graph.nodes[0].attrs["else_branch"].nodes[0].op = "Neg"
    written = {item.name: item.g for item in export_model(graph).graph.node[0].attribute}
    assert written["else_branch"].node[0].op_type == "Neg"


def test_functions_stay_as_they_are() -> None:
    model = chain()
    function = helper.make_function(
        "theirs", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    function.metadata_props.add(key="kept", value="yes")
    model.functions.append(function)
    model.graph.node[1].op_type, model.graph.node[1].domain = "Twice", "theirs"
    assert export_model(import_model(model, FOLDER)) == model


def test_a_valid_order_stays_and_another_is_mended() -> None:
    model = parse("""g (float[1] x) => (float[1] y) {
        a = Relu (x)
        b = Neg (a)
        c = Abs (x)
        y = Add (b, c)
    }""")
    graph = import_model(model, FOLDER)
    assert [node.op for node in graph.nodes] == ["Relu", "Neg", "Abs", "Add"]
    assert was_sorted(graph)
    nodes = [model.graph.node[index] for index in (3, 1, 0, 2)]
    shuffled = ModelProto()
    shuffled.CopyFrom(model)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    graph = import_model(shuffled, FOLDER)
    assert not was_sorted(graph)
    onnx.checker.check_model(export_model(graph))


# ---------------------------------------------------------------- weights


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file whose weight lies beside it."""
    path = tmp_path / "model.onnx"
    model = chain()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.arange(1, 5, dtype=np.float32), "weight"))
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_beside_the_file_are_read_from_its_folder_when_looked_at(outside: Path) -> None:
    graph = open_graph(outside)
    weight = graph.tensors()["weight"]
    assert stored_value(weight).tolist() == [1, 2, 3, 4]
    assert GraphView(graph).constant("weight") is not None
    written = export_model(graph)
    assert written.graph.initializer[0].data_location == TensorProto.EXTERNAL, "looking does not load"
    assert written == load_model(outside)
    assert weight.values.tolist() == [1, 2, 3, 4], "graphsurgeon's own way of looking works as well"


def test_weights_that_are_gone_are_missed_before_anything_is_read(outside: Path) -> None:
    (outside.parent / "weights.bin").unlink()
    with pytest.raises(InputFileError, match=r"weights\.bin.*missing"):
        open_graph(outside)


def test_large_weights_can_be_kept_beside_a_model() -> None:
    model = chain()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1 << 16, np.float32), "large"))
    weights: dict[str, TensorProto] = {}
    light = export_model(import_model(model, FOLDER), weights)
    assert list(weights) == ["large"]
    assert light.ByteSize() < 2000
    put_weights_in(light, weights)
    assert light == model


def test_a_graph_of_graphsurgeons_own_can_be_written() -> None:
    x, y = gs.Variable("x", np.float32, [1, 4]), gs.Variable("y", np.float32, [1, 4])
    node = gs.Node("Mul", "scale", inputs=[x, gs.Constant("two", np.full(4, 2, np.float32))], outputs=[y])
    model = export_model(gs.Graph([node], [x], [y], opset=17))
    onnx.checker.check_model(model)
    assert export_model(import_model(model, FOLDER)) == model
