"""An engine launched again and again on inputs that are on the device already, as one CUDA graph where it allows that."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from fna.errors import CheckFailedError
from fna.runtime import Arrays

_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Replay:
    """An engine with its own context and fixed buffers, launched again and again."""

    def __init__(self, trt: Any, engine: Any, backend: str, inputs: Arrays, profile: int, cuda_graph: bool) -> None:
        from polygraphy import cuda

        self.captured = False
        self._stream = cuda.Stream()
        self._runtime_library = cuda.wrapper()
        self._graph: ctypes.c_void_p | None = None
        self._context = self._make_context(trt, engine, backend, cuda_graph)
        if profile:
            self._context.set_optimization_profile_async(profile, self._stream.ptr)
        self._buffers = []
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for name in sorted(
            names, key=lambda other: other not in inputs
        ):  # inputs first: outputs' shapes follow from theirs
            if name in inputs:
                self._context.set_input_shape(name, inputs[name].shape)
                buffer = cuda.DeviceArray(shape=inputs[name].shape, dtype=inputs[name].dtype)
                buffer.copy_from(inputs[name], self._stream)
            else:
                shape = tuple(self._context.get_tensor_shape(name))
                size = int(np.prod(shape)) * engine.get_tensor_dtype(name).itemsize
                buffer = cuda.DeviceArray.raw((int(size),))
            self._buffers.append(buffer)
            self._context.set_tensor_address(name, buffer.ptr)
        self._enqueue()
        self.wait()
        if cuda_graph and backend == "tensorrt":
            self._capture()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_details: object) -> None:
        for buffer in self._buffers:
            buffer.free()
        self._stream.free()

    def launch(self) -> None:
        """Send one batch to the device."""
        if self._graph is None:
            self._enqueue()
            return
        self._check("cudaGraphLaunch", self._graph, ctypes.c_void_p(self._stream.ptr))

    def wait(self) -> None:
        """Wait until everything sent is done."""
        self._stream.synchronize()

    def launch_and_wait(self) -> None:
        """Send one batch and wait for it."""
        self.launch()
        self.wait()

    def _make_context(self, trt: Any, engine: Any, backend: str, cuda_graph: bool) -> Any:
        if not cuda_graph or backend != "tensorrt-rtx":
            return engine.create_execution_context()
        # TensorRT-RTX captures by itself, after it has compiled its kernels for the chip
        settings = engine.create_runtime_config()
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.captured = True
        return engine.create_execution_context(settings)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.ptr):
            raise CheckFailedError("the engine failed to run; FNA_DEBUG=1 shows more")

    def _capture(self) -> None:
        """Record one run as a graph; an engine that cannot be captured (host work, data-dependent shapes) runs without."""
        stream, graph, instance = ctypes.c_void_p(self._stream.ptr), ctypes.c_void_p(), ctypes.c_void_p()
        library = self._runtime_library.handle
        if library.cudaStreamBeginCapture(stream, _CAPTURE_THREAD_LOCAL):
            return
        enqueued = self._context.execute_async_v3(self._stream.ptr)
        if library.cudaStreamEndCapture(stream, ctypes.byref(graph)) or not enqueued or not graph:
            return
        # WithFlags has had one signature in CUDA 11.4 to 13; the plain call changed its own in 12
        if library.cudaGraphInstantiateWithFlags(ctypes.byref(instance), graph, ctypes.c_ulonglong(0)):
            return
        self._graph, self.captured = instance, True

    def _check(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime_library.handle, name)(*arguments)
        if status:
            raise CheckFailedError(f"{name} failed with CUDA error {status}")
