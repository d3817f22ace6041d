"""`fna bundle`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.errors import InvalidArgumentError
from fna.precision import PRECISIONS

if TYPE_CHECKING:
    from fna.engines.bundle.format import BundleManifest


@click.command("bundle", short_help="Pack what a device needs to build, check and time its own engine.")
@click.argument("file", type=options.PATH)
@options.output(help="Folder to write, or an archive: NAME.tar.zst.")
@options.target()
@options.batch_range(default="1", show_default=True)
@click.option(
    "--precision",
    "precisions",
    metavar="P[,P...]",
    help="Models to hold: fp32, fp16, bf16, the default first; build_engine.sh --precision chooses.  [default: the file's]",
)
@options.int8(help="Its linear layers in int8, calibrated on the photographs; takes one --precision.")
@options.fp8(help="Its linear layers in fp8 (E4M3); with --int8 each in what it bears best.")
@options.keep_fp32()
@options.resolution()
@click.option(
    "--record",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Photographs to record inputs and outputs of.",
)
@options.plugin(
    "table",
    help="Folder of fna plugin's kernels and libraries.  [default: where it puts them]",
)
@click.option(
    "--triton-repository",
    "repository",
    type=options.PATH,
    help="Write a Triton Inference Server model repository to this folder.",
)
@click.option("--verify", is_flag=True, help="Check FILE, a bundle, instead: every file and its SHA-256.")
@options.images()
@options.json_file()
@options.quiet()
def command(
    file: Path,
    output: Path | None,
    target: str | None,
    batch: str,
    precisions: str | None,
    int8: bool,
    fp8: bool,
    keep_fp32: str | None,
    resolution: tuple[int, int] | None,
    record: int,
    table: Path | None,
    repository: Path | None,
    verify: bool,
    images: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Pack FILE, as fna export or fna graft wrote it, for a device that has TensorRT but no Python.

    The bundle holds both lowerings of the model, the plugin, a C++ runner, and recorded photographs with the outputs that PyTorch
    gives. On the device ./check.sh builds the engine, compares its outputs, and times it.
    """
    if verify:
        _verify(file, json_file, quiet)
        return
    if output is None and repository is None:
        raise InvalidArgumentError("--output is needed to make a bundle, or --triton-repository to make only that")
    if output is not None and target is None:
        raise InvalidArgumentError("--target is needed to make a bundle, as in --target jetson-agx-orin")
    lines: list[str] = []
    with progress(quiet) as say, tempfile.TemporaryDirectory() as folder:
        say("importing PyTorch")
        from fna.block_numbers import parse_blocks
        from fna.engines.builder.options import parse_batch
        from fna.engines.serving.model_repository import write_model_repository

        range_ = parse_batch(batch)
        chosen, kept = _parse_precisions(precisions), parse_blocks(keep_fp32)
        photographs, skipped = options.load_photographs(images)
        if int8 or fp8:
            eight_bit = tuple(kind for kind, wanted in (("int8", int8), ("fp8", fp8)) if wanted)
            file, doubts = _in_eight_bits(file, Path(folder), eight_bit, chosen, kept, photographs, resolution, say)
            lines, chosen = [*doubts], ()
        if output is not None and target is not None:
            from fna.engines.bundle.write import BundleOptions, write_bundle
            from fna.engines.targets import find_target
            from fna.plugins.built import table_folder

            bundle_options = BundleOptions(
                find_target(target), photographs[:record], range_, chosen, kept, resolution, table or table_folder()
            )
            manifest, notes = write_bundle(file, output, bundle_options, say)
            lines += [_describe(manifest, output), *notes]
            if skipped:
                lines.append(f"skipped {len(skipped)} unreadable: {'; '.join(skipped)}")
            write_json(json_file, manifest)
        if repository is not None:
            say("writing the model repository")
            written = write_model_repository(file, repository, batch=range_, resolution=resolution)
            lines.append(f"{repository}: Triton models {', '.join(written.models)}")
            lines += [f"left out {reason}" for reason in written.left_out]
            lines += [f"dropped {reason}" for reason in written.dropped]
    for line in lines:
        make_console(quiet).print(line)


def _in_eight_bits(
    file: Path,
    folder: Path,
    eight_bit: tuple[Any, ...],
    precisions: tuple[Any, ...],
    keep_fp32: tuple[int, ...],
    photographs: list[tuple[str, Any]],
    resolution: tuple[int, int] | None,
    say: Callable[[str], None],
) -> tuple[Path, list[str]]:
    """Write the file with its linear layers in 8 bits into a folder, and return it with what there is to say."""
    from fna.export.variants import FileVariant, make_variant

    if len(precisions) > 1:
        raise InvalidArgumentError(
            f"--precision {','.join(precisions)} was given, but a bundle in 8 bits holds one model; give one precision"
        )
    variant = FileVariant(precisions[0] if precisions else "fp32", eight_bit, keep_fp32)
    made = folder / f"{file.name.removesuffix('.onnx')}-{variant.label}.onnx"
    return made, make_variant(file, made, variant, photographs, resolution=resolution, on_step=say)


def _parse_precisions(text: str | None) -> tuple[Any, ...]:
    chosen = tuple(part.strip() for part in text.split(",")) if text is not None else ()
    for precision in chosen:
        if precision not in PRECISIONS:
            raise InvalidArgumentError(
                f"--precision {precision!r} cannot be bundled; choose from {', '.join(PRECISIONS)}, as in fp16,fp32"
            )
    return chosen


def _verify(file: Path, json_file: Path | None, quiet: bool) -> None:
    with progress(quiet) as say:
        say(f"checking {file.name}")
        from fna.engines.bundle.format import open_bundle

        with open_bundle(file) as bundle:
            write_json(json_file, bundle.manifest)
    make_console(quiet).print(_describe(bundle.manifest, file) + f"\nwhole; digest {bundle.digest}")


def _describe(manifest: BundleManifest, place: Path) -> str:
    megabytes = sum(bundled.bytes for bundled in manifest.files.values()) / 1e6
    plugin = manifest.plugin
    parts = [
        f"{place}: {len(manifest.files)} files, {megabytes:.1f} MB for {manifest.target}",
        f"{', '.join(manifest.check.tolerances)}, {manifest.lowering} lowering",
        f"{len(manifest.check.images)} photographs recorded",
    ]
    if plugin is not None:
        machines = f"prebuilt for {', '.join(plugin.prebuilt)}" if plugin.prebuilt else "no prebuilt library"
        parts.append(f"plugin with {len(plugin.layers)} layers, {machines}")
    return "; ".join(parts)
