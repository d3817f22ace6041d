"""The error budget on the real model and real photographs, and on files broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from fna.errors import InputFileError
from fna.export.files import load_onnx
from fna.export.preprocessing import bundled_photographs
from fna.validate.budget import StepError, validate_file
from fna.validate.metrics import measure
from fna.validate.overlay import draw_overlay


def break_file(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = load_onnx(source)
    change(model)
    target.write_bytes(model.SerializeToString())
    return target


def attention_node(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == "/blocks.8/FastNystromAttention")


def swap_key_and_value(model: onnx.ModelProto) -> None:
    node = attention_node(model)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def change_scale(model: onnx.ModelProto) -> None:
    next(item for item in attention_node(model).attribute if item.name == "scale").f *= 1.1


def test_the_three_errors_of_the_real_model(exported: Path, tmp_path: Path) -> None:
    photographs = bundled_photographs()[:2]
    seen: list[str] = []
    result, outputs = validate_file(exported, photographs, on_step=seen.append)
    approximation, export = result.steps
    assert [step.step for step in result.steps] == ["approximation", "export"]
    tokens = {error.output: error for error in approximation.errors}["tokens"]
    assert 0.9 < tokens.cosine_patches < 0.99999
    assert all(error.relative_l2 < 1e-4 for error in export.errors)
    assert export.failures() == []
    assert len(seen) == 4
    picture = tmp_path / "overlay.png"
    assert draw_overlay(photographs, outputs, result.metadata, picture)
    with Image.open(picture) as image:
        assert image.width > 400
        assert len(set(np.asarray(image.convert("L")).ravel().tolist())) > 50


@pytest.mark.parametrize("change", [swap_key_and_value, change_scale])
def test_a_file_that_computes_something_else_fails_by_name(exported: Path, tmp_path: Path, change: Callable) -> None:
    broken = break_file(exported, tmp_path / "broken.onnx", change)
    result, _ = validate_file(broken, bundled_photographs()[:1])
    failures = result.steps[1].failures()
    assert failures
    assert "export: output saliency has relative L2 error" in failures[0]
    assert "(tolerance 1e-03)" in failures[0]


def test_the_tolerance_can_be_set(exported: Path) -> None:
    result, _ = validate_file(exported, bundled_photographs()[:1], tolerance=1e-12)
    assert len(result.steps[1].failures()) == 2


def test_nan_in_an_output_fails_whatever_the_tolerance() -> None:
    array = np.ones((1, 4))
    step = StepError(step="export", compares="", errors=(measure("x", array, array * np.nan),), tolerance=1e9)
    assert step.failures() == ["export: output x holds 4 NaN or infinite values"]


def test_a_grafted_file_says_that_it_has_no_pytorch_source(exported: Path, tmp_path: Path) -> None:
    def mark(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == "fna.origin").value = "graft"

    with pytest.raises(InputFileError, match="grafted"):
        validate_file(break_file(exported, tmp_path / "grafted.onnx", mark), bundled_photographs()[:1])


def test_another_resolution_than_the_files_is_refused(exported: Path) -> None:
    with pytest.raises(InputFileError, match="takes 224x224.*518x518"):
        validate_file(exported, bundled_photographs()[:1], resolution=(518, 518))
