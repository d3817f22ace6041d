"""The error budget on the real model and real photographs, on tiny files in every precision, and on files broken on purpose."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_files import break_file, change_weight, set_weight_to_nan
from onnx import ModelProto
from PIL import Image

from fna.engines.lowerings import ProcessorForm
from fna.errors import InputFileError, InvalidArgumentError
from fna.export.metadata import read_metadata, write_metadata
from fna.export.passes import Lowering
from fna.export.passes.lower import lower
from fna.export.passes.precision import cast_model
from fna.export.passes.processor_kernels import PROCESSOR_DOMAIN
from fna.export.passes.quantize import quantize_model
from fna.export.preprocessing import bundled_photographs
from fna.files import load_onnx, save_model
from fna.validate.budget import chain as chain_module
from fna.validate.budget.measure import StepError, validate_file
from fna.validate.metrics import measure
from fna.validate.report.overlay import draw_overlay


def test_the_steps_of_the_real_model(exported: Path, tmp_path: Path) -> None:
    photographs = bundled_photographs()[:2]
    seen: list[tuple] = []
    result, outputs = validate_file(exported, photographs, on_step=lambda *progress: seen.append(progress))
    approximation, export, processor = result.steps
    assert [step.step for step in result.steps] == ["approximation", "export", "processor"]
    tokens = {error.output: error for error in approximation.errors}["tokens"]
    assert 0.9 < tokens.cosine_patches < 0.99999
    assert all(error.relative_l2 < 1e-4 for error in export.errors)
    assert all(0 < error.relative_l2 < 1e-4 for error in processor.errors)
    assert result.failures() == []
    assert ("comparing on coffee", 1, 2) in seen
    assert [block.fna for block in result.blocks] == [False] * 6 + [True] * 6
    assert [block.relative_l2 == 0 for block in result.blocks] == [True] * 6 + [False] * 6
    assert result.landmarks[0].tokens[:3] == (0, 1, 5)
    assert result.fna_types == {str(block): "fp32" for block in range(6, 12)}
    picture = tmp_path / "overlay.png"
    assert draw_overlay(photographs, outputs, result.metadata, picture)
    with Image.open(picture) as image:
        assert image.width > 400
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 50


def test_a_kernel_of_the_processor_that_computes_something_else_is_caught(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_scale(model: ModelProto, lowering: Lowering) -> ModelProto:
        lowered = lower(model, lowering)
        for node in lowered.graph.node:
            for attribute in node.attribute:
                if node.domain == PROCESSOR_DOMAIN and attribute.name == "scale":
                    attribute.f *= 1.2
        return lowered

    monkeypatch.setattr(chain_module, "lower", wrong_scale)
    result, _ = validate_file(tiny.file("fp32"), tiny.images[:1])
    assert {line.split(":")[0] for line in result.failures()} == {"processor"}


def test_without_kernels_for_the_processor_there_is_no_such_step(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_module, "processor_form", lambda: ProcessorForm("onnxruntime-cpu", None))
    result, _ = validate_file(tiny.file("fp32"), tiny.images[:1])
    assert [step.step for step in result.steps] == ["approximation", "export"]


@pytest.mark.parametrize(("precision", "digits"), [("fp16", 11), ("bf16", 8)])
def test_a_file_in_low_precision_has_a_step_of_its_own(tiny, precision: str, digits: int) -> None:
    result, _ = validate_file(tiny.file(precision), tiny.images)
    assert [step.step for step in result.steps] == ["approximation", "export", "precision"]
    export, rounding = (max(error.relative_l2 for error in step.errors) for step in result.steps[1:])
    assert export < 1e-5  # measured in fp32, whatever the file is
    assert 2.0**-digits / 20 < rounding < 2.0**-digits * 40
    assert set(result.fna_types.values()) == {precision}
    assert "hides overflow" in result.notes[0]


def test_a_file_that_was_cast_has_the_step_as_well(tiny, tmp_path: Path) -> None:
    path = tmp_path / "cast.onnx"
    save_model(cast_model(load_onnx(tiny.file("fp32")), "fp16"), path)
    result, _ = validate_file(path, tiny.images[:1])
    (error, *_) = result.steps[2].errors
    assert 1e-5 < error.relative_l2 < 1e-2


def test_int8_linear_layers_are_a_precision_step_of_their_own(tiny, tmp_path: Path) -> None:
    model = load_onnx(tiny.file("fp32"))
    preprocessing = read_metadata(model, "").preprocessing
    path = tmp_path / "int8.onnx"
    pixels = [preprocessing.apply(image, 112, 112)[None] for _, image in tiny.images]
    save_model(quantize_model(model, pixels).model, path)
    result, _ = validate_file(path, tiny.images[:1])
    step = result.steps[2]
    assert (step.step, step.tolerance) == ("precision", 0.1)
    assert "int8" in step.compares
    assert 1e-3 < max(error.relative_l2 for error in step.errors) < 0.1


def test_portable_and_plugin_lowered_files_are_as_good_as_the_one_they_came_from(tiny, tmp_path: Path) -> None:
    for lowering in ("portable", "plugin"):
        path = tmp_path / f"{lowering}.onnx"
        path.write_bytes(lower(load_onnx(tiny.file("fp32")), lowering).SerializeToString())
        result, _ = validate_file(path, tiny.images[:1])
        assert max(error.relative_l2 for error in result.steps[1].errors) < 1e-5


def test_a_grafted_file_is_compared_with_its_own_original(tiny) -> None:
    result, _ = validate_file(tiny.file("grafted"), tiny.images)
    approximation, export, *_ = result.steps
    assert result.original is not None
    assert result.original.endswith("dense.onnx")
    traced, _ = validate_file(tiny.file("fp32"), tiny.images)
    for ours, theirs in zip(approximation.errors, traced.steps[0].errors, strict=True):
        assert ours.relative_l2 == pytest.approx(theirs.relative_l2, rel=1e-2)
    outputs = [error.output for error in export.errors]
    assert outputs[:2] == [
        "last_hidden_state",
        "pooler_output",
    ]  # with exact attention in its nodes, against the original
    assert [name.rsplit("/", 1)[-1] for name in outputs[2:]] == ["fna_block_1", "fna_block_2"]
    assert all(error.relative_l2 < 1e-5 for error in export.errors)
    assert result.landmarks[0].tokens == traced.landmarks[0].tokens


def test_a_grafted_file_with_another_scale_fails_at_its_node(tiny, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name.endswith("fna_block_2"))
        next(item for item in node.attribute if item.name == "scale").f *= 1.1

    broken = break_file(tiny.file("grafted"), tmp_path / "broken.onnx", change)
    result, _ = validate_file(broken, tiny.images[:1], original=tiny.file("dense"))
    *outputs, node = result.steps[1].failures()
    assert "fna_block_2 has relative L2 error" in node
    assert [line.split()[2] for line in outputs] == ["last_hidden_state", "pooler_output"]


def test_another_original_is_refused_by_its_hash(tiny) -> None:
    with pytest.raises(InputFileError, match="not the file that grafted.onnx was grafted from: its SHA-256 begins"):
        validate_file(tiny.file("grafted"), tiny.images, original=tiny.file("fp32"))


def test_a_missing_original_is_asked_for(tiny, tmp_path: Path) -> None:
    alone = tmp_path / "grafted.onnx"
    alone.write_bytes(tiny.file("grafted").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        with pytest.raises(InputFileError, match="dense.onnx is not beside it; give the original as --original FILE"):
            validate_file(alone, tiny.images)


def test_a_traced_file_takes_no_original(tiny) -> None:
    with pytest.raises(InvalidArgumentError, match="was traced from validate_tiny:tiny.*leave --original out"):
        validate_file(tiny.file("fp32"), tiny.images, original=tiny.file("dense"))


def test_tolerances_can_be_set_per_step(tiny) -> None:
    result, _ = validate_file(tiny.file("fp32"), tiny.images[:1], tolerances={"approximation": 1e-9, "export": 1e-12})
    assert {line.split(":")[0] for line in result.failures()} == {"approximation", "export"}
    assert "output last_hidden_state has relative L2 error" in result.failures()[0]
    assert "(tolerance 1e-09)" in result.failures()[0]


def test_nan_in_an_output_fails_whatever_the_tolerance() -> None:
    array = np.ones((1, 4))
    step = StepError(step="export", compares="", errors=(measure("x", array, array * np.nan),), tolerance=1e9)
    assert step.failures() == ["export: output x holds 4 NaN or infinite values"]


def test_the_first_tensor_that_is_not_finite_is_reported_first_with_its_block(tiny, tmp_path: Path) -> None:
    broken = break_file(
        tiny.file("fp32"), tmp_path / "nan.onnx", partial(set_weight_to_nan, scope="model.encoder.layer.1.mlp.fc2")
    )
    result, _ = validate_file(broken, tiny.images[:1])
    (found,) = result.not_finite
    assert (found.step, found.image, found.op_type, found.block) == ("export", "a.png", "MatMul", 1)
    assert result.failures()[0] == found.describe()
    assert "NaN" in result.failures()[1]


def test_an_fp16_overflow_is_found_with_its_tensor_and_block(tiny, tmp_path: Path) -> None:
    grow = partial(change_weight, scope="model.encoder.layer.2.mlp.fc1", factor=30000.0)
    broken = break_file(tiny.file("fp16"), tmp_path / "overflow.onnx", grow)
    result, _ = validate_file(broken, tiny.images[:1])
    (found,) = result.not_finite
    assert (found.step, found.block) == ("precision", 2)
    assert found.op_type in ("MatMul", "Add", "Mul", "Div")
    assert "NaN or infinite values on a.png, first in tensor" in result.failures()[0]


def test_another_resolution_than_the_files_is_refused(tiny) -> None:
    with pytest.raises(InputFileError, match="takes 112x112.*518x518"):
        validate_file(tiny.file("fp32"), tiny.images[:1], resolution=(518, 518))


def test_no_images_is_an_error_of_its_own(tiny) -> None:
    with pytest.raises(InputFileError, match="no images"):
        validate_file(tiny.file("fp32"), [])


def add_an_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, 8]))


def rename_an_output(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["something" if name == "pooler_output" else name for name in node.output]
    next(item for item in model.graph.output if item.name == "pooler_output").name = "something"


def claim_another_size(model: onnx.ModelProto) -> None:
    metadata = read_metadata(model, "")
    write_metadata(model, metadata.model_copy(update={"height": 56, "width": 56}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (add_an_input, r"broken.onnx has 2 inputs \(pixel_values .*input_ids \[1, 8\]\), but one, a batch of RGB images"),
        (rename_an_output, "has outputs last_hidden_state, something, but its model gives last_hidden_state, pooler_output"),
        (claim_another_size, "takes images of height 112, but its metadata says 56"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_its_models_is_refused_in_one_line(tiny, tmp_path: Path, change, said: str) -> None:
    broken = break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change)
    with pytest.raises(InputFileError, match=said):
        validate_file(broken, tiny.images[:1])
