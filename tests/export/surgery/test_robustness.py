"""Files that are broken, hostile or enormous: each ends in a valid output or one line, quickly, with nothing left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import surgery_zoo as zoo
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from surgery_helpers import Export

from fna.errors import FnaError, InputFileError
from fna.export.surgery.graft import GraftOptions, graft

LONGEST_S = 60.0
SOURCES = ("packed_timm", "core_rank3", "torch_mha", "grouped_heads", "causal_sdpa")
OPERATORS = [
    "Relu",
    "MatMul",
    "Softmax",
    "Add",
    "Transpose",
    "Reshape",
    "Einsum",
    "Attention",
    "Split",
    "Gather",
    "If",
    "Tanh",
    "Bogus",
    "Concat",
    "Where",
    "Exp",
]

Mutation = Callable[[GraphProto, NodeProto, random.Random], None]


def drop_node(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    graph.node.remove(node)


def rename_input(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    if node.input:
        node.input[dice.randrange(len(node.input))] = "nothing"


def swap_input(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    """Often makes a cycle, a wrong shape or a wrong type."""
    if node.input:
        names = [name for other in graph.node for name in other.output]
        node.input[dice.randrange(len(node.input))] = dice.choice(names)


def read_itself(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    if node.input and node.output:
        node.input[0] = node.output[0]


def repeat_node(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    graph.node.add().CopyFrom(node)


def lie_about_dims(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    tensor = dice.choice(graph.initializer)
    if tensor.dims:
        tensor.dims[dice.randrange(len(tensor.dims))] = dice.choice([0, 1, 3, -1, 10**9, 2**40])


def lie_about_type(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    dice.choice(graph.initializer).data_type = dice.choice([0, 1, 6, 7, 9, 10, 16, 99])


def cut_weights(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    tensor = dice.choice(graph.initializer)
    tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]


def change_input_size(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    dim = dice.choice(graph.input[0].type.tensor_type.shape.dim)
    dim.Clear()
    dim.dim_value = dice.choice([0, 1, 5, 1000, 2**31, 2**45, -3])


def change_shape_constant(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    constants = [
        item for item in graph.node if item.op_type == "Constant" and item.attribute[0].t.data_type == TensorProto.INT64
    ]
    tensor = dice.choice(constants).attribute[0].t
    value = numpy_helper.to_array(tensor).copy()
    if value.size:
        value.reshape(-1)[dice.randrange(value.size)] = dice.choice([-1, 0, 1, 2, 17, 10**6, 2**33])
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def change_operator(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    node.op_type = dice.choice(OPERATORS)


def change_domain(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    node.domain = dice.choice(["com.microsoft", "somewhere", "fna"])


def forget_attributes(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    del node.attribute[:]


def odd_attribute(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    name = dice.choice(["axis", "perm", "alpha", "scale", "num_heads", "equation", "to"])
    node.attribute.append(helper.make_attribute(name, dice.choice([3, -7, 1.5, "x", [1, 2], [0.5]])))


def forget_outputs(graph: GraphProto, node: NodeProto, dice: random.Random) -> None:
    del graph.output[:]


MUTATIONS: tuple[Mutation, ...] = (
    drop_node, rename_input, swap_input, read_itself, repeat_node, lie_about_dims, lie_about_type, cut_weights,
    change_input_size, change_shape_constant, change_operator, change_domain, forget_attributes, odd_attribute, forget_outputs,
)  # fmt: skip


def graft_or_fail_well(source: Path, output: Path) -> str | None:
    """Graft; returns the message of a refusal. The output is whole and unreported changes are none."""
    started = time.monotonic()
    before = {path.name for path in source.parent.iterdir()}
    refusal: FnaError | None = None
    try:
        result = graft(source, output, GraftOptions(landmarks=3))
    except FnaError as error:
        refusal = error
    assert time.monotonic() - started < LONGEST_S
    assert {path.name for path in source.parent.iterdir()} <= before | {output.name}
    if refusal is not None:
        assert refusal.exit_code == 2
        assert "\n" not in str(refusal)
        assert not output.exists()
        return str(refusal)
    model, original = onnx.load(output), onnx.load(source)
    attention = [node for node in model.graph.node if node.op_type == "FastNystromAttention" and node.domain == "fna"]
    assert len(attention) == result.replaced
    known = {node.SerializeToString() for node in original.graph.node}
    changed = [node for node in model.graph.node if node.SerializeToString() not in known and "fna" not in node.name]
    assert not changed
    return None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutated_files_end_well(mutation: Mutation, export: Export, tmp_path: Path):
    dice = random.Random(mutation.__name__)
    cases = {case.name: case for case in (*zoo.PLAIN, *zoo.REFUSED)}
    for number in range(6):
        name = SOURCES[number % len(SOURCES)]
        model = onnx.load(export(name, cases[name].make))
        for _ in range(1 + number % 2):
            mutation(model.graph, dice.choice(model.graph.node), dice)
        source = tmp_path / f"mutated_{number}.onnx"
        source.write_bytes(model.SerializeToString())
        graft_or_fail_well(source, tmp_path / f"out_{number}.onnx")


def save_chain(path: Path, length: int) -> None:
    nodes = [helper.make_node("Relu", ["x" if i == 0 else f"t{i - 1}"], [f"t{i}"]) for i in range(length)]
    shape = [1, 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(f"t{length - 1}", 1, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_a_chain_of_ten_thousand_nodes(tmp_path: Path):
    save_chain(tmp_path / "chain.onnx", 10_000)
    message = graft_or_fail_well(tmp_path / "chain.onnx", tmp_path / "out.onnx")
    assert message is not None
    assert "no attention" in message


def test_ten_thousand_nodes_between_scores_and_softmax(export: Export, tmp_path: Path):
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    nodes = list(model.graph.node)
    at = next(index for index, node in enumerate(nodes) if node.op_type == "Softmax")
    name, chain = nodes[at].input[0], []
    for index in range(10_000):
        chain.append(helper.make_node("Identity", [name], [f"long_{index}"]))
        name = f"long_{index}"
    nodes[at].input[0] = name
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend([*nodes[:at], *chain, *nodes[at:]])
    source = tmp_path / "long.onnx"
    onnx.save(changed, source)
    result = graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert "too many nodes" in result.rows[0].reason
    assert result.replaced == 1


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link.bin", "missing.bin", ""])
def test_external_data_outside_the_folder_is_refused(location: str, export: Export, tmp_path: Path):
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    onnx.save(model, folder / "in.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    pointed = onnx.load(folder / "in.onnx", load_external_data=False)
    for tensor in pointed.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "in.onnx").write_bytes(pointed.SerializeToString())
    (tmp_path / "out").mkdir()
    with pytest.raises(InputFileError, match=r"external|outside"):
        graft(folder / "in.onnx", tmp_path / "out" / "out.onnx", GraftOptions(landmarks=3))
    assert list((tmp_path / "out").iterdir()) == []


def test_external_data_that_is_too_short_is_refused(export: Export, tmp_path: Path):
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    onnx.save(model, tmp_path / "in.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputFileError, match="too short"):
        graft(tmp_path / "in.onnx", tmp_path / "out.onnx", GraftOptions(landmarks=3))


@pytest.mark.parametrize("size", [(10**6, 3, 32, 32), (2, 3, 2**30, 2**30), (10**9, 3, 32, 32)])
def test_huge_inputs_do_not_exhaust_the_machine(size: tuple[int, ...], export: Export, tmp_path: Path):
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    for dim, value in zip(model.graph.input[0].type.tensor_type.shape.dim, size, strict=True):
        dim.Clear()
        dim.dim_value = value
    onnx.save(model, tmp_path / "huge.onnx")
    assert graft_or_fail_well(tmp_path / "huge.onnx", tmp_path / "out.onnx") is not None


def test_files_out_of_topological_order_are_put_in_order(export: Export, tmp_path: Path):
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    nodes = list(model.graph.node)
    random.Random(0).shuffle(nodes)
    shuffled = ModelProto()
    shuffled.CopyFrom(model)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    onnx.save(shuffled, tmp_path / "shuffled.onnx")
    result = graft(tmp_path / "shuffled.onnx", tmp_path / "out.onnx", GraftOptions(landmarks=3))
    assert result.replaced == 2
    assert any("topological order" in note for note in result.notes)
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)


def test_unsupported_opsets_are_named(export: Export, tmp_path: Path):
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    model.opset_import[0].version = 25
    onnx.save(model, tmp_path / "new.onnx")
    message = graft_or_fail_well(tmp_path / "new.onnx", tmp_path / "out.onnx")
    assert message is not None
    assert "opset 25" in message


def test_rubbish_is_not_a_model(tmp_path: Path):
    for number, content in enumerate((b"", b"\x00" * 100, b"\xff" * 1000, b"\x08\x07", np.arange(999).tobytes())):
        source = tmp_path / f"rubbish_{number}.onnx"
        source.write_bytes(content)
        assert graft_or_fail_well(source, tmp_path / "out.onnx") is not None
