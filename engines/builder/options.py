"""What an engine is built for, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fna.engines.look_inside.debug_tensors import DebugTensors
from fna.engines.targets import Flavour, Target
from fna.errors import InvalidArgumentError
from fna.export.metadata import FileMetadata
from fna.export.passes import Lowering


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
        lowering: form of the file; None is what `fna.engines.lowerings` says of the flavour, its version and the targets.
        fuse_exact: whether exact attention of grafted files may be rewritten for the runtime, as that of traced ones is.
        plugin: the plugin library; None is where `fna plugin` puts it.
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
    fuse_exact: bool = False
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


def check_options(options: BuildOptions) -> None:
    """Refuse options that do not fit the flavour.

    Raises:
        InvalidArgumentError: naming the option.
    """
    if options.backend == "tensorrt-rtx":
        for name, asked_for in (
            ("--lowering plugin", options.lowering == "plugin"),
            ("--hardware-compatible", options.hardware_compatible),
            ("--version-compatible", options.version_compatible),
        ):
            if asked_for:
                raise InvalidArgumentError(
                    f"{name} was asked for, but TensorRT-RTX does not take it (it has no plugin layers, and one engine serves "
                    "all its targets); leave it out, or use --backend tensorrt"
                )
    check_hardware_compatible(options, options.targets)
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InvalidArgumentError(f"optimisation level {options.optimization_level} was asked for, but it is 0 to 5")


def check_hardware_compatible(options: BuildOptions, targets: Sequence[Target]) -> None:
    """Refuse --hardware-compatible on a Jetson, where TensorRT has no such engines (Developer Guide, "Hardware Compatibility").

    Raises:
        InvalidArgumentError: naming the device.
    """
    jetson = next((target.name for target in targets if target.is_jetson), None)
    if options.hardware_compatible and jetson is not None:
        raise InvalidArgumentError(
            f"--hardware-compatible was asked for, but TensorRT has no such engines on JetPack, which {jetson} runs; leave it "
            "out, and build on each kind of device"
        )


def check_precision(path: Path, metadata: FileMetadata, targets: Sequence[Target]) -> None:
    """Refuse a file in a type that one of the targets does not compute in; see `check_types`."""
    types = (metadata.precision, *(metadata.quantized.split("+") if metadata.quantized else ()))
    check_types(types, targets, f"{path.name} is {{}}")


def check_types(types: Sequence[str], targets: Sequence[Target], text: str = "{} was asked for") -> None:
    """Refuse types that one of the targets does not compute in; `text` says of one whose it is.

    Raises:
        InvalidArgumentError: naming the target and its types.
    """
    for target in targets:
        for wanted in types:
            if wanted not in target.precisions:
                raise InvalidArgumentError(
                    f"{text.format(wanted)}, but {target.name} computes in {', '.join(target.precisions)} only; choose one of "
                    "those for the fp32 file"
                )
