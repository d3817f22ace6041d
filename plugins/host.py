"""The built plugin library driven from Python: TensorRT's calls, with tensors' addresses, through `plugins/tests/host.cpp`.

For checks and benchmarks of the library itself where there is a GPU but no TensorRT. Needs `fna plugin --checks`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.errors import CheckFailedError, MissingCapabilityError
from fna.plugins.built import LIBRARY, library_folder

_TENSORRT_TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 3, torch.bfloat16: 7}  # nvinfer1::DataType
_MAX_DIMS = 8


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.c_int64 * _MAX_DIMS),
        ("data", ctypes.c_void_p),
    )


class PluginLibrary:
    """libfna_plugin.so, opened as TensorRT opens it."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or library_folder()
        paths = folder / "libfna_plugin_host.so", folder / LIBRARY
        missing = [path for path in paths if not path.exists()]
        if missing:
            raise MissingCapabilityError(f"{missing[0]} is not built; run: fna plugin --checks")
        self._host = ctypes.CDLL(str(paths[0]))
        pointer, numbers = ctypes.c_void_p, ctypes.c_int32
        tensors = (pointer, ctypes.POINTER(_Tensor), numbers, ctypes.POINTER(_Tensor))
        for name, result, arguments in (
            ("open", pointer, (ctypes.c_char_p,)),
            ("messages", ctypes.c_char_p, (pointer,)),
            ("attention", pointer, (pointer, ctypes.c_float, numbers, numbers)),
            ("masked_attention", pointer, (pointer, ctypes.c_float, numbers, numbers, numbers)),
            ("chebyshev_attention", pointer, (pointer, ctypes.c_float, numbers, numbers, numbers, ctypes.c_float)),
            ("focal", pointer, (pointer, ctypes.c_float, numbers, numbers, numbers)),
            ("sampling", pointer, (pointer, numbers)),
            ("free", None, (pointer,)),
            ("workspace", ctypes.c_size_t, tensors),
            ("prepare", numbers, tensors),
            ("enqueue", numbers, (*tensors, pointer, pointer)),
        ):
            function = getattr(self._host, f"fna_host_{name}")
            function.restype, function.argtypes = result, arguments
        self._library = self._host.fna_host_open(str(paths[1]).encode())
        if not self._library:
            raise MissingCapabilityError(f"{paths[1]} does not load; rebuild it on this machine: fna plugin --checks")

    def attention(
        self, *, scale: float, iterations: int = NEWTON_SCHULZ_ITERATIONS, exact_rows: bool = False
    ) -> Plugin:
        """A FastNystromAttention that went through creation, cloning, serialization and attachment."""
        return self._plugin(self._host.fna_host_attention(self._library, scale, iterations, int(exact_rows)))

    def masked_attention(
        self, *, scale: float, iterations: int = NEWTON_SCHULZ_ITERATIONS, exact_rows: bool = False, sink: bool = False
    ) -> Plugin:
        """A FastNystromAttention of version 2, whose sixth input is a key mask."""
        options = scale, iterations, int(exact_rows), int(sink)
        return self._plugin(self._host.fna_host_masked_attention(self._library, *options))

    def chebyshev_attention(
        self, *, scale: float, steps: int, low: float, exact_rows: bool = False, sink: bool = False
    ) -> Plugin:
        """A FastNystromAttention of version 3 with the cheaper core; its sixth input, a key mask, may be left out."""
        options = scale, int(exact_rows), int(sink), steps, low
        return self._plugin(self._host.fna_host_chebyshev_attention(self._library, *options))

    def focal(self, *, scale: float, prefix_tokens: int, hot: int, masked: bool = False) -> Plugin:
        """A FocalAttention likewise; of version 2, whose eighth input is a key mask, where `masked`."""
        return self._plugin(self._host.fna_host_focal(self._library, scale, prefix_tokens, hot, int(masked)))

    def sampling(self, num_landmarks: int) -> Plugin:
        """A FarthestPointSampling likewise."""
        return self._plugin(self._host.fna_host_sampling(self._library, num_landmarks))

    def messages(self) -> str:
        """What the plugin logged since the last call."""
        return self._host.fna_host_messages(self._library).decode().strip()

    def _plugin(self, address: int | None) -> Plugin:
        if not address:
            raise CheckFailedError(f"the plugin was not created: {self.messages()}")
        return Plugin(self, self._host, address)


class Plugin:
    """One plugin attached to an execution context; keeps the library open."""

    def __init__(self, library: PluginLibrary, host: ctypes.CDLL, address: int) -> None:
        self._library, self._host, self._address = library, host, address

    def __del__(self) -> None:
        self._host.fna_host_free(self._address)

    def workspace_bytes(self, inputs: list[Tensor], output: Tensor) -> int:
        """What getWorkspaceSize asks for."""
        return self._host.fna_host_workspace(self._address, _describe(inputs), len(inputs), _describe([output]))

    def prepare(self, inputs: list[Tensor], output: Tensor) -> None:
        """OnShapeChange: plans, and loads the kernels."""
        self._check(self._host.fna_host_prepare(self._address, _describe(inputs), len(inputs), _describe([output])))

    def enqueue(self, inputs: list[Tensor], output: Tensor, workspace: Tensor) -> None:
        """Launch on PyTorch's current stream; tensors of the CPU are for a driver that has no streams (`fna.plugins.ptx`)."""
        stream = torch.cuda.current_stream().cuda_stream if output.is_cuda else 0
        described = _describe(inputs), len(inputs), _describe([output])
        self._check(self._host.fna_host_enqueue(self._address, *described, workspace.data_ptr(), stream))

    def _check(self, status: int) -> None:
        if status:
            raise CheckFailedError(f"the plugin failed: {self._library.messages()}")


def _describe(tensors: list[Tensor]) -> ctypes.Array[_Tensor]:
    described = (_Tensor * len(tensors))()
    for description, tensor in zip(described, tensors, strict=True):
        description.type, description.rank, description.data = (
            _TENSORRT_TYPES[tensor.dtype],
            tensor.dim(),
            tensor.data_ptr(),
        )
        description.dims[: tensor.dim()] = list(tensor.shape)
    return described
