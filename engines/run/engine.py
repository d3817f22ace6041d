"""Running ONNX files and engines on arrays, engines through Polygraphy's runner; and timing them.

Buffers, on the host and on the device, are kept from run to run. What is timed for an engine is the device's work on inputs that are
there already, as one CUDA graph where the engine allows it; for an ONNX file, the call.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from fna.engines.builder.build import make_logger
from fna.engines.device import find_gpu
from fna.engines.flavours import FLAVOURS, default_plugin, import_flavour, load_plugins
from fna.engines.look_inside.debug_tensors import how_to_build, make_listener, set_debug_state
from fna.engines.manifest import Manifest, ShapeRange, read_manifest
from fna.errors import CheckFailedError, InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.files import file_sha256
from fna.runtime import Arrays, Provider, cast_inputs, open_session, run_session

_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Latency(BaseModel):
    """Times of one batch, in milliseconds.

    Attributes:
        median: of all timed runs.
        p99: 99 in 100 runs were no slower.
        fastest: of all.
        slowest: of all.
        throughput: images a second, batches sent one after the other without waiting in between.
        runs: how many were timed, after warm-up.
        batch: images in a batch.
        cuda_graph: whether the device replayed a recorded graph.
        measures: what a time is from and to.
    """

    model_config = ConfigDict(frozen=True)

    median: float
    p99: float
    fastest: float
    slowest: float
    throughput: float
    runs: int
    batch: int
    cuda_graph: bool = False
    measures: str


class Model(Protocol):
    """What `open_model` returns: something that runs batches by input name."""

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name, on the host."""

    def bench(self, inputs: Arrays, *, runs: int, warm_up: int) -> Latency:
        """Time one batch."""

    def close(self) -> None:
        """Free what it holds."""


class OnnxModel:
    """An ONNX file on onnxruntime."""

    def __init__(self, path: Path, *, provider: Provider = "cpu", threads: int = 0) -> None:
        """Open it; errors are those of `open_session`."""
        self._session = open_session(path, threads=threads, provider=provider)
        self._name = path.name
        self._provider = provider

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name."""
        return run_session(self._session, inputs, name=self._name)

    def bench(self, inputs: Arrays, *, runs: int = 50, warm_up: int = 5) -> Latency:
        """Time one batch."""
        typed = cast_inputs(self._session, inputs)
        for _ in range(warm_up):
            self.run(typed)
        seconds = [_timed(lambda: self.run(typed)) for _ in range(runs)]
        device = "with copies to and from the GPU" if self._provider == "cuda" else "on the processor"
        return _summarise(seconds, sum(seconds), typed, measures=f"the call, {device}")

    def close(self) -> None:
        """Free the session."""
        del self._session


def check_engine_can_run(path: Path, plugin: Path | None = None) -> Manifest:
    """Refuse an engine that this machine cannot run, before anything is deserialised.

    Args:
        path: the engine; its manifest lies beside it.
        plugin: the plugin library, for engines that need one; None is where `make plugin` puts it.

    Raises:
        InputFileError: if engine and manifest are not there or do not belong together.
        MissingCapabilityError: if there is no GPU, no such TensorRT flavour, another version of it, another compute capability, or no
            plugin, or another one than the engine was built with.
    """
    manifest = read_manifest(path)
    title = FLAVOURS[manifest.backend].title
    gpu = find_gpu()
    if gpu is None:
        raise MissingCapabilityError(
            f"{path.name} needs an NVIDIA GPU of compute capability {_list(manifest.compute_capabilities)}, "
            "but this machine has none (or no driver); copy it to such a machine, or run the ONNX file here"
        )
    portable = manifest.hardware_compatible and gpu.capability >= 80
    if gpu.capability not in manifest.compute_capabilities and not portable:
        raise MissingCapabilityError(
            f"{path.name} was built for compute capability {_list(manifest.compute_capabilities)}, but this GPU has "
            f"{gpu.capability / 10:.1f}; build it again with a matching --target"
        )
    installed = str(import_flavour(manifest.backend).__version__)
    if not _version_fits(manifest, installed):
        raise MissingCapabilityError(
            f"{path.name} was built by {title} {manifest.backend_version}, but {installed} is installed; "
            "engines run on their own version only: build it again here"
        )
    if manifest.plugin_sha256 is not None:
        library = plugin or default_plugin()
        if not library.is_file():
            raise MissingCapabilityError(
                f"{path.name} needs the plugin {library}, which does not exist; build it: make plugin"
            )
        if file_sha256(library) != manifest.plugin_sha256:
            raise MissingCapabilityError(
                f"{path.name} was built with another {manifest.plugin_name} than {library} (its SHA-256 differs); build the engine "
                "again with this one"
            )
    return manifest


class Engine:
    """A deserialised engine of either flavour, run by Polygraphy."""

    def __init__(self, path: Path, *, plugin: Path | None = None, cuda_graph: bool = True) -> None:
        """Deserialise an engine.

        Raises:
            InputFileError, MissingCapabilityError: see `check_engine_can_run`.
        """
        self.manifest = check_engine_can_run(path, plugin)
        self._name = path.name
        self._listener: Any = None
        self._trt = import_flavour(self.manifest.backend)
        self._cuda_graph = cuda_graph
        self._messages: list[str] = []
        self._logger = make_logger(self._trt, self._messages)
        if self.manifest.plugin_sha256 is not None:
            operators = sorted(
                {
                    (layer.op_type, layer.plugin_version)
                    for layer in self.manifest.layers
                    if layer.implementation == "plugin"
                }
            )
            load_plugins(self._trt, plugin or default_plugin(), operators)
        self._runtime = self._trt.Runtime(self._logger)
        if self.manifest.version_compatible:
            self._runtime.engine_host_code_allowed = True  # the lean runtime that such an engine carries
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise MissingCapabilityError(f"{path.name} cannot be deserialised here: {self._reason()}")
        self._profiles = (self.manifest.profiles, *self.manifest.more_profiles)
        self._profile = 0
        runner = _polygraphy_runner(self.manifest.backend)
        with _polygraphy_errors():
            self._runner = runner(self._engine)
            self._runner.activate()
        if self.manifest.debug_tensors is not None:
            # Polygraphy turns them on and adds them to the outputs
            set_debug_state(self._runner.context, self.manifest.debug_tensors, False)

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name, as fp32, on the host."""
        typed = self._typed(inputs)
        self._choose_profile(typed)
        with _polygraphy_errors():
            outputs = self._runner.infer(typed, copy_outputs_to_host=True)
        return {name: np.array(array, dtype=np.float32) for name, array in outputs.items()}

    def inspect(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the debug tensors by name, as fp32, on the host, in the order in which the engine wrote them.

        Raises:
            InvalidArgumentError: if the engine was built without debug tensors; says how to build it.
            CheckFailedError: if a tensor cannot be read.
        """
        if self.manifest.debug_tensors is None:
            raise InvalidArgumentError(
                f"{self._name} was built without debug tensors; {how_to_build(self.manifest.onnx_name, self._name)}"
            )
        typed = self._typed(inputs)
        self._choose_profile(typed)
        context, listener = self._runner.context, make_listener(self._trt)
        context.set_debug_listener(listener)
        self._listener = listener  # the context keeps no reference
        set_debug_state(context, self.manifest.debug_tensors, True)
        try:
            with _polygraphy_errors():
                self._runner.infer(typed, copy_outputs_to_host=True)
        finally:
            set_debug_state(context, self.manifest.debug_tensors, False)
        if listener.problems:
            raise CheckFailedError(f"a debug tensor cannot be read: {listener.problems[0]}")
        return dict(listener.arrays)

    def bench(self, inputs: Arrays, *, runs: int = 200, warm_up: int = 20) -> Latency:
        """Time one batch on the device: inputs are there already, outputs stay there."""
        typed = self._typed(inputs)
        with _Replay(
            self._trt, self._engine, self.manifest.backend, typed, self._find_profile(typed), self._cuda_graph
        ) as replay:
            for _ in range(warm_up):
                replay.launch()
            replay.wait()
            seconds = [_timed(replay.launch_and_wait) for _ in range(runs)]
            started = time.perf_counter()
            for _ in range(runs):
                replay.launch()
            replay.wait()
            total = time.perf_counter() - started
            return _summarise(
                seconds, total, typed, cuda_graph=replay.captured, measures="launch to end on the GPU, without copies"
            )

    def close(self) -> None:
        """Free the device's memory."""
        self._runner.deactivate()

    def _typed(self, inputs: Arrays) -> Arrays:
        return {
            name: np.ascontiguousarray(array, dtype=np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))))
            for name, array in inputs.items()
        }

    def _choose_profile(self, inputs: Arrays) -> None:
        number = self._find_profile(inputs)
        if number != self._profile:
            self._runner.set_profile(number)
            self._profile = number

    def _find_profile(self, inputs: Arrays) -> int:
        for number, shapes in enumerate(self._profiles):
            if all(name in shapes and _fits(array.shape, shapes[name]) for name, array in inputs.items()):
                return number
        given = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in inputs.items())
        taken = "; ".join(
            f"{name} {'x'.join(map(str, entry.smallest))} to {'x'.join(map(str, entry.largest))}"
            for shapes in self._profiles
            for name, entry in shapes.items()
        )
        raise InvalidArgumentError(f"the engine takes {taken}, but was given {given}; build it with another --batch")

    def _reason(self) -> str:
        return self._messages[-1] if self._messages else "no reason given"


def open_model(path: Path, *, provider: Provider = "cpu", plugin: Path | None = None) -> Model:
    """Open an ONNX file, or an engine with its manifest; which it is, its suffix says."""
    return Engine(path, plugin=plugin) if path.suffix == ".engine" else OnnxModel(path, provider=provider)


class _Replay:
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
            names, key=lambda entry: entry not in inputs
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

    def __enter__(self) -> _Replay:
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


def _polygraphy_runner(backend: str) -> Callable[[Any], Any]:
    """Return Polygraphy's TensorRT runner, which is bound to one flavour when it is first imported."""
    from polygraphy import config

    rtx = backend == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != config.USE_TENSORRT_RTX:
        raise MissingCapabilityError("engines of both TensorRT flavours cannot run in one process; run them one by one")
    config.USE_TENSORRT_RTX = rtx
    from polygraphy.backend.trt import TrtRunner

    runner: Callable[[Any], Any] = TrtRunner
    return runner


@contextmanager
def _polygraphy_errors() -> Iterator[None]:
    """Keep Polygraphy's log off the terminal, and turn its errors into ours."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            yield
    except PolygraphyException as error:
        raise InputFileError(f"the model failed to run: {' '.join(str(error).split())}") from None


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _summarise(
    seconds: Sequence[float], total: float, inputs: Arrays, *, measures: str, cuda_graph: bool = False
) -> Latency:
    values = [value * 1e3 for value in seconds]
    batch = int(next(iter(inputs.values())).shape[0])
    return Latency(
        median=statistics.median(values),
        p99=float(np.percentile(values, 99)),
        fastest=min(values),
        slowest=max(values),
        throughput=batch * len(values) / total,
        runs=len(values),
        batch=batch,
        cuda_graph=cuda_graph,
        measures=measures,
    )


def _version_fits(manifest: Manifest, installed: str) -> bool:
    if installed == manifest.backend_version:
        return True
    built, here = ([int(part) for part in text.split(".")[:3]] for text in (manifest.backend_version, installed))
    return manifest.version_compatible and here[0] == built[0] and here >= built


def _fits(shape: tuple[int, ...], range_: ShapeRange) -> bool:
    return len(shape) == len(range_.smallest) and all(
        low <= side <= high for low, side, high in zip(range_.smallest, shape, range_.largest, strict=True)
    )


def _list(capabilities: tuple[int, ...]) -> str:
    return ", ".join(f"{capability / 10:.1f}" for capability in capabilities)
