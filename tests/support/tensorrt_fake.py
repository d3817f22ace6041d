"""A recorded fake of TensorRT's builder, for what no machine here can run: the TensorRT flavour, and plugin layers.

Its classes have exactly the members that a version's own bindings have (`tensorrt_surface`): anything else raises
AttributeError, as it would there. Every call and assignment is recorded. What it answers was written by hand after TensorRT's
documentation; it proves that the calls exist and come in order, not that TensorRT does what they say.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import onnx
from tensorrt_surface import Surface


class FakeTensorRT:
    """The module.

    Args:
        surface: what exists in this version.
        version: of TensorRT.
        layer_type: what the engine inspector says that plugin layers run in.
        network_type: name of the type that the network's plugin layers have.
        lost: a layer that vanishes.
        parsed_away: a node that the parser does not give to the plugin.
        mute: whether the inspector gives no types even where it has an execution context with all shapes.
    """

    def __init__(
        self,
        surface: Surface,
        version: str,
        *,
        layer_type: str = "Half",
        network_type: str = "HALF",
        lost: str = "",
        parsed_away: str = "",
        mute: bool = False,
    ) -> None:
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.settings: dict[str, Any] = {}
        self.layer_type, self.network_type, self.lost, self.parsed_away = layer_type, network_type, lost, parsed_away
        self.mute = mute
        self.nodes: list[onnx.NodeProto] = []
        self.loaded: list[str] = []
        self._surface = surface

    def __getattr__(self, name: str) -> Any:
        if name not in self._surface:
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")
        if name in ("ILogger", "IProgressMonitor"):
            return self._base(name)
        if name == "get_plugin_registry":
            return lambda: self._object("IPluginRegistry")
        members = self._surface[name]
        if isinstance(members, dict) and {"name", "value"} <= set(members):  # an enumeration
            return SimpleNamespace(**{member: _Member(name, member, index) for index, member in enumerate(members)})
        return lambda *arguments: self._object(name, arguments)

    def _base(self, name: str) -> type:
        severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal error")
        return type(name, (), {"__init__": lambda self: None, "Severity": severity})

    def _object(self, class_name: str, arguments: tuple[Any, ...] = ()) -> Any:
        self.calls.append((class_name, arguments))
        return _Object(self, class_name, self._surface[class_name])

    def answer(self, class_name: str, member: str, arguments: tuple[Any, ...]) -> Any:
        """What a call returns."""
        key = f"{class_name}.{member}"
        self.calls.append((key, arguments))
        made = {
            "Builder.create_network": "INetworkDefinition",
            "Builder.create_builder_config": "IBuilderConfig",
            "Builder.create_optimization_profile": "IOptimizationProfile",
            "IBuilderConfig.create_timing_cache": "ITimingCache",
            "IBuilderConfig.get_timing_cache": "ITimingCache",
            "Runtime.deserialize_cuda_engine": "ICudaEngine",
            "ICudaEngine.create_engine_inspector": "EngineInspector",
            "ICudaEngine.create_execution_context": "IExecutionContext",
        }
        if key == "Runtime.deserialize_cuda_engine" and not self._may_deserialise():
            return None
        if key in made:
            return self._object(made[key])
        if key == "OnnxParser.parse":
            model = onnx.ModelProto.FromString(arguments[0])
            self.nodes = [node for node in model.graph.node if node.domain == "fna" and node.name != self.parsed_away]
            return True
        if key == "INetworkDefinition.get_layer":
            node = self.nodes[arguments[0]]
            dtype = getattr(self.DataType, self.network_type)
            outputs, inputs = (
                [SimpleNamespace(name=name, dtype=dtype) for name in names] for names in (node.output, node.input)
            )
            return SimpleNamespace(
                name=node.name,
                type=self.LayerType.PLUGIN_V3,
                num_outputs=len(outputs),
                get_output=outputs.__getitem__,
                get_input=inputs.__getitem__,
            )
        if key == "IPluginRegistry.load_library":
            self.loaded.append(arguments[0])
        if key == "Builder.build_serialized_network":
            return self._build()
        if key == "ITimingCache.serialize":
            return b"timings"
        if key == "EngineInspector.get_engine_information":
            return self._inspect()
        return True

    def read(self, class_name: str, member: str) -> Any:
        """What a property holds."""
        if (class_name, member) == ("INetworkDefinition", "num_layers"):
            return len(self.nodes)
        if (class_name, member) == ("IPluginRegistry", "all_creators"):
            names = ("FastNystromAttention", "FarthestPointSampling") if self.loaded else ()
            return [SimpleNamespace(name=name, plugin_version="1", plugin_namespace="") for name in names]
        if (class_name, member) == ("OnnxParser", "num_errors"):
            return 0
        return None

    def _build(self) -> bytes | None:
        monitor = self.settings.get("IBuilderConfig.progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            for step in range(2):
                if not monitor.step_complete("Building", step):
                    return None
            monitor.phase_finish("Building")
        return b"engine"

    def arguments_of(self, key: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of a function."""
        return [arguments for name, arguments in self.calls if name == key]

    def _may_deserialise(self) -> bool:
        """A version compatible engine carries host code, which a runtime runs only where that was allowed before."""
        compatible = (self.BuilderFlag.VERSION_COMPATIBLE,) in self.arguments_of("IBuilderConfig.set_flag")
        return not compatible or self.settings.get("Runtime.engine_host_code_allowed") is True

    def _knows_formats(self) -> bool:
        """NvInferRuntime.h on setExecutionContext: without one that has all shapes, dynamic layers have no format."""
        profiles = self.arguments_of("IOptimizationProfile.set_shape")
        dynamic = any(smallest != largest for _, smallest, _, largest in profiles)
        shaped = {name for name, _ in self.arguments_of("IExecutionContext.set_input_shape")}
        has_context = self.settings.get("EngineInspector.execution_context") is not None
        return not self.mute and (not dynamic or (has_context and shaped >= {name for name, *_ in profiles}))

    def _inspect(self) -> str:
        said = f"Row major linear {self.layer_type} format" if self._knows_formats() else "N/A due to dynamic shapes"
        layers: list[dict[str, Any]] = [
            {"Name": "patches", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}
        ]
        for node in self.nodes:
            if node.name == self.lost:
                continue
            tensor = {"Name": "x", "Format/Datatype": said}
            layers.append({"Name": node.name, "LayerType": "PluginV3", "Inputs": [tensor], "Outputs": [tensor]})
        return json.dumps({"Layers": layers, "Bindings": []})


class _Member(int):
    """A member of an enumeration; equal to itself and usable as a shift."""

    def __new__(cls, enumeration: str, name: str, value: int) -> _Member:
        made = super().__new__(cls, value)
        made.text, made.name = f"{enumeration}.{name}", name
        return made

    def __repr__(self) -> str:
        return self.text


class _Object:
    """An object of one of the module's classes; only that class's members exist."""

    def __init__(self, fake: FakeTensorRT, class_name: str, members: dict[str, str]) -> None:
        self.__dict__.update(_fake=fake, _class=class_name, _members=members)

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"'{self._class}' object has no attribute {name!r}")
        if self._members[name].startswith(f"{name}("):
            return lambda *arguments: self._fake.answer(self._class, name, arguments)
        return self._fake.read(self._class, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._members:
            raise AttributeError(f"'{self._class}' object has no attribute {name!r}")
        self._fake.settings[f"{self._class}.{name}"] = value
