"""The ONNX files of a bundle: a model in every form that its device may be given, with one file of weights between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto

from fna.engines.builder.attention import prepare_attention
from fna.engines.bundle.format import BundledModel, BundleManifest, PluginLayer
from fna.engines.look_inside.layers import requested_layers
from fna.engines.lowerings import check_fused
from fna.errors import InputFileError
from fna.export.operators.registry import fna_nodes, has_plugin, plugin_operators
from fna.export.passes import Lowering
from fna.export.passes.lower import lower

INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file, where shape inference can read them."""


def bundled_lowerings(model: ModelProto, wanted: Iterable[Lowering]) -> tuple[Lowering, ...]:
    """Return the forms that a bundle holds of a file, of those that its devices are to be given: `portable`, which all take, last."""
    left_out = {"portable"}
    if not any(has_plugin(node) for node in fna_nodes(model.graph)):
        left_out.add("plugin")
    if check_fused(model) is not None:
        left_out.add("fused")
    return (*(lowering for lowering in dict.fromkeys(wanted) if lowering not in left_out), "portable")


def write_models(
    model: ModelProto, source: Path, root: Path, precision: str, stem: str, lowerings: Sequence[Lowering]
) -> tuple[BundledModel, ...]:
    """Write a model in several forms into `root`, with one file of weights between them.

    Args:
        model: loaded without its external data; changed in place, so that its tensors refer to the weights file.
        source: the folder that its external data is relative to.
        root: of the bundle.
        precision: of the file.
        stem: what the files' names begin with.
        lowerings: the forms.
    """
    weights = f"{stem}.weights"
    wrote = split_weights(model, source, root / weights)
    models = []
    for lowering in lowerings:
        name = f"{stem}.{lowering}.onnx"
        lowered = lower(model, lowering)
        if lowering == "fused":  # no builder of this project touches it on the device
            lowered = prepare_attention(lowered)
        (root / name).write_bytes(lowered.SerializeToString(deterministic=True))
        models.append(
            BundledModel(path=name, weights=weights if wrote else None, lowering=lowering, precision=precision)
        )
    return tuple(models)


def split_weights(model: ModelProto, source: Path, weights: Path) -> bool:
    """Move a model's large tensors to one file, in graph order, and have the model refer to it by its name.

    Returns:
        Whether there were any; otherwise no file is written.

    Raises:
        InputFileError: if the model's external data is missing, too short, or outside the folder of the file.
    """
    with weights.open("wb") as output:
        for tensor in model.graph.initializer:
            data = _tensor_bytes(tensor, source)
            if data is None:
                continue
            output.write(b"\0" * (-output.tell() % 64))
            offset = output.tell()
            output.write(data)
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", weights.name), ("offset", str(offset)), ("length", str(len(data)))):
                tensor.external_data.add(key=key, value=value)
        size = output.tell()
    if size == 0:
        weights.unlink()
    return size > 0


def plugin_layers(model: ModelProto, precision: str) -> tuple[PluginLayer, ...]:
    """Return the nodes of a file that the plugin implements, with the types they compute in."""
    return tuple(
        PluginLayer(name=layer.name, op_type=layer.op_type, precision={precision: layer.precision})
        for layer in requested_layers(model)
        if layer.op_type in plugin_operators()
    )


def join_layers(layers: Sequence[tuple[PluginLayer, ...]]) -> tuple[PluginLayer, ...]:
    """Join the layers of the same model in several precisions."""
    types: dict[str, dict[str, str]] = {}
    operators = {layer.name: layer.op_type for of_model in layers for layer in of_model}
    for layer in (layer for of_model in layers for layer in of_model):
        types.setdefault(layer.name, {}).update(layer.precision)
    return tuple(
        PluginLayer(name=name, op_type=operators[name], precision=precisions) for name, precisions in types.items()
    )


def has_open_dimension(model: ModelProto) -> bool:
    """Whether an input leaves a side open."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return any(
        not side.HasField("dim_value")
        for value in model.graph.input
        if value.name not in constant
        for side in value.type.tensor_type.shape.dim
    )


def has_open_batch(root: Path, manifest: BundleManifest) -> bool:
    """Whether a bundle's models leave the batch size open."""
    model = onnx.load(root / manifest.models[0].path, load_external_data=False)
    return any(
        not value.type.tensor_type.shape.dim[0].HasField("dim_value")
        for value in model.graph.input
        if value.name in manifest.profiles
    )


def _tensor_bytes(tensor: TensorProto, source: Path) -> bytes | None:
    """Return a large tensor's bytes, wherever they are; None for one that stays where it is."""
    if tensor.data_location == TensorProto.EXTERNAL:
        external = {field.key: field.value for field in tensor.external_data}
        place = (source / external["location"]).resolve()
        if not place.is_relative_to(source.resolve()) or not place.is_file():
            raise InputFileError(
                f"tensor {tensor.name!r} is in {external['location']}, which is not beside the ONNX file; put it there"
            )
        with place.open("rb") as file:
            file.seek(int(external.get("offset", "0")))
            data = file.read(int(external["length"])) if "length" in external else file.read()
        if "length" in external and len(data) != int(external["length"]):
            raise InputFileError(f"{place.name} is too short to hold tensor {tensor.name!r}; copy it again")
        return data
    return tensor.raw_data if len(tensor.raw_data) > INLINE_BYTES else None
