"""Building TensorRT-RTX engines from FNA files, on a machine that needs no GPU.

TensorRT-RTX has no plugin layers, so it is given the portable lowering: standard operators only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from fna.engines.manifest import Manifest, ShapeRange, write_manifest
from fna.engines.targets import Target
from fna.errors import BuildError, InvalidArgumentError, MissingCapabilityError
from fna.export.files import file_sha256, load_onnx, written_whole
from fna.export.functions import fna_nodes
from fna.export.lower import lower
from fna.export.metadata import FileMetadata, read_metadata


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that an engine takes: `1` is 1 only, `1:4` is 1 to 4, `1:4:8` is 1 to 8 tuned for 4."""

    smallest: int
    usual: int
    largest: int


def parse_batch(text: str) -> BatchRange:
    """Parse `1`, `1:4` or `1:4:8`.

    Raises:
        InvalidArgumentError: for other text, or numbers that do not ascend from at least 1.
    """
    try:
        numbers = [int(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or numbers != sorted(numbers) or numbers[0] < 1:
        raise InvalidArgumentError(
            f"batch {text!r} cannot be read; write 1, 1:4 (smallest:largest) or 1:4:8 (smallest:usual:largest)"
        )
    if len(numbers) == 3:
        return BatchRange(*numbers)
    return BatchRange(numbers[0], numbers[-1], numbers[-1])


def build_rtx_engine(path: Path, output: Path, targets: Sequence[Target], batch: BatchRange) -> Manifest:
    """Build a TensorRT-RTX engine from an FNA file and write it with its manifest.

    Args:
        path: file written by `fna export` or `fna graft`.
        output: the engine file; the manifest lies beside it as `<output>.json`.
        targets: device families; one engine serves all of them.
        batch: batch sizes that the engine takes.

    Raises:
        InputFileError: if the ONNX file cannot be read or the engine not be written.
        BuildError: if the parser or builder refuses the model; the message names the node.
        MissingCapabilityError: if TensorRT-RTX is not installed.
    """
    trt = import_tensorrt_rtx()
    model = load_onnx(path)
    metadata = read_metadata(model, str(path))
    profiles = {value.name: _shape_range(value, batch, metadata) for value in _real_inputs(model)}
    blocks = tuple(node.name for node in fna_nodes(model.graph))
    started = time.perf_counter()
    with written_whole(output) as temporary:
        serialized = _build(trt, lower(model, "portable"), targets, profiles)
        temporary.write_bytes(serialized)
        manifest = Manifest(
            backend="tensorrt-rtx",
            backend_version=trt.__version__,
            targets=tuple(target.name for target in targets),
            compute_capabilities=_capabilities(targets),
            onnx_name=path.name,
            onnx_sha256=file_sha256(path),
            engine_sha256=file_sha256(temporary),
            engine_bytes=temporary.stat().st_size,
            lowering="portable",
            plan=metadata.plan,
            precision=metadata.precision,
            preprocessing=metadata.preprocessing,
            profiles=profiles,
            seconds=round(time.perf_counter() - started, 2),
            layers_with_fna=blocks,
        )
    write_manifest(manifest, output)
    return manifest


def import_tensorrt_rtx() -> Any:
    """Return the `tensorrt_rtx` module.

    Raises:
        MissingCapabilityError: if it is not installed, or its libraries do not load.
    """
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:
        raise MissingCapabilityError(
            f"TensorRT-RTX cannot be imported ({error}); install it with: pip install 'fna[rtx]'"
        ) from None
    return tensorrt_rtx


def make_logger(trt: Any, messages: list[str]) -> Any:
    """Return a TensorRT logger that collects errors and drops the rest."""

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return CollectingLogger()


def _build(trt: Any, model: ModelProto, targets: Sequence[Target], profiles: dict[str, ShapeRange]) -> bytes:
    messages: list[str] = []
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise BuildError(_describe_parser_errors(parser, messages))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in profiles.items():
        profile.set_shape(name, shapes.smallest, shapes.usual, shapes.largest)
    config.add_optimization_profile(profile)
    capabilities = _capabilities(targets)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise BuildError(f"TensorRT-RTX could not build the engine: {messages[-1] if messages else 'no reason given'}")
    return bytes(serialized)


def _describe_parser_errors(parser: Any, messages: list[str]) -> str:
    if parser.num_errors == 0:
        return f"TensorRT-RTX's parser refused the model: {messages[-1] if messages else 'no reason given'}"
    error = parser.get_error(0)
    where = error.node_name() or f"node number {error.node()}"
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    reason = " ".join(str(error.desc()).split())
    return f"TensorRT-RTX's parser refused node {where} ({error.node_operator()}): {reason}{more}"


def _capabilities(targets: Sequence[Target]) -> tuple[int, ...]:
    return tuple(sorted({capability for target in targets for capability in target.capabilities}))


def _real_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are not initializers; files below IR version 4 list those as inputs too."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constant]


def _shape_range(value: onnx.ValueInfoProto, batch: BatchRange, metadata: FileMetadata) -> ShapeRange:
    dimensions = value.type.tensor_type.shape.dim
    fixed = [dimension.dim_value if dimension.HasField("dim_value") else None for dimension in dimensions]
    if len(fixed) != 4 or fixed[1] is None:
        raise BuildError(f"input {value.name!r} is not [batch, 3, height, width]; only image models can be built")
    height, width = fixed[2] or metadata.height, fixed[3] or metadata.width
    if height is None or width is None:
        raise BuildError(
            f"input {value.name!r} leaves height and width open; export with a fixed --resolution to build an engine"
        )
    channels = fixed[1]
    counts = (batch.smallest, batch.usual, batch.largest) if fixed[0] is None else (fixed[0],) * 3
    if (
        fixed[0] is not None
        and (batch.smallest, batch.largest) != (fixed[0], fixed[0])
        and batch != BatchRange(1, 1, 1)
    ):
        raise InvalidArgumentError(
            f"the file's batch size is fixed at {fixed[0]}; export it with a dynamic batch to use --batch"
        )
    smallest, usual, largest = ((count, channels, height, width) for count in counts)
    return ShapeRange(smallest=smallest, usual=usual, largest=largest)
