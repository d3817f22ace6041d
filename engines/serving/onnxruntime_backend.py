"""A Triton backend named `onnxruntime` for a server that has only the Python backend: this file is its `model.py`.

Triton reads the same config.pbtxt with it as with the backend that its image has. It runs in Triton's own Python process, so it
imports nothing of this project. It stacks the requests that the batcher handed over where their shapes agree.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path[:0] = os.environ["FNA_TRITON_PYTHONPATH"].split(os.pathsep)

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as triton  # type: ignore[import-not-found]  # noqa: E402


class TritonPythonModel:
    """One instance of a model; Triton calls its methods by name."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Leave the configuration as it is written."""
        return auto_complete_model_config

    def initialize(self, args: dict[str, str]) -> None:
        """Open the version's ONNX file."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["FNA_TRITON_THREADS"])
        options.log_severity_level = 4  # errors come back with the response
        path = folder / args["model_version"] / config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run requests of equal shapes together, and give each its own part; an error is that of its group alone."""
        arrays = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        groups = defaultdict(list)
        for index, array in enumerate(arrays):
            groups[tuple(array[name].shape[1:] for name in self.inputs)].append(index)
        responses: list[Any] = [None] * len(requests)
        for members in groups.values():
            for index, response in zip(members, self._run([arrays[index] for index in members]), strict=True):
                responses[index] = response
        return responses

    def _run(self, group: list[dict[str, Any]]) -> list[Any]:
        try:
            stacked = {name: np.concatenate([arrays[name] for arrays in group]) for name in self.inputs}
            results = self.session.run(self.outputs, stacked)
        except Exception as error:
            text = f"onnx runtime error: {str(error).splitlines()[0]}"
            return [triton.InferenceResponse(error=triton.TritonError(text)) for _ in group]
        ends = np.cumsum([arrays[self.inputs[0]].shape[0] for arrays in group])[:-1]
        parts = zip(*(np.split(result, ends) for result in results), strict=True)
        return [
            triton.InferenceResponse([triton.Tensor(n, a) for n, a in zip(self.outputs, arrays, strict=True)])
            for arrays in parts
        ]
