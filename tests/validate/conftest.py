"""One real export of the built-in model, shared by the tests that validate it."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from fna.export.sources import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import uniform_plan

SIDE = 224


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model at 224 pixels, later half FNA, S=64; written once for all workers."""
    folder = tmp_path_factory.getbasetemp().parent
    path = folder / "saliency.onnx"
    with FileLock(folder / "saliency.lock"):
        if not path.exists():
            plan = uniform_plan(12, layers="6-11", landmarks=64)
            export_onnx(load_model("dinov2-small-saliency"), plan, TraceOptions(SIDE, SIDE), path)
    return path
