"""A client of Triton's HTTP interface with the standard library: the KServe protocol, tensors as raw bytes behind the JSON."""

from __future__ import annotations

import http.client
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.runtime import Arrays

_TYPES = {"UINT8": np.uint8, "FP16": np.float16, "FP32": np.float32}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}
_LENGTH = "Inference-Header-Content-Length"


class RefusedError(Exception):
    """The server answered with an error; `status` is that of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class TritonClient:
    """One connection, kept open; not for several threads.

    Args:
        address: host and port, as in `127.0.0.1:8000`.
        timeout: seconds that an answer may take.
    """

    def __init__(self, address: str, timeout: float = 60.0) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=timeout)

    def infer(self, model: str, array: NDArray[Any], name: str = "raw_image") -> Arrays:
        """Send one input and return all outputs.

        Raises:
            RefusedError: if the server answers with an error.
            OSError: if there is no server.
        """
        tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype]}
        tensor["parameters"] = {"binary_data_size": array.nbytes}
        header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        body, length = self._post(f"/v2/models/{model}/infer", header + array.tobytes(), {_LENGTH: str(len(header))})
        outputs, start = {}, length
        for output in json.loads(body[:length])["outputs"]:
            end = start + output["parameters"]["binary_data_size"]
            values = np.frombuffer(body[start:end], _TYPES[output["datatype"]])
            outputs[output["name"]], start = values.reshape(output["shape"]), end
        return outputs

    def load(self, model: str) -> None:
        """Have a model loaded, anew where it is loaded already.

        Raises:
            RefusedError: if the server does not; with `--model-control-mode=explicit` alone it does.
        """
        self._post(f"/v2/repository/models/{model}/load", b"{}", {})

    def statistics(self, model: str) -> dict[str, Any]:
        """Return what the server counted of a model, as Triton's statistics extension has it."""
        self._connection.request("GET", f"/v2/models/{model}/stats")
        found: dict[str, Any] = json.loads(self._connection.getresponse().read())["model_stats"][0]
        return found

    def _post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[bytes, int]:
        self._connection.request("POST", path, body, headers)
        response = self._connection.getresponse()
        answer = response.read()
        if response.status != http.client.OK:
            raise RefusedError(response.status, answer.decode(errors="replace"))
        return answer, int(response.headers.get(_LENGTH, 0))
