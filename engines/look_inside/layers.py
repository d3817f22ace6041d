"""What an engine really holds: its FNA layers and their types, read from TensorRT's engine inspector.

Builds that report success have been silently fp32, or had lost a layer, so the manifest says what each layer is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from fna.errors import BuildError
from fna.export.operators.registry import OPERATORS, fna_nodes, node_attributes, plugin_operators
from fna.export.types import PRECISION_OF, tensor_types

# As inspectors of 8.x to 11.x write types: "Row major linear FP16 format", "Half", "BFloat16", "Float".
_TYPE_WORDS = (
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"fp16|half|float16"),
    ("int8", r"int8"),
    ("fp32", r"fp32|float32|float"),
    ("int32", r"int32"),
)


@dataclass(frozen=True)
class RequestedLayer:
    """An FNA node of the file that is built, and the type that its floating-point inputs have there."""

    name: str
    op_type: str
    precision: str
    plugin_version: str = "1"


class FnaLayer(BaseModel):
    """An FNA node in an engine.

    Attributes:
        name: of the node in the ONNX file.
        op_type: its operator.
        implementation: the plugin's kernels, or TensorRT's own for standard operators.
        requested: type of its inputs and output in the file; inside, softmax and sums are fp32 whatever this is.
        precision: the type it runs in: by the engine inspector, else by the strongly typed network; of standard operators all that
            their layers give, as in fp16+fp32. None where the engine was not inspected, or names no such layer; `unknown` where
            neither gives a type.
        plugin_version: of the operator's plugin, where one implements it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    op_type: str
    implementation: Literal["plugin", "operators"]
    requested: str
    precision: str | None = None
    plugin_version: str = "1"


def requested_layers(model: ModelProto) -> tuple[RequestedLayer, ...]:
    """Return the FNA nodes of a file with their types, which ONNX's type inference finds."""
    nodes = list(fna_nodes(model.graph))
    if not nodes:
        return ()
    types = tensor_types(model)
    return tuple(
        RequestedLayer(
            node.name,
            node.op_type,
            PRECISION_OF.get(types.get(node.input[0], 0), "unknown"),
            str(node_attributes(node).get("plugin_version", "1")),
        )
        for node in nodes
    )


def describe_layers(
    requested: Sequence[RequestedLayer], lowering: str, information: str | None
) -> tuple[FnaLayer, ...]:
    """Match the FNA nodes of a file with the layers of its engine.

    Args:
        requested: from `requested_layers`.
        lowering: that was built.
        information: the engine inspector's JSON; None where the engine could not be inspected.
    """
    layers = list(_inspected(information)) if information is not None else []
    return tuple(_describe(layer, lowering, layers) for layer in requested)


def with_network_types(
    layers: Sequence[FnaLayer], types: Mapping[str, str]
) -> tuple[tuple[FnaLayer, ...], tuple[str, ...]]:
    """Give layers whose type the inspector does not say the type that they have in the network.

    Args:
        layers: from `describe_layers`.
        types: of the network's plugin layers, by name. The network is strongly typed, so the builder changes none.

    Returns:
        The layers, and the names of those of which the inspector gave no type.
    """
    mute = tuple(layer.name for layer in layers if layer.precision == "unknown")
    typed = (
        layer.model_copy(update={"precision": types.get(layer.name, "unknown")}) if layer.name in mute else layer
        for layer in layers
    )
    return tuple(typed), mute


def check_layers(layers: Sequence[FnaLayer]) -> None:
    """Refuse an engine in which a requested plugin layer is missing, or runs in another type than was asked.

    A type that nothing gives is no reason to refuse.

    Raises:
        BuildError: naming the layers.
    """
    problems = []
    for layer in layers:
        if layer.implementation != "plugin":
            continue
        if layer.precision is None:
            problems.append(f"{layer.name} is not a plugin layer of the engine")
        elif layer.requested in PRECISION_OF.values() and layer.precision not in (layer.requested, "unknown"):
            problems.append(f"{layer.name} runs in {layer.precision}, but {layer.requested} was asked for")
    if problems:
        raise BuildError(
            f"the engine is not what was asked for: {'; '.join(problems)}; check that the plugin supports this size and "
            "type, or build with --lowering portable"
        )


def _describe(layer: RequestedLayer, lowering: str, inspected: Sequence[dict[str, Any]]) -> FnaLayer:
    by_plugin = lowering == "plugin" and layer.op_type in plugin_operators()
    precision = None
    if by_plugin:
        named = [engine_layer for engine_layer in inspected if _names(engine_layer, layer.name)]
        plugins = [
            engine_layer for engine_layer in named if str(engine_layer.get("LayerType", "")).startswith("Plugin")
        ]
        if plugins:
            side = "Outputs" if has_typed_output(layer.op_type) else "Inputs"
            precision = read_type((plugins[0].get(side) or [{}])[0])
    else:
        inside = [engine_layer for engine_layer in inspected if _names_inside(engine_layer, layer.name)]
        types = {read_type(tensor) for engine_layer in inside for tensor in engine_layer.get("Outputs") or []}
        precision = "+".join(sorted(types & {"fp32", "fp16", "bf16", "int8"})) or None
    return FnaLayer(
        name=layer.name,
        op_type=layer.op_type,
        implementation="plugin" if by_plugin else "operators",
        requested=layer.precision,
        precision=precision,
        plugin_version=layer.plugin_version,
    )


def has_typed_output(op_type: str) -> bool:
    """Whether a plugin's output has the type it computes in; landmarks are integers whatever comes in."""
    return OPERATORS[op_type].outputs[0].type == "T"


def read_type(tensor: dict[str, Any]) -> str:
    """Return the type of a tensor in the inspector's words as fp32, fp16, bf16, int8, int32 or unknown."""
    text = " ".join(str(tensor.get(key, "")) for key in ("Format/Datatype", "Datatype", "DataType", "Format")).lower()
    for name, pattern in _TYPE_WORDS:
        if re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", text):
            return name
    return "unknown"


def _inspected(information: str) -> Iterator[dict[str, Any]]:
    try:
        document = json.loads(information)
    except ValueError as error:
        raise BuildError(f"the engine inspector's answer is not JSON ({error})") from None
    for engine_layer in document.get("Layers", []):
        # below detailed verbosity an entry is the layer's name alone
        yield engine_layer if isinstance(engine_layer, dict) else {"Name": str(engine_layer)}


def _names(engine_layer: dict[str, Any], node: str) -> bool:
    """Whether an engine layer is, or comes from, a node of the file: by its name or by the parser's metadata."""
    pattern = rf"(?<![\w/.]){re.escape(node)}(?:_\d+)?(?![\w/.])"
    return any(re.search(pattern, str(engine_layer.get(key, ""))) for key in ("Name", "Metadata"))


def _names_inside(engine_layer: dict[str, Any], node: str) -> bool:
    """Whether an engine layer comes from a node's function body; lowering names its nodes `<node>/<tensor>`."""
    pattern = rf"(?<![\w/.]){re.escape(node)}/"
    return any(re.search(pattern, str(engine_layer.get(key, ""))) for key in ("Name", "Metadata"))
