"""Casts to fp16 and bf16: what changes type, what must not, and how far the outputs move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from casts import outputs_of, relative_error, types_by_operator
from numpy.typing import NDArray
from onnx import TensorProto

from fna.cli import main
from fna.errors import InvalidArgumentError
from fna.export.blocks import find_blocks
from fna.export.metadata import read_metadata
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import fna_nodes
from fna.export.passes.precision import cast_model, norm_nodes
from fna.export.passes.ranges import TensorRange, find_overflows, measure_ranges
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, trace_model
from fna.export.types import tensor_types
from fna.export.variants import FileVariant, make_variant
from fna.files import load_onnx, save_model
from fna.plan import Plan

Find = Callable[[str], Path]
FILES = ("traced", "norm-grid", "grafted")
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("name", FILES)
def test_blocks_begin_and_end_in_the_residual_stream(tiny_file: Find, name: str) -> None:
    model = load_onnx(tiny_file(name))
    blocks = find_blocks(model, 4)
    sizes = [sum(number == block for number in blocks.values()) for block in range(4)]
    assert min(sizes) > 25
    norms = [node for node in model.graph.node if node.op_type in ("LayerNormalization", "Sqrt")]
    assert [sum(blocks.get(node.output[0]) == block for node in norms) for block in range(4)] == [2, 2, 2, 2]
    last = [[node for node in model.graph.node if blocks.get(node.output[0]) == block][-1] for block in range(4)]
    assert {node.op_type for node in last} == {"Add"}


def test_a_wrong_number_of_blocks_is_refused(tiny_file: Find) -> None:
    with pytest.raises(InvalidArgumentError, match="plan has 5 attention blocks, but 4 attention operators"):
        find_blocks(load_onnx(tiny_file("traced")), 5)


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", FILES)
def test_weights_and_activations_change_type_and_sensitive_parts_do_not(
    tiny_file: Find, name: str, precision: str
) -> None:
    model = cast_model(load_onnx(tiny_file(name)), precision)
    types = tensor_types(model)
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {
        TensorProto.FLOAT
    }
    assert types_by_operator(model, "MatMul") - {TensorProto.FLOAT} == {HALF[precision]}
    assert types_by_operator(model, "Softmax") == {TensorProto.FLOAT}
    for norm in ("LayerNormalization", "Pow", "Sqrt", "ReduceMean"):
        assert types_by_operator(model, norm) <= {TensorProto.FLOAT}
    for node in fna_nodes(model.graph):
        assert types[node.input[0]] == HALF[precision]
        if FAST_NYSTROM_ATTENTION.is_called_by(node):
            assert [types[value] for value in node.input[3:]] == [TensorProto.INT32, TensorProto.FLOAT]
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2 and min(tensor.dims) >= 32]
    assert {tensor.data_type for tensor in weights} == {HALF[precision]}
    metadata = read_metadata(model, name)
    assert (metadata.precision, metadata.fp32_blocks) == (precision, ())


@pytest.mark.parametrize("name", [*FILES, "highest-opset"])
def test_an_fp16_file_computes_the_same_to_fp16s_precision(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]], name: str
) -> None:
    save_model(cast_model(load_onnx(tiny_file(name)), "fp16"), tmp_path / "half.onnx")
    error = relative_error(outputs_of(tiny_file(name), pixels[0]), outputs_of(tmp_path / "half.onnx", pixels[0]))
    assert 1e-5 < error < 2e-3  # 11 significant bits; an error of nothing would mean that nothing was cast


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("name", [*FILES, "highest-opset"])
def test_kept_blocks_stay_fp32_attention_included(tiny_file: Find, name: str, precision: str) -> None:
    model = cast_model(load_onnx(tiny_file(name)), precision, keep_fp32=(0, 3))
    types, blocks = tensor_types(model), find_blocks(model, 4)
    products: dict[int | None, set[int]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            products.setdefault(blocks.get(node.output[0]), set()).add(types[node.output[0]])
    assert products[0] == products[3] == {TensorProto.FLOAT}
    assert products[1] == products[2] == {HALF[precision]}
    last = [node for node in fna_nodes(model.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node)][-1]
    assert types[last.input[0]] == TensorProto.FLOAT
    onnx.checker.check_model(model, full_check=True)


def test_attention_operators_keep_their_softmax_in_fp32(tiny_file: Find) -> None:
    model = cast_model(load_onnx(tiny_file("highest-opset")), "fp16")
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attention) == 2
    for node in attention:
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        assert settings["softmax_precision"] == TensorProto.FLOAT


def test_bf16_weights_are_rounded_once_from_fp32(tiny_file: Find) -> None:
    """Not through fp16, whose subnormals and limits would show."""
    import ml_dtypes

    source = load_onnx(tiny_file("traced"))
    model = cast_model(source, "bf16")
    wanted = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in source.graph.initializer}
    compared = 0
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            assert np.array_equal(onnx.numpy_helper.to_array(tensor), wanted[tensor.name].astype(ml_dtypes.bfloat16))
            compared += 1
    assert compared > 20


def test_fp32_operators_hand_each_other_fp32(tiny_file: Find) -> None:
    """The converter alone casts to 16 bits and back between them, where the square of a massive token overflows."""
    model = cast_model(load_onnx(tiny_file("grafted")), "fp16")
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Sqrt", "Pow") and node.input[0] in producers:
            assert producers[node.input[0]].op_type != "Cast"


def test_norms_that_are_written_out_are_found(tiny_file: Find) -> None:
    model = load_onnx(tiny_file("grafted"))
    kinds = [node.op_type for node in model.graph.node if node.name in norm_nodes(model)]
    assert kinds.count("ReduceMean") == 18
    assert kinds.count("Sqrt") == kinds.count("Div") == 9
    assert "MatMul" not in kinds


def test_a_file_that_is_not_fp32_is_refused(tiny_file: Find) -> None:
    model = cast_model(load_onnx(tiny_file("traced")), "fp16")
    with pytest.raises(InvalidArgumentError, match=r"x\.onnx is fp16 already"):
        cast_model(model, "bf16", name="x.onnx")


def test_a_block_that_is_not_there_is_refused(tiny_file: Find) -> None:
    with pytest.raises(InvalidArgumentError, match="block 4 is to stay fp32, but the model has blocks 0 to 3"):
        cast_model(load_onnx(tiny_file("traced")), "fp16", keep_fp32=(4,))


def test_the_biases_of_focal_lists_stay_fp32() -> None:
    plan = Plan.model_validate({"num_blocks": 4, "focal": [{"block": 2, "tile": 2, "hot": 2}]})
    model = trace_model(load_model("tiny_vit:make_vit"), plan, TraceOptions(32, 32))[0]
    half = cast_model(model, "fp16")
    (node,) = fna_nodes(half.graph)
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types[node.input[5]] == TensorProto.FLOAT


def test_a_block_that_overflows_fp16_is_named(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]]
) -> None:
    """The second linear layer of block 1's MLP is made to give values of hundreds of thousands."""
    model = load_onnx(tiny_file("traced"))
    assert find_overflows(measure_ranges(model, pixels)) == []
    blocks = find_blocks(model, 4)
    bias = [node for node in model.graph.node if blocks.get(node.output[0]) == 1 and node.op_type == "Add"][-2]
    tensor = next(entry for entry in model.graph.initializer if entry.name in bias.input)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tuple(tensor.dims), 3e5, np.float32), tensor.name))
    save_model(model, tmp_path / "loud.onnx")
    photographs = bundled_photographs()[:2]
    notes = make_variant(tmp_path / "loud.onnx", tmp_path / "half.onnx", FileVariant("fp16"), photographs)
    assert notes[0].startswith("fp16 overflow: block 1: ")
    assert "reaches 3e+05" in notes[0]
    assert notes[0].endswith("beyond fp16's 65504; keep it with --keep-fp32 1")
    kept = make_variant(
        tmp_path / "loud.onnx", tmp_path / "half.onnx", FileVariant("fp16", keep_fp32=(1,)), photographs
    )
    assert not any(note.startswith("fp16 overflow: block 1:") for note in kept)


def test_values_that_are_not_numbers_count_as_overflow() -> None:
    ranges = [TensorRange("x", 0.0, float("nan"), None), TensorRange("y", -7e4, 0.0, 2)]
    assert [line.split(":")[0] for line in find_overflows(ranges)] == ["outside the blocks", "block 2"]


def test_the_export_command_casts_what_it_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fna validate` measures such a file as its precision step."""
    path = tmp_path / "half.onnx"
    arguments = ["--precision", "fp16", "--keep-fp32", "0", "--landmarks", "5"]
    assert main(["export", "tiny_files:make_tiny_dinov2", "-o", str(path), *arguments]) == 0
    assert "half.onnx" in capsys.readouterr().out
    metadata = read_metadata(load_onnx(path), "half.onnx")
    assert (metadata.precision, metadata.fp32_blocks, metadata.origin) == ("fp16", (0,), "trace")
    assert [entry.name for entry in tmp_path.iterdir()] == ["half.onnx"]
