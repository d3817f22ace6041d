"""Engines run on arrays, through Polygraphy's runner.

Buffers, on the host and on the device, are kept from run to run.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fna.engines.flavours import default_plugin, import_flavour, load_plugins, make_logger
from fna.engines.look_inside.debug_tensors import how_to_build, make_listener, set_debug_state
from fna.engines.manifest import ShapeRange
from fna.engines.run.latency import Latency, seconds_of, summarise
from fna.engines.run.replay import Replay
from fna.engines.run.requirements import check_engine_can_run
from fna.errors import CheckFailedError, InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.runtime import Arrays


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
        # also where the constructor fails from here on, or what runs the engine does
        self._deactivate = weakref.finalize(self, self._runner.deactivate)
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
        with Replay(
            self._trt, self._engine, self.manifest.backend, typed, self._find_profile(typed), self._cuda_graph
        ) as replay:
            for _ in range(warm_up):
                replay.launch()
            replay.wait()
            seconds = [seconds_of(replay.launch_and_wait) for _ in range(runs)]
            started = time.perf_counter()
            for _ in range(runs):
                replay.launch()
            replay.wait()
            total = time.perf_counter() - started
            return summarise(
                seconds, total, typed, cuda_graph=replay.captured, measures="launch to end on the GPU, without copies"
            )

    def close(self) -> None:
        """Free the device's memory."""
        self._deactivate()

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
        shapes_given = ", ".join(f"{name} {'x'.join(map(str, array.shape))}" for name, array in inputs.items())
        taken = "; ".join(
            f"{name} {'x'.join(map(str, range_.smallest))} to {'x'.join(map(str, range_.largest))}"
            for shapes in self._profiles
            for name, range_ in shapes.items()
        )
        raise InvalidArgumentError(
            f"the engine takes {taken}, but was given {shapes_given}; build it with another --batch"
        )

    def _reason(self) -> str:
        return self._messages[-1] if self._messages else "no reason given"


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


def _fits(shape: tuple[int, ...], range_: ShapeRange) -> bool:
    return len(shape) == len(range_.smallest) and all(
        low <= side <= high for low, side, high in zip(range_.smallest, shape, range_.largest, strict=True)
    )
