"""What tests of casts and of quantising compare: outputs of two files, and the types that operators take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.export.types import tensor_types
from fna.runtime import open_session, run_session


def outputs_of(path: Path, image: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = open_session(path)
    return list(run_session(session, {session.get_inputs()[0].name: image}).values())


def relative_error(wanted: list[NDArray[np.float32]], found: list[NDArray[np.float32]]) -> float:
    return max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in zip(wanted, found, strict=True))


def types_by_operator(model: ModelProto, op_type: str) -> set[int]:
    types = tensor_types(model)
    return {types[node.input[0]] for node in model.graph.node if node.op_type == op_type}
