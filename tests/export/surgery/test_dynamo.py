"""Files as torch's dynamo exporter writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import surgery_zoo as zoo
from surgery_helpers import Export, build_transformers_model, graft_and_compare
from torch import nn


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("core_sdpa", 18),
        ("core_sdpa", 23),
        ("packed_timm", 18),
        ("rotary", 24),
        ("core_true_mask", 18),
        ("core_true_mask", 24),
        ("torch_mha_sequence_first", 23),
        ("torch_mha_sequence_first", 24),
    ],
)
def test_the_dynamo_exporter_is_understood(name: str, opset: int, export: Export, tmp_path: Path):
    case = next(case for case in zoo.PLAIN if case.name == name)
    path = export(name, case.make, exporter="dynamo", opset=opset)
    assert graft_and_compare(path, tmp_path).replaced == 2


@pytest.mark.parametrize(
    ("name", "sizes", "opset"), [("dinov3", "dynamic", 20), ("clip", "static", 23), ("dinov2", "static", 21)]
)
def test_transformers_models_through_dynamo(name: str, sizes: str, opset: int, export: Export, tmp_path: Path):
    make: Callable[[], nn.Module] = lambda: build_transformers_model(name, "sdpa")  # noqa: E731
    path = export(f"{name}_sdpa", make, exporter="dynamo", opset=opset, sizes=sizes)
    result = graft_and_compare(path, tmp_path)
    assert result.replaced == 2
    if sizes == "dynamic":
        assert len(set(result.rows[0].tokens)) > 1
        for height, width in ((32, 32), (48, 64)):
            run(tmp_path / "out.onnx", {"x": np.zeros((1, 3, height, width), np.float32)})
