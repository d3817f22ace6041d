"""Writing deployment bundles: everything that a device without Python needs to build, check and time its own engine.

The same inputs give the same bytes: nothing in a bundle depends on the clock, the user, or the folder it is made in.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fna.engines.builder.options import BatchRange, check_types
from fna.engines.builder.profiles import input_profiles
from fna.engines.bundle.device_files import write_device_files
from fna.engines.bundle.format import (
    ARCHIVE_SUFFIX,
    CHECKSUMS,
    MANIFEST,
    BundledFile,
    BundledModel,
    BundledPlugin,
    BundleManifest,
    PluginLayer,
    checksum_lines,
    list_files,
    safe_name,
)
from fna.engines.bundle.models import bundled_lowerings, has_open_dimension, join_layers, plugin_layers, write_models
from fna.engines.bundle.plugin_files import choose_kernels, write_plugin, write_plugin_layers
from fna.engines.bundle.recording import record_images
from fna.engines.lowerings import choose_lowering, rules_for
from fna.engines.targets import Target
from fna.errors import InputFileError, InvalidArgumentError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.operators.registry import fna_nodes, has_plugin
from fna.export.passes import Lowering
from fna.export.variants import FileVariant, make_variant
from fna.files import file_sha256, load_onnx, part_folder, require_parent, written_whole
from fna.machine import tool_versions
from fna.plugins.built import table_folder
from fna.precision import Precision


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle is made for.

    Attributes:
        target: the device.
        images: photographs to record, by name.
        batch: batch sizes that the engine takes unless `build_engine.sh --batch` says otherwise.
        precisions: of the models, the default first; none means the file's own.
        keep_fp32: blocks that stay fp32 in the models that are cast.
        resolution: height and width for files that leave them open.
        table: folder of the kernel table and the prebuilt libraries.
    """

    target: Target
    images: Sequence[tuple[str, Image.Image]]
    batch: BatchRange
    precisions: tuple[Precision, ...] = ()
    keep_fp32: tuple[int, ...] = ()
    resolution: tuple[int, int] | None = None
    table: Path = field(default_factory=table_folder)


def write_bundle(
    path: Path, output: Path, options: BundleOptions, on_step: Callable[[str], None] = lambda _text: None
) -> tuple[BundleManifest, tuple[str, ...]]:
    """Make a bundle of an FNA file, as a folder or, where `output` ends in `.tar.zst`, an archive; whole or not at all.

    Args:
        path: file written by `fna export` or `fna graft`.
        output: the folder (a bundle that is there is replaced, any other folder with something in it is not) or archive.
        options: target, photographs, batch sizes.
        on_step: called with what is being done.

    Returns:
        The manifest, and a line for each block whose values leave fp16's range on the photographs.

    Raises:
        InputFileError: if the file cannot be read, or the output not be written.
        InvalidArgumentError: if the target does not compute in a precision, or the file cannot be cast to it.
        MissingCapabilityError: if the target needs the plugin and its kernels are not compiled; says how to.
        ModelSourceError: if the model that the file was traced from cannot be loaded, to record its outputs.
    """
    archive = output.name.endswith(ARCHIVE_SUFFIX)
    require_parent(output)
    _check_output(output, archive)
    model = load_onnx(path, tensors=False)
    metadata = read_metadata(model, str(path))
    precisions = _check_precisions(metadata, options)
    has_layers = any(has_plugin(node) for node in fna_nodes(model.graph))
    kernels = choose_kernels(options.target, options.table, has_layers)
    name = f"{safe_name(path.name.removesuffix('.onnx'))}-{options.target.name}"
    wanted = [lowering for _, _, lowering in rules_for(options.target.flavours, kernels is not None)]
    profiles = input_profiles(model, options.batch, metadata, options.resolution)
    with part_folder(output) as temporary:
        root = temporary / name
        (root / "check").mkdir(parents=True)
        models: list[BundledModel] = []
        layers: list[tuple[PluginLayer, ...]] = []
        notes: list[str] = []
        for precision in precisions:
            made, more = _cast(path, temporary, metadata, precision, options, on_step)
            notes += more
            on_step(f"lowering the model, {precision}")
            other = load_onnx(made, tensors=False)
            layers.append(plugin_layers(other, precision))
            stem = "model" if precision == precisions[0] else f"model.{precision}"
            models += write_models(other, made.parent, root, precision, stem, bundled_lowerings(other, wanted))
        plugin = None
        if kernels is not None:
            on_step("copying the plugin")
            plugin = BundledPlugin(
                chips=tuple(sorted({kernel.sm for kernel in kernels})),
                prebuilt=write_plugin(root / "plugin", options.table, kernels),
                layers=join_layers(layers),
            )
            write_plugin_layers(root, plugin.layers, precisions)
        on_step("recording photographs and their outputs")
        manifest = BundleManifest(
            name=name,
            tools=tool_versions("onnx", "torch"),
            target=options.target.name,
            capabilities=options.target.capabilities,
            flavours=dict(options.target.flavours),
            lowering=_default_lowering(options.target, kernels is not None, models),
            precision=precisions[0],
            profiles=profiles,
            dynamic=has_open_dimension(model),
            onnx_name=path.name,
            onnx_sha256=file_sha256(path),
            metadata=metadata,
            models=tuple(models),
            plugin=plugin,
            check=record_images(path, root, metadata, profiles, options.images, precisions),
            files={},
        )
        on_step("hashing")
        write_device_files(root, manifest, options.target)
        manifest = _seal(root, manifest)
        on_step(f"writing {output.name}")
        if archive:
            write_archive(root, output)
        else:
            _replace_folder(root, output)
    return manifest, tuple(notes)


def write_archive(root: Path, output: Path) -> None:
    """Pack a bundle's folder: sorted names, no times, no owners, two file modes, so that equal bundles are equal bytes."""
    import zstandard

    with (
        written_whole(output) as temporary,
        temporary.open("wb") as file,
        zstandard.ZstdCompressor(level=3, threads=0).stream_writer(file) as packed,
        tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name in (MANIFEST, *(other for other in list_files(root) if other != MANIFEST)):
            place = root / name
            member = tarfile.TarInfo(f"{root.name}/{name}")
            member.size = place.stat().st_size
            member.mode = 0o755 if place.stat().st_mode & 0o100 else 0o644
            with place.open("rb") as content:
                tar.addfile(member, content)


def _default_lowering(target: Target, has_kernels: bool, models: Sequence[BundledModel]) -> Lowering:
    """The form for the lowest version of the target's first runtime, or what all take where the bundle does not hold that."""
    first = next(iter(target.flavours))
    lowering = choose_lowering(first, target.flavours[first], (target,) if has_kernels else ())
    return lowering if lowering in {model.lowering for model in models} else "portable"


def _check_precisions(metadata: FileMetadata, options: BundleOptions) -> tuple[Precision, ...]:
    chosen: tuple[Precision, ...] = tuple(dict.fromkeys(options.precisions)) or (metadata.precision,)
    kinds = metadata.quantized.split("+") if metadata.quantized is not None else []
    check_types((*kinds, *chosen), (options.target,))
    wrong = [precision for precision in chosen if precision != metadata.precision]
    if wrong and (kinds or metadata.precision != "fp32"):
        kind = " and ".join([*kinds, metadata.precision])
        raise InvalidArgumentError(
            f"the file is {kind}, so there is no {wrong[0]} to be had from it; bundle the fp32 file that it was made from"
        )
    return chosen


def _cast(
    path: Path,
    folder: Path,
    metadata: FileMetadata,
    precision: Precision,
    options: BundleOptions,
    on_step: Callable[[str], None],
) -> tuple[Path, list[str]]:
    """Return the file in a precision, cast into `folder` where it is not in it already, and what the cast had to say."""
    if precision == metadata.precision:
        return path, []
    cast = folder / f"cast-{precision}.onnx"
    variant = FileVariant(precision, keep_fp32=options.keep_fp32)
    return cast, make_variant(path, cast, variant, options.images, resolution=options.resolution, on_step=on_step)


def _seal(root: Path, manifest: BundleManifest) -> BundleManifest:
    """Write the manifest with every file's SHA-256, and SHA256SUMS."""
    files = {
        name: BundledFile(bytes=(root / name).stat().st_size, sha256=file_sha256(root / name))
        for name in list_files(root)
    }
    sealed = manifest.model_copy(update={"files": files})
    text = sealed.model_dump_json(indent=1) + "\n"
    (root / MANIFEST).write_text(text, encoding="utf-8")
    (root / CHECKSUMS).write_text(checksum_lines(files, text), encoding="utf-8")
    for name in list_files(root):
        if not name.endswith(".sh"):
            (root / name).chmod(0o644)
    return sealed


def _check_output(output: Path, archive: bool) -> None:
    """Refuse, before the long work, an output that would overwrite something else than a bundle."""
    if archive and output.is_dir():
        raise InputFileError(f"{output} cannot be written: it is a folder; give a file name")
    if not archive and output.exists() and not output.is_dir():
        raise InputFileError(
            f"{output} cannot be written: it is a file; give a folder, or a name that ends in {ARCHIVE_SUFFIX}"
        )
    if not archive and output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise InputFileError(f"{output} holds other files than a bundle, so it is not replaced; give another folder")


def _replace_folder(root: Path, output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    try:
        root.replace(output)
    except OSError as error:
        raise InputFileError(f"{output} cannot be written: {error.strerror}") from None
    output.chmod(0o755)
