"""`fna build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands import options
from fna.commands.console import build_progress, make_console, write_json
from fna.files import check_writable

if TYPE_CHECKING:
    from fna.engines.manifest import Manifest


@click.command("build", short_help="Build an engine from an FNA file.")
@click.argument("onnx_file", type=options.PATH)
@options.output(required=True, help="The engine file to write.")
@click.option("--backend", type=click.Choice(("tensorrt-rtx", "tensorrt")), default="tensorrt-rtx", show_default=True)
@options.target(
    help="Devices, as in rtx-ada or rtx-ampere,rtx-ada; all.  [default: all; with TensorRT, this machine's GPU]",
)
@options.batch_range(show_default="1:1:8, or the file's own")
@options.resolution("resolutions", multiple=True)
@options.precision_options
@options.images()
@options.lowering()
@click.option(
    "--fuse-exact",
    is_flag=True,
    help="Rewrite a grafted file's exact attention for the runtime, too, as a traced file's is.",
)
@options.plugin()
@click.option("--workspace", type=click.IntRange(min=1), help="Most scratch memory of a layer, in MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="The builder's effort.  [default: the builder's]")
@click.option(
    "--timing-cache",
    type=options.PATH,
    help="File or folder for measured kernel times (TensorRT).  [default: ~/.cache/fna/timing]",
)
@click.option("--hardware-compatible", is_flag=True, help="One engine for all chips from Ampere on, slower (TensorRT).")
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Runs on later TensorRT of the same major version (TensorRT, without the plugin).",
)
@click.option("--tf32", is_flag=True, help="Let fp32 products be TF32: faster, with 10 bits of mantissa.")
@click.option(
    "--debug-tensors",
    type=click.Choice(("blocks", "unfused")),
    help="Let fna validate look inside: at block boundaries, which then cost fusions, or at what fusion left over, which costs none.",
)
@options.json_file()
@options.quiet()
def command(
    onnx_file: Path,
    output: Path,
    target: str | None,
    batch: str | None,
    resolutions: tuple[tuple[int, int], ...],
    precision: options.PrecisionChoice,
    images: Path | None,
    workspace: int | None,
    json_file: Path | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Build an engine from ONNX_FILE, as fna export or fna graft wrote it.

    TensorRT-RTX builds for all its GPUs on a machine that has none; TensorRT builds on the device. With --precision or --int8 the
    file is cast first, and written beside the engine. The manifest, OUTPUT.json, says what the engine is.
    """
    check_writable(output)
    with build_progress(quiet) as (say, on_progress):
        say("importing the builder")
        from fna.engines.builder.build import build_engine
        from fna.engines.builder.options import BuildOptions, check_types, parse_batch
        from fna.engines.targets import find_targets
        from fna.export.variants import make_variant

        cache = settings.pop("timing_cache") or Path.home() / ".cache" / "fna" / "timing"
        build_options = BuildOptions(
            targets=find_targets(target) if target and target != "all" else (),
            batch=parse_batch(batch) if batch is not None else None,
            resolutions=resolutions,
            workspace_mib=workspace,
            timing_cache=cache,
            **settings,
        )
        variant = precision.variant()
        notes: list[str] = []
        if variant.changes:
            check_types((variant.precision, *variant.eight_bit), build_options.targets)  # before minutes of quantising
            cast_file = output.with_name(f"{output.stem.removesuffix(f'-{variant.label}')}-{variant.label}.onnx")
            photographs = options.load_photographs(images)[0]
            resolution = resolutions[0] if resolutions else None
            notes = make_variant(onnx_file, cast_file, variant, photographs, resolution=resolution, on_step=say)
            onnx_file = cast_file
        say(f"building {output.name}")
        manifest = build_engine(onnx_file, output, build_options, on_progress)
    write_json(json_file, manifest)
    _print(manifest, output, notes, quiet)


def _print(manifest: Manifest, output: Path, notes: list[str], quiet: bool) -> None:
    from fna.engines.flavours import FLAVOURS
    from fna.engines.targets import capability_text

    console = make_console(quiet)
    title = FLAVOURS[manifest.backend].title
    console.print(
        f"{output}: {manifest.engine_bytes / 1e6:.1f} MB, {title} {manifest.backend_version}, compute capability "
        f"{capability_text(*manifest.compute_capabilities)}, "
        f"{manifest.lowering} lowering, built in {manifest.seconds:.1f} s"
    )
    if manifest.not_fused:
        console.print(f"note: portable instead of fused: {manifest.not_fused}", markup=False)
    plugins = sum(layer.implementation == "plugin" for layer in manifest.layers)
    kinds = ", ".join(sorted({layer.precision or layer.requested for layer in manifest.layers}))
    if manifest.layers:
        console.print(
            f"FNA layers: {len(manifest.layers)}, {plugins} by the plugin, inputs and outputs {kinds} (layers {manifest.inspection})"
        )
    for note in notes:
        console.print(note, markup=False)
