"""Building engines from FNA files: one builder over both TensorRT flavours.

Files are lowered here and never by a parser: to the plugin's nodes for TensorRT, to standard operators for TensorRT-RTX, which has
no plugin layers and builds for all its GPUs on a machine that has none; `fna.engines.lowerings` has the table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fna.engines.builder.attention import prepare_attention
from fna.engines.builder.network import EngineBuilder, FusedRefusedError
from fna.engines.builder.options import BuildOptions, check_hardware_compatible, check_options, check_precision
from fna.engines.builder.profiles import input_profiles
from fna.engines.builder.progress import Progress
from fna.engines.device import find_gpu
from fna.engines.flavours import (
    capabilities_of,
    choose_targets,
    default_plugin,
    import_flavour,
    load_plugins,
    make_logger,
)
from fna.engines.look_inside.debug_tensors import find_places
from fna.engines.look_inside.layers import (
    FnaLayer,
    RequestedLayer,
    check_layers,
    describe_layers,
    requested_layers,
    with_network_types,
)
from fna.engines.lowerings import check_fused, choose_lowering
from fna.engines.manifest import Manifest, ShapeRange, write_manifest
from fna.errors import BuildError, InvalidArgumentError
from fna.export.metadata import read_metadata
from fna.export.operators.registry import fna_nodes, node_attributes
from fna.export.passes import Lowering
from fna.export.passes.lower import lower
from fna.files import file_sha256, load_onnx, written_whole


def build_engine(path: Path, output: Path, options: BuildOptions, on_progress: Progress | None = None) -> Manifest:
    """Build an engine from an FNA file and write it with its manifest.

    Ctrl-C ends the builder at its next step; then nothing has been written.

    Args:
        path: file written by `fna export` or `fna graft`, or by `fna.export.passes.precision` from one of those.
        output: the engine file; the manifest lies beside it as `<output>.json`.
        options: for which devices, and how.
        on_progress: called with the builder's progress, from another thread.

    Raises:
        InputFileError: if the ONNX file cannot be read or the engine not be written.
        InvalidArgumentError: if the options do not fit the file, the flavour or each other.
        BuildError: if the parser or builder refuses the model, naming the node, or the engine has not the layers asked for.
        MissingCapabilityError: if this machine lacks the flavour, or for TensorRT a GPU or the plugin.
    """
    try:
        return _build(path, output, options, on_progress)
    except FusedRefusedError as error:
        if options.lowering is not None:
            raise
        reason = str(error).partition(";")[0]
        return _build(path, output, replace(options, lowering="portable"), on_progress, reason)


def _build(
    path: Path, output: Path, options: BuildOptions, on_progress: Progress | None, not_fused: str = ""
) -> Manifest:
    check_options(options)
    trt = import_flavour(options.backend)
    targets = choose_targets(options.backend, options.targets)
    check_hardware_compatible(options, targets)
    model = load_onnx(path)
    metadata = read_metadata(model, str(path))
    check_precision(path, metadata, targets)
    profiles = [input_profiles(model, options.batch, metadata, size) for size in options.resolutions or (None,)]
    lowering = options.lowering or choose_lowering(options.backend, trt.__version__, targets)
    refusal = check_fused(model) if lowering == "fused" else None
    if refusal is not None and options.lowering is not None:
        raise InvalidArgumentError(f"--lowering fused was asked for, but {refusal}; leave it out")
    if refusal is not None:
        lowering, not_fused = "portable", refusal
    requested = requested_layers(model)
    places = find_places(model, metadata.plan) if options.debug_tensors is not None else ()
    lowered = prepare_attention(lower(model, lowering, fuse_exact=options.fuse_exact))
    del model
    plugin = _plugin_of(lowered, options)
    if plugin is not None and options.version_compatible:
        raise InvalidArgumentError(
            f"--version-compatible was asked for, but the engine needs {plugin.name}, and such an engine with a plugin has not been "
            "proven on a later version; leave it out, or build with --lowering portable"
        )
    messages: list[str] = []
    logger = make_logger(trt, messages)
    if plugin is not None:
        load_plugins(trt, plugin, _operators(lowered))
    gpu = find_gpu()
    started = time.perf_counter()
    with written_whole(output) as temporary:
        work = EngineBuilder(trt, logger, messages, options, targets, places, gpu)
        serialized = work.build(lowered, profiles, requested if lowering == "plugin" else (), on_progress)
        temporary.write_bytes(serialized)
        seconds = time.perf_counter() - started
        if gpu is None:
            layers = describe_layers(requested, lowering, None)
            inspection = "not read: this machine has no GPU to deserialise the engine on"
        else:
            layers, inspection = _inspect(
                trt, logger, serialized, requested, lowering, options, profiles[0], work.types
            )
        manifest = Manifest(
            backend=options.backend,
            backend_version=trt.__version__,
            targets=tuple(target.name for target in targets),
            compute_capabilities=capabilities_of(targets),
            onnx_name=path.name,
            onnx_sha256=file_sha256(path),
            engine_sha256=file_sha256(temporary),
            engine_bytes=temporary.stat().st_size,
            lowering=lowering,
            not_fused=not_fused,
            plan=metadata.plan,
            precision=metadata.precision,
            preprocessing=metadata.preprocessing,
            profiles=profiles[0],
            more_profiles=tuple(profiles[1:]),
            seconds=round(seconds, 2),
            layers_with_fna=tuple(layer.name for layer in requested),
            layers=layers,
            inspection=inspection,
            hardware_compatible=options.hardware_compatible,
            version_compatible=options.version_compatible,
            tf32=options.tf32,
            device=gpu.name if gpu is not None and options.backend == "tensorrt" else None,
            plugin_name=plugin.name if plugin is not None else None,
            plugin_sha256=file_sha256(plugin) if plugin is not None else None,
            debug_tensors=options.debug_tensors,
            places=work.places,
        )
    write_manifest(manifest, output)
    return manifest


def _inspect(
    trt: Any,
    logger: Any,
    serialized: bytes,
    requested: Sequence[RequestedLayer],
    lowering: Lowering,
    options: BuildOptions,
    shapes: Mapping[str, ShapeRange],
    network_types: Mapping[str, str],
) -> tuple[tuple[FnaLayer, ...], str]:
    """Read what became of the FNA nodes; an engine is deserialised for it, which takes a GPU.

    Returns:
        The layers, and how they were read.
    """
    runtime = trt.Runtime(logger)
    if options.version_compatible:
        runtime.engine_host_code_allowed = True  # the lean runtime that such an engine carries
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        if lowering == "plugin":
            raise BuildError("the engine that was built cannot be deserialised here, so its layers are not known")
        return describe_layers(requested, lowering, None), "not read: the engine is for another GPU than this machine's"
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:
        # without shapes the inspector gives no formats of layers whose size is open
        for name, range_ in shapes.items():
            context.set_input_shape(name, range_.usual)
        inspector.execution_context = context
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers, mute = with_network_types(describe_layers(requested, lowering, information), network_types)
    check_layers(layers)
    said = f"; the inspector gives no type of {', '.join(mute)}, which have the network's" if mute else ""
    return layers, f"read from the engine{said}"


def _plugin_of(lowered: ModelProto, options: BuildOptions) -> Path | None:
    if not any(True for _ in fna_nodes(lowered.graph)):
        return None
    return options.plugin or default_plugin()


def _operators(lowered: ModelProto) -> list[tuple[str, str]]:
    """The plugins that a lowered file's nodes name: (operator, version)."""
    return sorted({(node.op_type, str(node_attributes(node)["plugin_version"])) for node in fna_nodes(lowered.graph)})
