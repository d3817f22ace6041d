"""Building engines from FNA files: one builder over both TensorRT flavours.

Files are lowered here and never by a parser: to the plugin's nodes for TensorRT, to standard operators for TensorRT-RTX, which has
no plugin layers and builds for all its GPUs on a machine that has none.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from fna.engines.device import find_gpu
from fna.engines.flavours import (
    FLAVOURS,
    capabilities_of,
    choose_targets,
    default_plugin,
    import_flavour,
    load_plugins,
    lowering_of,
    set_devices,
    timing_cache_name,
)
from fna.engines.look_inside.debug_tensors import DebugTensors, Place, find_places, mark_debug_tensors
from fna.engines.look_inside.layers import FnaLayer, RequestedLayer, check_layers, describe_layers, requested_layers
from fna.engines.manifest import Manifest, ShapeRange, write_manifest
from fna.engines.targets import Flavour, Lowering, Target
from fna.errors import BuildError, InvalidArgumentError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.operators.functions import PLUGIN_OPS, fna_nodes, node_attributes
from fna.export.passes.lower import lower
from fna.files import file_sha256, load_onnx, save_model, written_whole

LARGEST_MESSAGE = 2_000_000_000
"""Bytes; a protobuf message ends at 2 GiB."""

Progress = Callable[[str, int, int | None], None]
"""Called with a phase's name, the steps done, and how many there are; None for the number when the phase is over."""


@dataclass(frozen=True)
class BatchRange:
    """Batch sizes that an engine takes: `1` is 1 only, `1:4` is 1 to 4, `1:4:8` is 1 to 8 tuned for 4."""

    smallest: int
    usual: int
    largest: int


DEFAULT_BATCH = BatchRange(1, 1, 8)


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for, and how.

    Attributes:
        backend: the TensorRT flavour.
        targets: devices; none means all that TensorRT-RTX takes, or the device that TensorRT runs on.
        batch: batch sizes that the engine takes; None is 1 to 8 tuned for 1, or the file's own where it is fixed.
        resolutions: heights and widths for files that leave them open; an optimisation profile for each.
        lowering: `plugin` or `portable`; None is what the flavour and the targets take.
        plugin: the plugin library; None is where `make plugin` puts it.
        workspace_mib: most scratch memory that a layer may use, in MiB; None is all of the device's.
        optimization_level: 0 to 5, the builder's effort; None is its default.
        timing_cache: file or folder that keeps measured kernel times between builds; None keeps none. Only TensorRT measures.
        hardware_compatible: an engine for every chip from Ampere on, at the cost of speed. Only TensorRT.
        version_compatible: an engine that later versions of the same major version run too. Only TensorRT.
        tf32: whether fp32 products may be computed in TF32, with 10 bits of mantissa. FNA's insides are fp32 products in the portable
            lowering, and lose with it about as much as fp16 does, or more.
        debug_tensors: what `fna validate` can look at inside the engine: `blocks`, the block boundaries, at the cost of fusions across
            them; `unfused`, what fusion leaves over, at no such cost; None nothing.
    """

    backend: Flavour = "tensorrt-rtx"
    targets: tuple[Target, ...] = ()
    batch: BatchRange | None = None
    resolutions: tuple[tuple[int, int], ...] = ()
    lowering: Lowering | None = None
    plugin: Path | None = None
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = False
    debug_tensors: DebugTensors | None = None


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
    """Build a TensorRT-RTX engine; `build_engine` with the options that matter there."""
    return build_engine(path, output, BuildOptions(targets=tuple(targets), batch=batch))


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
    _check_options(options)
    trt = import_flavour(options.backend)
    targets = choose_targets(options.backend, options.targets)
    model = load_onnx(path)
    metadata = read_metadata(model, str(path))
    _check_precision(path, metadata, targets)
    profiles = _profiles(model, options, metadata)
    lowering = options.lowering or lowering_of(options.backend, targets)
    requested = requested_layers(model)
    places = find_places(model, metadata.plan) if options.debug_tensors is not None else ()
    lowered = lower(model, lowering)
    del model
    plugin = _plugin_of(lowered, options)
    messages: list[str] = []
    logger = make_logger(trt, messages)
    if plugin is not None:
        load_plugins(trt, plugin, _operators(lowered))
    gpu = find_gpu()
    started = time.perf_counter()
    with written_whole(output) as temporary:
        work = _Builder(trt, logger, messages, options, targets, places)
        serialized = work.build(lowered, profiles, requested if lowering == "plugin" else (), on_progress)
        temporary.write_bytes(serialized)
        seconds = time.perf_counter() - started
        layers, inspection = _inspect(trt, logger, serialized, requested, lowering, has_gpu=gpu is not None)
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


def make_logger(trt: Any, messages: list[str]) -> Any:
    """Return a TensorRT logger that collects errors and drops the rest."""

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return CollectingLogger()


def make_monitor(trt: Any, on_progress: Progress, stop: threading.Event) -> Any:
    """Return a progress monitor that passes progress on, and ends the build once `stop` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            on_progress(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_progress(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            on_progress(phase_name, self._steps.pop(phase_name, 0), None)

    return Monitor()


class _Builder:
    """One build; holds what TensorRT's objects refer to, for as long as they live."""

    def __init__(
        self,
        trt: Any,
        logger: Any,
        messages: list[str],
        options: BuildOptions,
        targets: Sequence[Target],
        places: tuple[Place, ...],
    ) -> None:
        self._trt, self._messages, self._options, self._targets = trt, messages, options, targets
        self.places = places
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
        trt = self._trt
        builder = trt.Builder(self._logger)
        # by name: the flags were renumbered between TensorRT 10 and 11
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        self._parse(parser, model)
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
        config.progress_monitor = make_monitor(trt, on_progress or _say_nothing, stop)
        serialized = _run_interruptibly(lambda: builder.build_serialized_network(network, config), stop)
        if serialized is None:
            raise BuildError(f"{self._title} could not build the engine: {self._reason()}")
        self._keep_timings(config)
        return bytes(serialized)

    def _parse(self, parser: Any, model: ModelProto) -> None:
        if model.ByteSize() < LARGEST_MESSAGE:
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
        """Refuse, before the minutes of a build, a network in which the parser put something else in a plugin's place."""
        wanted = {layer.name for layer in plugin_layers if layer.op_type in PLUGIN_OPS}
        if not wanted:
            return
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        plugins = [layer.name for layer in layers if layer.type == self._trt.LayerType.PLUGIN_V3]
        missing = sorted(name for name in wanted if not any(_is_layer_of(found, name) for found in plugins))
        if missing:
            raise BuildError(f"{self._title}'s parser made no plugin layer of {', '.join(missing)}: {self._reason()}")

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
        gpu = find_gpu()
        if options.timing_cache is None or options.backend != "tensorrt" or gpu is None:
            return None
        if options.timing_cache.suffix:
            return options.timing_cache
        options.timing_cache.mkdir(parents=True, exist_ok=True)
        return options.timing_cache / timing_cache_name(options.backend, self._trt.__version__, gpu)

    def _keep_timings(self, config: Any) -> None:
        path = self._timing_path()
        if path is None:
            return
        with written_whole(path) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))

    def _reason(self) -> str:
        return " ".join(self._messages[-1].split()) if self._messages else "no reason given"


def _say_nothing(_phase: str, _done: int, _total: int | None) -> None:
    """The monitor's listener where nobody wants to know; the monitor itself is what makes a build interruptible."""


def _run_interruptibly(work: Callable[[], Any], stop: threading.Event) -> Any:
    """Run `work` in a thread, so that Ctrl-C reaches this one; it then ends at the monitor's next step.

    An exception raised inside TensorRT's callbacks would cross C++ frames that do not expect one.
    """
    results: list[Any] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="builder")
    thread.start()
    interrupted = False
    # an event, not join(): Python 3.11 takes a thread for ended whose join() was interrupted
    while not done.is_set():
        try:
            done.wait(0.1)
        except KeyboardInterrupt:
            interrupted = True
            stop.set()
    thread.join()
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        raise failures[0]
    return results[0]


def _inspect(
    trt: Any,
    logger: Any,
    serialized: bytes,
    requested: Sequence[RequestedLayer],
    lowering: Lowering,
    *,
    has_gpu: bool,
) -> tuple[tuple[FnaLayer, ...], str]:
    """Read what became of the FNA nodes; an engine is deserialised for it, which takes a GPU."""
    if not has_gpu:
        return describe_layers(
            requested, lowering, None
        ), "not read: this machine has no GPU to deserialise the engine on"
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        if lowering == "plugin":
            raise BuildError("the engine that was built cannot be deserialised here, so its layers are not known")
        return describe_layers(requested, lowering, None), "not read: the engine is for another GPU than this machine's"
    inspector = engine.create_engine_inspector()
    layers = describe_layers(requested, lowering, inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    check_layers(layers)
    return layers, "read from the engine"


def _is_layer_of(layer: str, node: str) -> bool:
    """Whether a network layer has a node's name, perhaps with the number that makes it unique."""
    return layer == node or (layer.startswith(f"{node}_") and layer[len(node) + 1 :].isdigit())


def _check_options(options: BuildOptions) -> None:
    if options.backend == "tensorrt-rtx":
        for name, given in (
            ("--lowering plugin", options.lowering == "plugin"),
            ("--hardware-compatible", options.hardware_compatible),
            ("--version-compatible", options.version_compatible),
        ):
            if given:
                raise InvalidArgumentError(
                    f"{name} was asked for, but TensorRT-RTX does not take it (it has no plugin layers, and one engine serves "
                    "all its targets); leave it out, or use --backend tensorrt"
                )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InvalidArgumentError(f"optimisation level {options.optimization_level} was asked for, but it is 0 to 5")


def _check_precision(path: Path, metadata: FileMetadata, targets: Sequence[Target]) -> None:
    for target in targets:
        for wanted in (metadata.precision, metadata.quantized or metadata.precision):
            if wanted not in target.precisions:
                raise InvalidArgumentError(
                    f"{path.name} is {wanted}, but {target.name} computes in {', '.join(target.precisions)} only; cast the fp32 "
                    "file to one of those"
                )


def _plugin_of(lowered: ModelProto, options: BuildOptions) -> Path | None:
    if not any(True for _ in fna_nodes(lowered.graph)):
        return None
    return options.plugin or default_plugin()


def _operators(lowered: ModelProto) -> list[tuple[str, str]]:
    """The plugins that a lowered file's nodes name: (operator, version)."""
    return sorted({(node.op_type, str(node_attributes(node)["plugin_version"])) for node in fna_nodes(lowered.graph)})


def _profiles(model: ModelProto, options: BuildOptions, metadata: FileMetadata) -> list[dict[str, ShapeRange]]:
    return [input_profiles(model, options.batch, metadata, size) for size in options.resolutions or (None,)]


def input_profiles(
    model: ModelProto, batch: BatchRange | None, metadata: FileMetadata, size: tuple[int, int] | None = None
) -> dict[str, ShapeRange]:
    """Return the shapes of each input of an image model; `size` is the height and width of files that leave them open.

    Without `batch`, they are `DEFAULT_BATCH`, or the file's own where that is fixed.

    Raises:
        BuildError: for an input that is no batch of images, or whose size is not known.
        InvalidArgumentError: for a batch range or a size that the file does not take.
    """
    return {value.name: _shape_range(value, batch, metadata, size) for value in _real_inputs(model)}


def _real_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that are not initializers; files below IR version 4 list those as inputs too."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constant]


def _shape_range(
    value: onnx.ValueInfoProto, batch: BatchRange | None, metadata: FileMetadata, size: tuple[int, int] | None
) -> ShapeRange:
    dimensions = value.type.tensor_type.shape.dim
    fixed = [dimension.dim_value if dimension.HasField("dim_value") else None for dimension in dimensions]
    if len(fixed) != 4 or fixed[1] is None:
        raise BuildError(f"input {value.name!r} is not [batch, 3, height, width]; only image models can be built")
    height, width = _image_size(value.name, (fixed[2], fixed[3]), size, metadata)
    channels = fixed[1]
    if fixed[0] is None:
        asked = batch or DEFAULT_BATCH
        counts = (asked.smallest, asked.usual, asked.largest)
    else:
        counts = (fixed[0],) * 3
        if batch is not None and (batch.smallest, batch.largest) not in ((1, 1), counts[:2]):
            raise InvalidArgumentError(
                f"the file's batch size is fixed at {fixed[0]}; export it with a dynamic batch to use --batch"
            )
    smallest, usual, largest = ((count, channels, height, width) for count in counts)
    return ShapeRange(smallest=smallest, usual=usual, largest=largest)


def _image_size(
    name: str, fixed: tuple[int | None, int | None], asked: tuple[int, int] | None, metadata: FileMetadata
) -> tuple[int, int]:
    known = fixed[0] or metadata.height, fixed[1] or metadata.width
    if asked is not None:
        for side, number in zip(known, asked, strict=True):
            if side is not None and side != number:
                raise InvalidArgumentError(
                    f"the file takes {known[0]}x{known[1]} images only, but --resolution asks for {asked[0]}x{asked[1]}; "
                    "export it with --dynamic-size, or at that resolution"
                )
        return asked
    if known[0] is None or known[1] is None:
        raise BuildError(
            f"input {name!r} leaves height and width open; give --resolution (it may be repeated), or export with a fixed one"
        )
    return known[0], known[1]
