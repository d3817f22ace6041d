"""Running ONNX files and engines on arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.engines.build import import_tensorrt_rtx
from fna.engines.manifest import Manifest, read_manifest
from fna.errors import InputFileError, MissingCapabilityError

Arrays = dict[str, NDArray[Any]]


def open_onnx(path: Path, *, threads: int = 0) -> Any:
    """Open an ONNX file on onnxruntime's CPU provider.

    Args:
        path: a file that runs on standard operators and its own functions.
        threads: for one operator; 0 takes all cores.

    Raises:
        InputFileError: if onnxruntime cannot load it; the message is its own.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Idle sessions otherwise keep a core spinning, which slows whatever else runs in the process and skews comparisons.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types share no public base
        reason = " ".join(str(error).split())
        raise InputFileError(f"{path} cannot be loaded by onnxruntime: {reason}") from None


def run_onnx(session: Any, inputs: Arrays) -> Arrays:
    """Run one batch through an open session and return its outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def check_engine_can_run(path: Path) -> Manifest:
    """Refuse an engine that this machine cannot run, before anything is deserialised.

    Raises:
        InputFileError: if engine and manifest are not there or do not belong together.
        MissingCapabilityError: if there is no GPU, no TensorRT-RTX, another version of it, or another compute capability.
    """
    manifest = read_manifest(path)
    capability = cuda_capability()
    if capability is None:
        raise MissingCapabilityError(
            f"{path.name} needs an NVIDIA GPU of compute capability {_list(manifest.compute_capabilities)}, "
            "but this machine has none (or no driver); copy it to such a machine, or run the ONNX file here"
        )
    if capability not in manifest.compute_capabilities:
        raise MissingCapabilityError(
            f"{path.name} was built for compute capability {_list(manifest.compute_capabilities)}, but this GPU has "
            f"{capability / 10:.1f}; build it again with a matching --target"
        )
    installed = import_tensorrt_rtx().__version__
    if installed != manifest.backend_version:
        raise MissingCapabilityError(
            f"{path.name} was built by TensorRT-RTX {manifest.backend_version}, but {installed} is installed; "
            "engines run on their own version only: build it again here"
        )
    return manifest


def cuda_capability() -> int | None:
    """Return the first GPU's compute capability times ten, or None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


class RtxEngine:
    """A deserialised TensorRT-RTX engine with its context. Device buffers are allocated anew in each run."""

    def __init__(self, path: Path) -> None:
        """Deserialise an engine.

        Raises:
            InputFileError, MissingCapabilityError: see `check_engine_can_run`.
        """
        from fna.engines.build import make_logger

        self.manifest = check_engine_can_run(path)
        trt = import_tensorrt_rtx()
        self._messages: list[str] = []
        self._logger = make_logger(trt, self._messages)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            reason = self._messages[-1] if self._messages else "no reason given"
            raise MissingCapabilityError(f"{path.name} cannot be deserialised here: {reason}")
        self._context = self._engine.create_execution_context()
        self._input_mode = trt.TensorIOMode.INPUT

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name, on the host."""
        import torch

        stream = torch.cuda.Stream()
        buffers = {}
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        with torch.cuda.stream(stream):
            for name in names:
                if self._engine.get_tensor_mode(name) == self._input_mode:
                    buffers[name] = torch.from_numpy(np.ascontiguousarray(inputs[name])).cuda()
                    self._context.set_input_shape(name, tuple(buffers[name].shape))
            for name in names:
                if name not in buffers:
                    dtype = torch_dtype(str(self._engine.get_tensor_dtype(name)))
                    buffers[name] = torch.empty(tuple(self._context.get_tensor_shape(name)), dtype=dtype, device="cuda")
                self._context.set_tensor_address(name, buffers[name].data_ptr())
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise MissingCapabilityError(f"the engine failed to run: {self._messages[-1:] or 'no reason given'}")
        stream.synchronize()
        return {name: tensor.float().cpu().numpy() for name, tensor in buffers.items() if name not in inputs}


def torch_dtype(name: str) -> Any:
    """Return the torch type of a TensorRT type's name, such as `DataType.HALF`."""
    import torch

    types = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT32": torch.int32,
        "INT64": torch.int64,
    }
    return types[name.rsplit(".", 1)[-1]]


def _list(capabilities: tuple[int, ...]) -> str:
    return ", ".join(f"{capability / 10:.1f}" for capability in capabilities)
