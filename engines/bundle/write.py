"""Writing deployment bundles: everything that a device without Python needs to build, check and time its own engine.

The same inputs give the same bytes: nothing in a bundle depends on the clock, the user, or the folder it is made in.
"""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from PIL import Image

import fna.plugins
from fna import __version__
from fna.engines.builder.options import BatchRange
from fna.engines.builder.profiles import input_profiles
from fna.engines.bundle.format import (
    ARCHIVE_SUFFIX,
    CHECKSUMS,
    MANIFEST,
    BundledFile,
    BundledModel,
    BundledPlugin,
    BundleManifest,
    Check,
    PluginLayer,
    Tolerance,
    checksum_lines,
    list_files,
)
from fna.engines.look_inside.layers import requested_layers
from fna.engines.manifest import ShapeRange
from fna.engines.targets import Target
from fna.errors import InputFileError, InvalidArgumentError, MissingCapabilityError, ModelSourceError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.operators.registry import fna_nodes, has_plugin, plugin_operators
from fna.export.passes.lower import Lowering, lower
from fna.export.sources.loading import load_model
from fna.export.variants import Precision, Variant, make_variant
from fna.files import file_sha256, load_onnx, written_whole
from fna.patching import patch, unpatch
from fna.plugins.table import FALLBACK_SM, Kernel, load_table
from fna.runtime import open_session, run_session

Arrays = dict[str, NDArray[np.float32]]

TOLERANCES = {
    "fp32": Tolerance(relative_l2=1e-3, cosine=0.99999),
    "fp16": Tolerance(relative_l2=2e-2, cosine=0.999),
    "bf16": Tolerance(relative_l2=1e-1, cosine=0.99),
}
"""Relative L2 as for the export error of `fna validate`; two vectors of equal length that are apart by a relative L2 of e have cosine
1 - e^2 / 2, and the limits here leave room for different lengths."""

INLINE_BYTES = 1024
"""Tensors up to this size stay in the ONNX file, where shape inference can read them."""

PREBUILT_MACHINES = ("aarch64", "x86_64")
PREBUILT_LIBRARIES = ("libfna_plugin.so", "libfna_plugin_register.so")
REGISTER_SOURCE = "register.cpp"
"""The source that is not part of libfna_plugin.so, but of the self-registering library."""

_HERE = Path(__file__).resolve().parent
_PLUGIN_SOURCES = Path(fna.plugins.__file__).resolve().parent
DEFAULT_TABLE = _PLUGIN_SOURCES.parent / "build" / "plugin"
"""Where `make plugin` puts the kernel table, and the libraries in a folder for each kind of machine."""


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
    table: Path = DEFAULT_TABLE


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
    _check_output(output, archive)
    model = load_onnx(path, tensors=False)
    metadata = read_metadata(model, str(path))
    precisions = _check_precisions(metadata, options)
    has_layers = any(has_plugin(node) for node in fna_nodes(model.graph))
    kernels = _choose_kernels(options, has_layers)
    name = f"{safe_name(path.name.removesuffix('.onnx'))}-{options.target.name}"
    profiles = input_profiles(model, options.batch, metadata, options.resolution)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=_folder_of(output)) as temporary:
        root = Path(temporary) / name
        (root / "check").mkdir(parents=True)
        models: list[BundledModel] = []
        layers: list[tuple[PluginLayer, ...]] = []
        notes: list[str] = []
        for precision in precisions:
            made, more = _cast(path, Path(temporary), metadata, precision, options, on_step)
            notes += more
            on_step(f"lowering the model, {precision}")
            other = load_onnx(made, tensors=False)
            layers.append(plugin_layers(other, precision))
            stem = "model" if precision == precisions[0] else f"model.{precision}"
            models += write_models(other, made.parent, root, precision, stem)
        plugin = None
        if kernels is not None:
            on_step("copying the plugin")
            plugin = BundledPlugin(
                chips=tuple(sorted({kernel.sm for kernel in kernels})),
                prebuilt=_write_plugin(root / "plugin", options.table, kernels),
                layers=_join_layers(layers),
            )
            _write_plugin_layers(root, plugin.layers, precisions)
        on_step("recording photographs and their outputs")
        manifest = BundleManifest(
            name=name,
            tools=_tools(),
            target=options.target.name,
            capabilities=options.target.capabilities,
            flavours={str(flavour): version for flavour, version in options.target.flavours.items()},
            lowering=options.target.lowering if kernels is not None else "portable",
            precision=precisions[0],
            profiles=profiles,
            dynamic=_has_open_dimension(model),
            onnx_name=path.name,
            onnx_sha256=file_sha256(path),
            metadata=metadata,
            models=tuple(models),
            plugin=plugin,
            check=_record(path, root, metadata, profiles, options.images, precisions),
            files={},
        )
        on_step("hashing")
        _write_scripts(root, manifest, options.target)
        manifest = _seal(root, manifest)
        on_step(f"writing {output.name}")
        if archive:
            write_archive(root, output)
        else:
            _replace_folder(root, output)
    return manifest, tuple(notes)


def plugin_layers(model: ModelProto, precision: str) -> tuple[PluginLayer, ...]:
    """Return the nodes of a file that the plugin implements, with the types they compute in."""
    return tuple(
        PluginLayer(name=layer.name, op_type=layer.op_type, precision={precision: layer.precision})
        for layer in requested_layers(model)
        if layer.op_type in plugin_operators()
    )


def write_models(model: ModelProto, source: Path, root: Path, precision: str, stem: str) -> tuple[BundledModel, ...]:
    """Write both lowerings of a model into `root`, with one file of weights between them.

    Args:
        model: loaded without its external data; changed in place, so that its tensors refer to the weights file.
        source: the folder that its external data is relative to.
        root: of the bundle.
        precision: of the file.
        stem: what the files' names begin with.
    """
    weights = f"{stem}.weights"
    wrote = split_weights(model, source, root / weights)
    lowerings: tuple[Lowering, ...] = ("plugin", "portable")
    if not any(has_plugin(node) for node in fna_nodes(model.graph)):
        lowerings = ("portable",)
    models = []
    for lowering in lowerings:
        name = f"{stem}.{lowering}.onnx"
        (root / name).write_bytes(lower(model, lowering).SerializeToString(deterministic=True))
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


def _tensor_bytes(tensor: TensorProto, source: Path) -> bytes | None:
    """Return a large tensor's bytes, wherever they are; None for one that stays where it is."""
    if tensor.data_location == TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = (source / entries["location"]).resolve()
        if not place.is_relative_to(source.resolve()) or not place.is_file():
            raise InputFileError(
                f"tensor {tensor.name!r} is in {entries['location']}, which is not beside the ONNX file; put it there"
            )
        with place.open("rb") as file:
            file.seek(int(entries.get("offset", "0")))
            data = file.read(int(entries["length"])) if "length" in entries else file.read()
        if "length" in entries and len(data) != int(entries["length"]):
            raise InputFileError(f"{place.name} is too short to hold tensor {tensor.name!r}; copy it again")
        return data
    return tensor.raw_data if len(tensor.raw_data) > INLINE_BYTES else None


def _check_precisions(metadata: FileMetadata, options: BundleOptions) -> tuple[Precision, ...]:
    if metadata.quantized is not None:
        raise InvalidArgumentError(
            f"the file is {metadata.quantized}, for which no tolerance has been measured that a device could be held to; "
            "bundle the file that it was made from"
        )
    chosen: tuple[Precision, ...] = tuple(dict.fromkeys(options.precisions)) or (metadata.precision,)
    for precision in chosen:
        if precision not in options.target.precisions:
            raise InvalidArgumentError(
                f"{precision} was asked for, but {options.target.name} computes in {', '.join(options.target.precisions)}; "
                "choose another --precision"
            )
        if precision != metadata.precision and metadata.precision != "fp32":
            raise InvalidArgumentError(
                f"the file is {metadata.precision}, so there is no {precision} to be had from it; bundle the fp32 file"
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
    variant = Variant(precision, keep_fp32=options.keep_fp32)
    return cast, make_variant(path, cast, variant, options.images, resolution=options.resolution, on_step=on_step)


def _join_layers(layers: Sequence[tuple[PluginLayer, ...]]) -> tuple[PluginLayer, ...]:
    """Join the layers of the same model in several precisions."""
    types: dict[str, dict[str, str]] = {}
    operators = {layer.name: layer.op_type for of_model in layers for layer in of_model}
    for layer in (layer for of_model in layers for layer in of_model):
        types.setdefault(layer.name, {}).update(layer.precision)
    return tuple(PluginLayer(name=name, op_type=operators[name], precision=found) for name, found in types.items())


def _choose_kernels(options: BundleOptions, has_layers: bool) -> list[Kernel] | None:
    """Return the compiled kernels for the target's chips and the PTX; None where the target or the file needs none."""
    target = options.target
    if target.lowering != "plugin" or not has_layers:
        return None
    chips = ",".join(map(str, (*target.capabilities, FALLBACK_SM)))
    how = f"compile the kernels first: make plugin SM={chips}"
    if not (options.table / "kernels.json").is_file():
        raise MissingCapabilityError(
            f"{target.name} is built with the plugin, but {options.table} has no kernels; {how}"
        )
    table = load_table(options.table)
    chosen = [kernel for kernel in table.kernels.values() if kernel.sm in (*target.capabilities, FALLBACK_SM)]
    for chip in (*target.capabilities, FALLBACK_SM):
        if not any(kernel.sm == chip for kernel in chosen):
            chip_name = f"sm_{chip}" if chip else "the PTX fallback"
            raise MissingCapabilityError(f"{options.table} has no kernels for {chip_name} of {target.name}; {how}")
    return sorted(chosen, key=lambda kernel: (kernel.variant, kernel.sm))


def _write_plugin(folder: Path, table: Path, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Copy the plugin: sources, the kernels chosen, and the libraries that were built. Returns the machines of those."""
    (folder / "src").mkdir(parents=True)
    for source in sorted((_PLUGIN_SOURCES / "src").iterdir()):
        shutil.copyfile(source, folder / "src" / source.name)
    shutil.copyfile(_PLUGIN_SOURCES / "CMakeLists.txt", folder / "CMakeLists.txt")
    _write_kernels(folder / "kernels", table, kernels)
    prebuilt = []
    for machine in PREBUILT_MACHINES:
        libraries = [table / machine / library for library in PREBUILT_LIBRARIES]
        if all(library.is_file() for library in libraries):
            place = folder / "prebuilt" / machine
            place.mkdir(parents=True)
            for library in libraries:
                shutil.copyfile(library, place / library.name)
            prebuilt.append(machine)
    return tuple(prebuilt)


def _write_kernels(folder: Path, table: Path, kernels: Sequence[Kernel]) -> None:
    """Write kernels.bin and kernel_table.inc with the chosen kernels only; fields as `fna.plugins.aot.write_table` has them."""
    folder.mkdir()
    rows, offset = [], 0
    with (table / "kernels.bin").open("rb") as data, (folder / "kernels.bin").open("wb") as output:
        for kernel in kernels:
            data.seek(kernel.offset)
            output.write(data.read(kernel.packed))
            numbers = f"{kernel.sm}, {offset}, {kernel.packed}, {kernel.size}, {kernel.shared}, {kernel.warps}"
            rows.append(f'{{"{kernel.variant}", {numbers}, "{kernel.symbol}", "{kernel.layout}"}},\n')
            offset += kernel.packed
    (folder / "kernel_table.inc").write_text("".join(rows), encoding="utf-8")


def _write_plugin_layers(root: Path, layers: Sequence[PluginLayer], precisions: Sequence[str]) -> None:
    for precision in precisions:
        lines = [f"{layer.name}\t{layer.precision[precision].replace('unknown', '?')}\n" for layer in layers]
        (root / "check" / f"plugin_layers.{precision}.txt").write_text("".join(lines), encoding="utf-8")


def _record(
    path: Path,
    root: Path,
    metadata: FileMetadata,
    profiles: dict[str, ShapeRange],
    images: Sequence[tuple[str, Image.Image]],
    precisions: Sequence[str],
) -> Check:
    """Write the photographs as the input they become, and the outputs that the engine has to give, both fp32."""
    if len(profiles) != 1:
        raise InputFileError(f"the file has inputs {', '.join(profiles)}, but one image input can be recorded")
    ((name, shapes),) = profiles.items()
    height, width = shapes.usual[2:]
    pixels = np.stack([metadata.preprocessing.apply(image, height, width) for _, image in images])
    traced = metadata.origin == "trace"
    outputs = _run_pytorch(metadata, pixels) if traced else _run_onnxruntime(path, name, metadata, pixels)
    folder = root / "check"
    files = {}
    for output, array in outputs.items():
        files[output] = f"check/expected.{safe_name(output)}.npy"
        np.save(root / files[output], array)
    np.save(folder / "input.npy", pixels)
    return Check(
        images=tuple(name for name, _ in images),
        inputs={name: "check/input.npy"},
        outputs=files,
        reference="pytorch" if traced else "onnxruntime",
        tolerances={precision: TOLERANCES[precision] for precision in precisions},
    )


def _run_pytorch(metadata: FileMetadata, pixels: NDArray[np.float32]) -> Arrays:
    """Run FNA in PyTorch fp32 by the file's plan, an image at a time."""
    model = load_model(metadata.source)
    patch(model.module, metadata.plan)
    try:
        with torch.inference_mode():
            parts = [[t.float().numpy() for t in model.module(torch.from_numpy(image[None]))] for image in pixels]
    except Exception as error:  # the model is the user's and may raise anything
        raise ModelSourceError(f"model {metadata.source!r} does not run: {str(error).splitlines()[0]}") from error
    finally:
        unpatch(model.module)
    return {
        name: np.concatenate(items) for name, items in zip(model.output_names, zip(*parts, strict=True), strict=True)
    }


def _run_onnxruntime(path: Path, name: str, metadata: FileMetadata, pixels: NDArray[np.float32]) -> Arrays:
    session = open_session(path)
    dtype: Any = np.float16 if metadata.precision == "fp16" else np.float32
    parts = [run_session(session, {name: image[None].astype(dtype)}) for image in pixels]
    return {output: np.concatenate([part[output] for part in parts]).astype(np.float32) for output in parts[0]}


def _write_scripts(root: Path, manifest: BundleManifest, target: Target) -> None:
    for name in ("build_engine.sh", "check.sh"):
        shutil.copyfile(_HERE / "scripts" / name, root / name)
        (root / name).chmod(0o755)
    (root / "runner").mkdir()
    for name in ("fna_runner.cpp", "CMakeLists.txt"):
        shutil.copyfile(_HERE / "runner" / name, root / "runner" / name)
    (root / "settings.sh").write_text(_settings(root, manifest), encoding="utf-8")
    (root / "README.md").write_text(_readme(root, manifest, target), encoding="utf-8")


def _settings(root: Path, manifest: BundleManifest) -> str:
    """What the scripts need of the manifest, since a device need not have anything that reads JSON."""
    shapes = next(iter(manifest.profiles.values()))
    batch = f"{shapes.smallest[0]}:{shapes.usual[0]}:{shapes.largest[0]}"
    minimum = manifest.flavours.get("tensorrt", "10.3")
    major, minor = (int(part) for part in minimum.split("."))
    sources = [f"plugin/src/{path.name}" for path in sorted((root / "plugin" / "src").glob("*.cpp"))]
    precisions = tuple(dict.fromkeys(model.precision for model in manifest.models))
    inputs = [f"{name}={'x'.join(map(str, shape.usual[1:]))}" for name, shape in manifest.profiles.items()]
    check = manifest.check
    values: dict[str, str | Iterable[str]] = {
        "TARGET": manifest.target,
        "FLAVOURS": tuple(manifest.flavours),
        "LOWERING": manifest.lowering,
        "LOWERINGS": tuple(dict.fromkeys(model.lowering for model in manifest.models)),
        "MINIMUM_TENSORRT": str(major * 10000 + minor * 100),
        "MINIMUM_TENSORRT_TEXT": minimum,
        "DEFAULT_PRECISION": manifest.precision,
        "PRECISIONS": precisions,
        "DYNAMIC": str(int(manifest.dynamic)),
        "DYNAMIC_BATCH": str(int(manifest.dynamic and _open_batch(root, manifest))),
        "DEFAULT_BATCH": batch,
        "INPUT_SHAPES": inputs,
        "PLUGIN_SOURCES": [source for source in sources if not source.endswith(REGISTER_SOURCE)],
        "PREBUILT_FOR": manifest.plugin.prebuilt if manifest.plugin is not None else (),
        "CHECK_INPUTS": [f"{name}={path}" for name, path in check.inputs.items()],
        "CHECK_OUTPUTS": [f"{name}={path}" for name, path in check.outputs.items()],
        "REFERENCE": f"FNA in PyTorch fp32 on {', '.join(check.images)}"
        if check.reference == "pytorch"
        else f"onnxruntime on {manifest.onnx_name}, on {', '.join(check.images)}",
    }
    for precision, tolerance in check.tolerances.items():
        values[f"TOLERANCE_{precision}"] = f"{tolerance.relative_l2:g} {tolerance.cosine:g}"
    lines = ["# What the scripts need of manifest.json. Written by fna bundle; SHA256SUMS covers it.\n"]
    for key, value in values.items():
        text = shlex.quote(value) if isinstance(value, str) else f"({' '.join(shlex.quote(item) for item in value)})"
        lines.append(f"{key}={text}\n")
    return "# shellcheck disable=SC2034\n" + "".join(lines)


def _open_batch(root: Path, manifest: BundleManifest) -> bool:
    model = onnx.load(root / manifest.models[0].path, load_external_data=False)
    return any(
        not value.type.tensor_type.shape.dim[0].HasField("dim_value")
        for value in model.graph.input
        if value.name in manifest.profiles
    )


def _readme(root: Path, manifest: BundleManifest, target: Target) -> str:
    text = (_HERE / "scripts" / "README.md").read_text(encoding="utf-8")
    shapes = next(iter(manifest.profiles.values()))
    plan = manifest.metadata.plan
    size = sum((root / name).stat().st_size for name in list_files(root))
    flavours = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
    tolerances = [
        f"| {precision} | {tolerance.relative_l2:g} | {tolerance.cosine:g} |"
        for precision, tolerance in manifest.check.tolerances.items()
    ]
    plugin = manifest.plugin
    values = {
        "name": manifest.name,
        "target": manifest.target,
        "devices": target.devices,
        "capabilities": ", ".join(f"{capability / 10:.1f}" for capability in manifest.capabilities),
        "flavours": " or ".join(f"{flavours[name]} {low} or later" for name, low in manifest.flavours.items()),
        "source": manifest.metadata.source,
        "blocks": ", ".join(str(entry.block) for entry in plan.blocks) or "none",
        "num_blocks": str(plan.num_blocks),
        "precisions": ", ".join((f"{manifest.precision} (default)", *list(manifest.check.tolerances)[1:])),
        "input": ", ".join(f"`{name}` {list(shape.usual)}" for name, shape in manifest.profiles.items()),
        "batch": " to ".join(dict.fromkeys(str(shape[0]) for shape in (shapes.smallest, shapes.largest))),
        "images": ", ".join(manifest.check.images),
        "reference": "FNA in PyTorch fp32" if manifest.check.reference == "pytorch" else "onnxruntime",
        "tolerances": "\n".join(tolerances),
        "prebuilt": (
            "prebuilt for " + ", ".join(plugin.prebuilt) if plugin and plugin.prebuilt else "no prebuilt library"
        ),
        "megabytes": f"{size / 1e6:.0f}",
        "version": __version__,
    }
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)


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


def _tools() -> dict[str, str]:
    return {
        "fna": __version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def safe_name(name: str) -> str:
    """Return a name that is good as a file name everywhere: letters, digits and ._+- only."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip(".") or "model"


def _has_open_dimension(model: ModelProto) -> bool:
    constant = {tensor.name for tensor in model.graph.initializer}
    return any(
        not side.HasField("dim_value")
        for value in model.graph.input
        if value.name not in constant
        for side in value.type.tensor_type.shape.dim
    )


def _folder_of(output: Path) -> Path:
    folder = output.absolute().parent
    if not folder.is_dir():
        raise InputFileError(f"{output} cannot be written: {folder} is no folder; make it first")
    return folder


def _check_output(output: Path, archive: bool) -> None:
    """Refuse, before the long work, an output that would overwrite something else than a bundle."""
    _folder_of(output)
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
