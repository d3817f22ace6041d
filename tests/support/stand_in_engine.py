"""An engine that runs its ONNX file, or another, on onnxruntime: all of an engine but its arithmetic, on a machine without a GPU.

What is tested with it is what is done with an engine's outputs and debug tensors, not that TensorRT hands them out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from fna.engines.manifest import manifest_path, read_manifest
from fna.files import file_sha256
from fna.validate.budget.fna_nodes import mark_outputs
from fna.validate.budget.runners import OnnxRunner


class StandInEngine:
    def __init__(self, engine: Path, model: ModelProto) -> None:
        self.manifest = read_manifest(engine)
        self._runner = OnnxRunner(model, engine.parent, engine.name)
        self._places = [place.tensor for place in self.manifest.places]
        self._inside = OnnxRunner(mark_outputs(model, self._places), engine.parent, engine.name)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        (pixels,) = inputs.values()
        return self._runner.run(pixels)

    def inspect(self, inputs: dict[str, Any]) -> dict[str, Any]:
        (pixels,) = inputs.values()
        return {name: array.astype(np.float32) for name, array in self._inside.run(pixels, self._places).items()}


def pretend_built_from(engine: Path, onnx: Path) -> None:
    """Have the manifest say that the engine was built from another file: an engine that is not what its file says."""
    manifest = read_manifest(engine)
    changed = manifest.model_copy(update={"onnx_name": onnx.name, "onnx_sha256": file_sha256(onnx)})
    manifest_path(engine).write_text(changed.model_dump_json(), encoding="utf-8")
