"""Files that several tests validate: the built-in model exported once, and a tiny one in several precisions and origins."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from onnx import ModelProto
from PIL import Image

from fna.export.metadata import FileMetadata, read_metadata
from fna.export.sources.loading import LoadedModel, load_model
from fna.export.surgery.graft import GraftOptions, graft
from fna.export.trace import TraceOptions, export_onnx, trace_model
from fna.files import load_onnx, save_model
from fna.plan import uniform_plan

SIDE = 224
TINY_SIDE = 112

# Weights ten times the usual size: attention that is far from uniform, so that what is broken in it shows.
FACTORY = """
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=112, patch_size=14)

def tiny():
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZES, initializer_range=0.2, layerscale_value=0.5))

def classifier():
    torch.manual_seed(0)
    labels = {number: f"kind {number}" for number in range(7)}
    return ViTForImageClassification(ViTConfig(**SIZES, initializer_range=0.2, id2label=labels))
"""


@dataclass(frozen=True)
class Tiny:
    """A folder with the tiny model's factory, files and images."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    @property
    def images(self) -> list[tuple[str, Image.Image]]:
        return [(path.name, Image.open(path)) for path in sorted((self.folder / "images").iterdir())]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, saliency_model: LoadedModel) -> Path:
    """The built-in model at 224 pixels, later half FNA, S=64; written once for all workers."""
    folder = tmp_path_factory.getbasetemp().parent
    path = folder / "saliency.onnx"
    with FileLock(folder / "saliency.lock"):
        if not path.exists():
            export_onnx(saliency_model, uniform_plan(12, layers="6-11", landmarks=64), TraceOptions(SIDE, SIDE), path)
    return path


@pytest.fixture(scope="session")
def saliency_model() -> LoadedModel:
    return load_model("dinov2-small-saliency")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny model, traced dense, with FNA in blocks 1 and 2 in each precision, and grafted; once for all workers."""
    folder = tmp_path_factory.getbasetemp().parent / "validate-tiny"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "done").exists():
            (folder / "images").mkdir(parents=True)
            (folder / "validate_tiny.py").write_text(FACTORY)
            random = np.random.default_rng(0)
            for name in ("a", "b"):
                coarse = Image.fromarray(random.integers(0, 255, (6, 5, 3), dtype=np.uint8))
                coarse.resize((120, 100)).save(folder / "images" / f"{name}.png")
            _export_all(folder)
            (folder / "done").touch()
    return Tiny(folder)


def _export_all(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        model = load_model("validate_tiny:tiny")
    finally:
        sys.path.remove(str(folder))
    plan = uniform_plan(3, layers="1-2", landmarks=12)
    for name, chosen, options in (
        ("fp32", plan, TraceOptions(TINY_SIDE, TINY_SIDE)),
        ("fp16", plan, TraceOptions(TINY_SIDE, TINY_SIDE, precision="fp16")),
        ("bf16", plan, TraceOptions(TINY_SIDE, TINY_SIDE, precision="bf16")),
        ("dense", uniform_plan(3, layers="none"), TraceOptions(TINY_SIDE, TINY_SIDE)),
    ):
        save_model(trace_model(model, chosen, options)[0], folder / f"{name}.onnx")
    graft(folder / "dense.onnx", folder / "grafted.onnx", GraftOptions(landmarks=12, layers="1-2"))


@pytest.fixture
def tiny(tiny_files: Tiny, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny files, and their factory importable; the fp32 trace that low precision is compared with is there already."""
    monkeypatch.chdir(tiny_files.folder)
    monkeypatch.setattr("fna.validate.budget.chain.trace_model", lambda _model, _plan, _options: _fp32_twin(tiny_files))
    return tiny_files


def _fp32_twin(tiny_files: Tiny) -> tuple[ModelProto, FileMetadata]:
    model = load_onnx(tiny_files.file("fp32"))
    return model, read_metadata(model, "fp32.onnx")
