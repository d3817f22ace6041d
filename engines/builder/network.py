"""One build by TensorRT's Python API: from a lowered file to a network, a configuration and an engine's bytes."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fna.engines.builder.attention import allow_decomposition, check_attention
from fna.engines.builder.options import BuildOptions
from fna.engines.builder.progress import Progress, make_monitor, run_interruptibly
from fna.engines.device import Gpu
from fna.engines.flavours import FLAVOURS, set_devices, timing_cache_name
from fna.engines.look_inside.debug_tensors import Place, mark_debug_tensors
from fna.engines.look_inside.layers import (
    RequestedLayer,
    check_layers,
    describe_layers,
    has_typed_output,
    read_type,
)
from fna.engines.manifest import ShapeRange
from fna.engines.targets import Target
from fna.errors import BuildError
from fna.export.operators.registry import plugin_operators
from fna.files import LARGEST_SINGLE_FILE, save_model, written_whole


class FusedRefusedError(BuildError):
    """The builder takes the file's attention layers and then cannot build them."""


class EngineBuilder:
    """One build; holds what TensorRT's objects refer to, for as long as they live."""

    def __init__(
        self,
        trt: Any,
        logger: Any,
        messages: list[str],
        options: BuildOptions,
        targets: Sequence[Target],
        places: tuple[Place, ...],
        gpu: Gpu | None,
    ) -> None:
        self._gpu = gpu
        self._trt, self._messages, self._options, self._targets = trt, messages, options, targets
        self.places = places
        self.types: dict[str, str] = {}
        self._logger = logger
        self._title = FLAVOURS[options.backend].title
        self._cache: Any = None

    def build(
        self,
        model: ModelProto,
        profiles: Sequence[dict[str, ShapeRange]],
        plugin_layers: Sequence[RequestedLayer],
        on_progress: Progress | None,
    ) -> bytes:
        """Parse, check, configure and build; returns the engine's bytes.

        Raises:
            BuildError: with the reason of TensorRT's parser or builder.
        """
        trt = self._trt
        builder = trt.Builder(self._logger)
        # by name: the flags were renumbered between TensorRT 10 and 11
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        self._parse(parser, model)
        attentions = allow_decomposition(trt, network)
        check_attention(self._title, model, attentions)
        self._check_network(network, plugin_layers)
        if self._options.debug_tensors is not None:
            outputs = [value.name for value in model.graph.output]
            self.places = mark_debug_tensors(self._title, network, self._options.debug_tensors, self.places, outputs)
        config = builder.create_builder_config()
        for shapes_by_name in profiles:
            profile = builder.create_optimization_profile()
            for name, shapes in shapes_by_name.items():
                profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
            config.add_optimization_profile(profile)
        self._configure(config)
        stop = threading.Event()
        config.progress_monitor = make_monitor(trt, on_progress, stop)
        serialized = run_interruptibly(lambda: builder.build_serialized_network(network, config), stop)
        if serialized is None:
            reason = f"{self._title} could not build the engine: {self._reason()}"
            raise FusedRefusedError(f"{reason}; build with --lowering portable") if attentions else BuildError(reason)
        self._keep_timings(config)
        return bytes(serialized)

    def _parse(self, parser: Any, model: ModelProto) -> None:
        if model.ByteSize() < LARGEST_SINGLE_FILE:
            parsed = parser.parse(model.SerializeToString())
        else:
            with tempfile.TemporaryDirectory() as folder:
                whole = Path(folder) / "model.onnx"
                save_model(model, whole)
                parsed = parser.parse_from_file(str(whole))
        if parsed:
            return
        if parser.num_errors == 0:
            raise BuildError(f"{self._title}'s parser refused the model: {self._reason()}")
        parser_error = parser.get_error(0)
        where = parser_error.node_name() or f"node number {parser_error.node()}"
        more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
        reason = " ".join(str(parser_error.desc()).split())
        raise BuildError(
            f"{self._title}'s parser refused node {where} ({parser_error.node_operator()}): {reason}{more}"
        )

    def _check_network(self, network: Any, plugin_layers: Sequence[RequestedLayer]) -> None:
        """Refuse, before the minutes of a build, a network in which a plugin's layer is missing or has another type."""
        wanted = [layer for layer in plugin_layers if layer.op_type in plugin_operators()]
        if not wanted:
            return
        plugins = {}
        for index in range(network.num_layers):
            network_layer = network.get_layer(index)
            if network_layer.type == self._trt.LayerType.PLUGIN_V3:
                plugins[network_layer.name] = network_layer
        missing = []
        for layer in wanted:
            names = [name for name in plugins if _is_layer_of(name, layer.name)]
            if not names:
                missing.append(layer.name)
                continue
            network_layer = plugins[names[0]]
            typed_output = has_typed_output(layer.op_type)
            network_tensor = network_layer.get_output(0) if typed_output else network_layer.get_input(0)
            self.types[layer.name] = read_type({"DataType": network_tensor.dtype.name})
        if missing:
            raise BuildError(
                f"{self._title}'s parser made no plugin layer of {', '.join(sorted(missing))}: {self._reason()}"
            )
        layers = describe_layers(wanted, "plugin", None)
        check_layers([layer.model_copy(update={"precision": self.types[layer.name]}) for layer in layers])

    def _configure(self, config: Any) -> None:
        trt, options = self._trt, self._options
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers with types, for the inspector
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if not options.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default
        set_devices(trt, config, options.backend, self._targets)
        path = self._timing_path()
        if path is not None:
            stored = path.read_bytes() if path.is_file() else b""
            self._cache = config.create_timing_cache(stored)
            if self._cache is None or not config.set_timing_cache(self._cache, False):
                # damaged, or of another version or device: TensorRT refuses it, and it is written anew
                self._cache = config.create_timing_cache(b"")
                config.set_timing_cache(self._cache, False)

    def _timing_path(self) -> Path | None:
        options = self._options
        if options.timing_cache is None or options.backend != "tensorrt" or self._gpu is None:
            return None
        if options.timing_cache.suffix:
            return options.timing_cache
        options.timing_cache.mkdir(parents=True, exist_ok=True)
        return options.timing_cache / timing_cache_name(options.backend, self._trt.__version__, self._gpu)

    def _keep_timings(self, config: Any) -> None:
        path = self._timing_path()
        if path is None:
            return
        with written_whole(path) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))

    def _reason(self) -> str:
        return " ".join(self._messages[-1].split()) if self._messages else "no reason given"


def _is_layer_of(layer: str, node: str) -> bool:
    """Whether a network layer has a node's name, perhaps with the number that makes it unique."""
    return layer == node or (layer.startswith(f"{node}_") and layer[len(node) + 1 :].isdigit())
