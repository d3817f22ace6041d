"""Models that the export tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_files import make_tiny_dinov2

from fna.export.sources.loading import LoadedModel, load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import uniform_plan


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """The tiny DINOv2 as a model source."""
    from fna.export.sources.loading import wrap_model

    return wrap_model("tests:tiny_dinov2", make_tiny_dinov2())


@pytest.fixture(scope="session")
def planted_model() -> LoadedModel:
    """A tiny DINOv2 with two massive tokens: their position embedding is huge."""
    from fna.export.sources.loading import wrap_model

    module = make_tiny_dinov2()
    with torch.no_grad():
        module.embeddings.position_embeddings[:, [4, 11]] *= 600
    return wrap_model("tests:planted", module)


@pytest.fixture(scope="session")
def planted_file(planted_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model as someone else might have exported it."""
    path = tmp_path_factory.mktemp("planted") / "dense.onnx"
    export_onnx(planted_model, uniform_plan(4, layers="none"), TraceOptions(56, 56), path)
    return path


@pytest.fixture(scope="session")
def saliency_model() -> LoadedModel:
    """The built-in model with its real weights."""
    return load_model("dinov2-small-saliency")
