"""8 bits for the linear layers: what is quantised, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from casts import outputs_of, relative_error, types_by_operator
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from PIL import Image

from fna.errors import InvalidArgumentError
from fna.export.metadata import read_metadata, write_metadata
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import model_opset
from fna.export.passes.calibration import InputStatistics, measure_inputs
from fna.export.passes.eight_bit import FP8, INT8
from fna.export.passes.equalise import Freedom
from fna.export.passes.layer_costs import measure_layer_costs
from fna.export.passes.precision import cast_model
from fna.export.passes.quantize import quantize_model
from fna.export.passes.recipe import choose, move_rows, round_weight, round_weight_in_turn, weight_scale
from fna.export.preprocessing import bundled_photographs
from fna.export.variants import FileVariant, calibration_pixels, make_variant
from fna.files import load_onnx, save_model

Find = Callable[[str], Path]


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_int8_is_for_linear_layers_and_costs_little(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]], name: str
) -> None:
    source = load_onnx(tiny_file(name))
    model = quantize_model(source, pixels).model
    save_model(model, tmp_path / "int8.onnx")
    producers = {value: node for node in model.graph.node for value in node.output}
    quantized = [
        node
        for node in model.graph.node
        if any(producers[value].op_type == "DequantizeLinear" for value in node.input if value in producers)
        and node.op_type != "Shape"
    ]
    assert {node.op_type for node in quantized} <= {"MatMul", "Gemm"}
    assert len(quantized) == 24  # query, key, value, projection and two of the MLP, in four blocks
    zero_points = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name in zero_points]
    assert all(array.dtype == np.int8 and not array.any() for array in values)  # TensorRT takes symmetric ones only
    error = relative_error(outputs_of(tiny_file(name), pixels[0]), outputs_of(tmp_path / "int8.onnx", pixels[0]))
    assert 1e-4 < error < 1e-2
    assert read_metadata(model, name).quantized == "int8"


def test_int8_and_fp16_together_keep_quantised_products_whole(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]]
) -> None:
    model = cast_model(quantize_model(load_onnx(tiny_file("grafted")), pixels).model, "fp16")
    producers = {value: node for node in model.graph.node for value in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    for node in products:
        kinds = {producers[value].op_type for value in node.input if value in producers}
        assert "DequantizeLinear" not in kinds or kinds == {"DequantizeLinear"}
    assert types_by_operator(model, FAST_NYSTROM_ATTENTION.name) == {TensorProto.FLOAT16}
    save_model(model, tmp_path / "both.onnx")
    error = relative_error(outputs_of(tiny_file("grafted"), pixels[0]), outputs_of(tmp_path / "both.onnx", pixels[0]))
    assert error < 3e-2


def test_int8_without_photographs_is_refused(tiny_file: Find) -> None:
    with pytest.raises(InvalidArgumentError, match="give --images"):
        quantize_model(load_onnx(tiny_file("traced")), [])


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_fp8_raises_the_opset_and_rounds_weights_to_its_values(
    tiny_file: Find, tmp_path: Path, pixels: list[NDArray[np.float32]], name: str
) -> None:
    result = quantize_model(load_onnx(tiny_file(name)), pixels, kinds=[FP8])
    save_model(result.model, tmp_path / "fp8.onnx")
    assert model_opset(result.model) == 19
    assert set(result.types.values()) == {"fp8"}
    zero_points = {node.input[2] for node in result.model.graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.data_type for tensor in result.model.graph.initializer if tensor.name in zero_points}
    assert types == {TensorProto.FLOAT8E4M3FN}
    error = relative_error(outputs_of(tiny_file(name), pixels[0]), outputs_of(tmp_path / "fp8.onnx", pixels[0]))
    assert 1e-3 < error < 3e-2
    assert read_metadata(result.model, name).quantized == "fp8"


def test_rounding_in_turn_beats_rounding_alone_where_channels_move_together() -> None:
    random = np.random.default_rng(0)
    rows = (random.normal(size=(400, 6)) @ random.normal(size=(6, 24))).astype(np.float32)
    weight = random.normal(size=(24, 10)).astype(np.float32)
    errors = [
        np.linalg.norm(rows @ (rounded - weight))
        for rounded in (round_weight(FP8, weight), round_weight_in_turn(FP8, weight, rows))
    ]
    assert errors[1] < 0.6 * errors[0]
    turned = round_weight_in_turn(FP8, weight, rows)
    assert np.array_equal(FP8.round(turned, weight_scale(FP8, weight)), turned)


def test_ranges_are_chosen_with_room_for_photographs_that_gave_none() -> None:
    """Each photograph's widest channel is another one, so a range fitted to the others alone would clip it."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(4, 64, 16)).astype(np.float32)
    for number in range(4):
        rows[number, :, number] *= 6
    statistics = InputStatistics(
        rows.min(axis=1).astype(float), rows.max(axis=1).astype(float), rows.mean(axis=(0, 1)).astype(float), rows
    )
    chosen = choose([INT8], statistics, [random.normal(size=(16, 8)).astype(np.float32)], Freedom.ALL)
    moved = move_rows(chosen.equalisation, rows)
    assert chosen.largest > 1.1 * np.abs(moved).max()


def test_a_channel_that_is_quiet_on_all_photographs_has_room_as_the_others_have() -> None:
    random = np.random.default_rng(0)
    rows = np.abs(random.normal(size=(4, 64, 16))).astype(np.float32)
    rows[:, :, 0] = 0.01 * random.random((4, 64)) ** 8  # like GELU's: seldom above zero, and then little
    lowest, highest = rows.min(axis=1).astype(float), rows.max(axis=1).astype(float)
    statistics = InputStatistics(lowest, highest, rows.mean(axis=(0, 1)).astype(float), rows)
    chosen = choose([INT8], statistics, [random.normal(size=(16, 8)).astype(np.float32)], Freedom.ALL)
    awake = rows[0, :1] * 0
    awake[0, 0] = np.median(highest.max(axis=0))
    assert np.abs(move_rows(chosen.equalisation, awake)[0, 0]) < chosen.largest


def test_views_of_a_photograph_count_as_that_photograph(tiny_file: Find, pixels: list[NDArray[np.float32]]) -> None:
    model = load_onnx(tiny_file("traced"))
    (source,) = {
        node.output[0] for node in model.graph.node if node.op_type == "LayerNormalization" and "_4" in node.output[0]
    }
    apart = measure_inputs(model, {source: 32}, pixels[:4], 40)[source]
    views = measure_inputs(model, {source: 32}, [np.concatenate(pixels[:2]), np.concatenate(pixels[2:4])], 40)[source]
    assert np.array_equal(views.lowest, apart.lowest.reshape(2, 2, -1).min(axis=1))
    assert np.array_equal(views.highest, apart.highest.reshape(2, 2, -1).max(axis=1))
    assert np.allclose(views.mean, apart.mean)
    assert views.rows.shape == (2, 20, 32)


def test_few_photographs_are_cut_into_quarters_and_many_are_not(tiny_file: Find) -> None:
    metadata = read_metadata(load_onnx(tiny_file("traced")), "x")
    images = [image for _, image in bundled_photographs()[:2]]
    counts = [[len(views) for views in calibration_pixels(metadata, images * times, (28, 28))] for times in (1, 8)]
    assert counts == [[5, 5], [1] * 16]


def test_layers_named_stay_with_those_that_share_their_input(
    tiny_file: Find, pixels: list[NDArray[np.float32]]
) -> None:
    model = load_onnx(tiny_file("traced"))
    every = quantize_model(model, pixels[:2])
    (first, *_) = every.types
    kept = quantize_model(model, pixels[:2], keep_layers=[first])
    assert len(every.types) - len(kept.types) == 3  # query, key and value
    assert (every.share, kept.share < 1) == (1.0, True)
    assert "21 in int8; 93.8 % of their multiply-adds in 8 bits" in kept.describe()
    with pytest.raises(InvalidArgumentError, match="linear layer 'nobody' is to be kept"):
        quantize_model(model, pixels[:2], keep_layers=["nobody"])


def test_a_quantised_file_is_refused_whatever_quantised_it(tiny_file: Find, pixels: list[NDArray[np.float32]]) -> None:
    model = quantize_model(load_onnx(tiny_file("traced")), pixels[:2]).model
    with pytest.raises(InvalidArgumentError, match=r"x\.onnx is int8 already"):
        quantize_model(model, pixels, name="x.onnx")
    write_metadata(model, read_metadata(model, "").model_copy(update={"quantized": None}))
    with pytest.raises(InvalidArgumentError, match=r"x\.onnx is quantised already"):
        quantize_model(model, pixels, name="x.onnx")


def test_values_without_a_range_are_named(tiny_file: Find, pixels: list[NDArray[np.float32]]) -> None:
    with pytest.raises(InvalidArgumentError, match="holds NaN or infinite values on photograph 2 of 2"):
        quantize_model(load_onnx(tiny_file("traced")), [pixels[0], np.full_like(pixels[0], np.nan)])


def test_a_layer_whose_input_is_zero_or_has_no_scale_stays_as_it_is(
    tiny_file: Find, pixels: list[NDArray[np.float32]]
) -> None:
    for value in (0.0, 1e-40):
        model = load_onnx(tiny_file("traced"))
        norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        for tensor in model.graph.initializer:
            if tensor.name in norm.input[1:]:
                zeros = np.full(tuple(tensor.dims), value, np.float32)
                tensor.CopyFrom(onnx.numpy_helper.from_array(zeros, tensor.name))
        result = quantize_model(model, pixels[:2])
        assert len(result.types) == 21
        assert "stays as it is: what enters is zero on all photographs, or too small" in result.notes[0]


def test_few_and_flat_photographs_are_named(tiny_file: Find, tmp_path: Path) -> None:
    grey = Image.new("RGB", (60, 60), (90, 90, 90))
    photographs = [*bundled_photographs()[:2], ("grey", grey)]
    variant = FileVariant(eight_bit=("int8",))
    notes = make_variant(tiny_file("traced"), tmp_path / "x.onnx", variant, photographs)
    assert notes[0].startswith("calibrated on grey too, of one colour throughout")
    assert notes[1].startswith("calibrated on 2 photographs only: 4 or more")
    assert notes[2] == "linear layers: 24 in int8; 100.0 % of their multiply-adds in 8 bits"


def test_the_costliest_layers_stay_until_a_cosine_is_reached(tiny_file: Find, tmp_path: Path) -> None:
    def make(goal: float) -> tuple[ModelProto, list[str]]:
        path = tmp_path / "x.onnx"
        variant = FileVariant(eight_bit=("int8",), linear_goal=goal)
        notes = make_variant(tiny_file("traced"), path, variant, bundled_photographs()[:4])
        return load_onnx(path), notes

    counts = []
    for goal in (0.9, 0.999999):
        model, notes = make(goal)
        counts.append(sum(node.op_type == "QuantizeLinear" for node in model.graph.node))
    assert notes[0].startswith("kept in fp32 for a cosine of 0.999999: node_MatMul")
    assert counts[0] == 24 + 16  # weights, and the tensors that enter
    assert 0 < counts[1] < counts[0]


def test_a_layer_alone_is_told_from_the_rest(tiny_file: Find, pixels: list[NDArray[np.float32]]) -> None:
    """One layer's scale is made 20 times as coarse."""
    model = quantize_model(load_onnx(tiny_file("traced")), pixels[:2]).model
    first = next(
        node for node in model.graph.node if node.op_type == "QuantizeLinear" and "layer_norm_4" in node.input[0]
    )
    for tensor in model.graph.initializer:
        if tensor.name == first.input[1]:
            coarse = onnx.numpy_helper.to_array(tensor) * 20
            tensor.CopyFrom(onnx.numpy_helper.from_array(coarse, tensor.name))
    costs = measure_layer_costs(model, pixels[:1], "last_hidden_state")
    assert len(costs) == 16
    assert len(costs[0].layers) == 3  # query, key and value of the block with the coarse scale
    assert costs[0].alone < costs[1].alone
    assert costs[0].without > costs[0].everything
    assert costs[-1].without == pytest.approx(1, abs=1e-9)
