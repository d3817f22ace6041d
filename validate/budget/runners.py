"""One image in, named fp32 arrays out: PyTorch, ONNX Runtime and engines behind the same call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.errors import InputFileError
from fna.export.operators.registry import OPERATORS, attach_functions, fna_nodes
from fna.runtime import Arrays, open_session, run_session

Run = Callable[[NDArray[np.float32]], Arrays]
"""Takes pixels `[1, 3, H, W]`, returns arrays with a batch axis of 1."""

_FLOAT_INPUTS = ("tensor(float)", "tensor(float16)", "tensor(double)")


class OnnxRunner:
    """An ONNX model on ONNX Runtime's CPU provider.

    Attributes:
        outputs: names of the graph's outputs.
        height: of the input; None where it is open.
        width: of the input; None where it is open.
    """

    def __init__(
        self, model: ModelProto | Path, folder: Path, name: str, *, optimise: bool = True, operators: Path | None = None
    ) -> None:
        """Open a session.

        Args:
            model: the model, or the path of its file.
            folder: where the model's external data lies, if it has any.
            name: says in errors which file it is.
            optimise: let ONNX Runtime fuse operators; off where every tensor must be as the file says.
            operators: library of operators beyond ONNX Runtime's own that the model calls.

        Raises:
            InputFileError: if ONNX Runtime cannot load it, or its input is no batch of RGB images.
        """
        self._session = open_session(model, name=name, folder=folder, optimise=optimise, operators=operators)
        self._name = name
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._input, self._batch, self._channels_last = _check_inputs(self._session.get_inputs(), name)
        sides = self._input.shape[1:3] if self._channels_last else self._input.shape[-2:]
        self.height, self.width = (side if isinstance(side, int) else None for side in sides)

    def run(self, pixels: NDArray[np.float32], outputs: Sequence[str] | None = None) -> Arrays:
        """Run one image `[1, 3, H, W]`; a file with a fixed batch gets the image that many times.

        Raises:
            InputFileError: with ONNX Runtime's reason.
        """
        batch = np.repeat(pixels, self._batch, axis=0)
        if self._channels_last:
            batch = batch.transpose(0, 2, 3, 1)
        arrays = run_session(self._session, {self._input.name: batch}, outputs, name=self._name)
        return {name: _first_image(array, self._batch) for name, array in arrays.items()}


def _first_image(array: NDArray[Any], batch: int) -> NDArray[Any]:
    values = array[:1] if batch > 1 and array.ndim and len(array) == batch else array
    return values.astype(np.float32) if values.dtype.kind == "f" or values.dtype.name == "bfloat16" else values


def _check_inputs(inputs: Sequence[Any], name: str) -> tuple[Any, int, bool]:
    """Return the image input, its fixed batch (else 1), and whether channels come last."""
    listed = ", ".join(f"{value.name} {value.shape}" for value in inputs) or "none"
    if len(inputs) != 1:
        raise InputFileError(
            f"{name} has {len(inputs)} inputs ({listed}), but one, a batch of RGB images, is needed; "
            "cut the vision part out first, by polygraphy surgeon extract for example"
        )
    (value,) = inputs
    scenes = len(value.shape) == 5 and value.shape[2] == 3  # [batch, frames, 3, height, width]
    if not scenes and (len(value.shape) != 4 or 3 not in (value.shape[1], value.shape[3])):
        raise InputFileError(f"{name} takes {listed}, but images [batch, 3, height, width] are needed")
    if value.type not in _FLOAT_INPUTS:
        raise InputFileError(f"{name} takes {value.type} images, but a floating-point type that NumPy has is needed")
    batch = value.shape[0] if isinstance(value.shape[0], int) else 1
    return value, batch, not scenes and value.shape[1] != 3


def with_functions(model: ModelProto) -> ModelProto:
    """Return the model with bodies for its `fna` nodes, which a plugin-lowered file does not carry."""
    known = {(function.domain, function.name) for function in model.functions}
    if all((node.domain, node.op_type) in known for node in fna_nodes(model.graph)):
        return model
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kinds = {types.get(node.input[0], 0) for node in fna_nodes(model.graph) if OPERATORS[node.op_type].attends}
    attach_functions(model, kinds.pop() if len(kinds) == 1 else 0)
    return model
