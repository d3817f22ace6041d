"""`fna build`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands.options import (
    image_options,
    json_option,
    load_photographs,
    make_console,
    parse_resolution,
    precision_options,
    quiet_option,
)
from fna.files import check_writable

if TYPE_CHECKING:
    from fna.engines.manifest import Manifest


@click.command("build", short_help="Build an engine from an FNA file.")
@click.argument("onnx_file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The engine file to write.")
@click.option("--backend", type=click.Choice(("tensorrt-rtx", "tensorrt")), default="tensorrt-rtx", show_default=True)
@click.option(
    "--target",
    help="Devices, as in rtx-ada or rtx-ampere,rtx-ada; all.  [default: all; with TensorRT, this machine's GPU]",
)
@click.option(
    "--batch",
    help="Batch sizes: 1, 1:4 (smallest:largest), 1:4:8 (with the usual).  [default: 1:1:8, or the file's own]",
)
@click.option(
    "--resolution", "resolutions", multiple=True, help="Image size for files that leave it open; may be repeated."
)
@precision_options
@image_options
@click.option("--lowering", type=click.Choice(("plugin", "portable")), help="[default: what backend and target take]")
@click.option("--plugin", type=click.Path(path_type=Path), help="libfna_plugin.so.  [default: that of make plugin]")
@click.option("--workspace", type=click.IntRange(min=1), help="Most scratch memory of a layer, in MiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="The builder's effort.  [default: the builder's]")
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path),
    help="File or folder for measured kernel times (TensorRT).  [default: ~/.cache/fna/timing]",
)
@click.option("--hardware-compatible", is_flag=True, help="One engine for all chips from Ampere on, slower (TensorRT).")
@click.option("--version-compatible", is_flag=True, help="Runs on later TensorRT of the same major version (TensorRT).")
@click.option("--tf32", is_flag=True, help="Let fp32 products be TF32: faster, with 10 bits of mantissa.")
@click.option(
    "--debug-tensors",
    type=click.Choice(("blocks", "unfused")),
    help="Let fna validate look inside: at block boundaries, which then cost fusions, or at what fusion left over, which costs none.",
)
@json_option
@quiet_option
def command(
    onnx_file: Path,
    output: Path,
    target: str | None,
    batch: str | None,
    resolutions: tuple[str, ...],
    precision: Any,
    int8: bool,
    keep_fp32: str | None,
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
        from fna.engines.builder.options import BuildOptions, parse_batch
        from fna.engines.targets import find_targets
        from fna.export.passes.precision import parse_blocks
        from fna.export.variants import Variant, make_variant
        from fna.files import write_text

        sizes = tuple(size for size in map(parse_resolution, resolutions) if size is not None)
        cache = settings.pop("timing_cache") or Path.home() / ".cache" / "fna" / "timing"
        options = BuildOptions(
            targets=find_targets(target) if target and target != "all" else (),
            batch=parse_batch(batch) if batch is not None else None,
            resolutions=sizes,
            workspace_mib=workspace,
            timing_cache=cache,
            **settings,
        )
        variant = Variant(precision or "fp32", int8, parse_blocks(keep_fp32))
        notes: list[str] = []
        if variant.changes:
            cast_file = output.with_name(f"{output.stem.removesuffix(f'-{variant.label}')}-{variant.label}.onnx")
            photographs = load_photographs(images)[0]
            resolution = sizes[0] if sizes else None
            notes = make_variant(onnx_file, cast_file, variant, photographs, resolution=resolution, on_step=say)
            onnx_file = cast_file
        say(f"building {output.name}")
        manifest = build_engine(onnx_file, output, options, on_progress)
    if json_file is not None:
        write_text(json_file, manifest.model_dump_json(indent=2) + "\n")
    _print(manifest, output, notes, quiet)


@contextmanager
def build_progress(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int | None], None]]]:
    """Show steps, and a bar for each of the builder's phases, on stderr; yields what tells them.

    The bars disappear with their phases.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        main = bars.add_task("starting", total=None)
        tasks: dict[str, Any] = {}

        def say(text: str) -> None:
            bars.update(main, description=text)

        def on_progress(phase: str, done: int, total: int | None) -> None:
            if total is None:
                if phase in tasks:
                    bars.remove_task(tasks.pop(phase))
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield say, on_progress


def _print(manifest: Manifest, output: Path, notes: list[str], quiet: bool) -> None:
    console = make_console(quiet)
    capabilities = ", ".join(f"{capability / 10:.1f}" for capability in manifest.compute_capabilities)
    title = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[manifest.backend]
    console.print(
        f"{output}: {manifest.engine_bytes / 1e6:.1f} MB, {title} {manifest.backend_version}, compute capability {capabilities}, "
        f"{manifest.lowering} lowering, built in {manifest.seconds:.1f} s"
    )
    plugins = sum(layer.implementation == "plugin" for layer in manifest.layers)
    kinds = ", ".join(sorted({layer.precision or layer.requested for layer in manifest.layers}))
    if manifest.layers:
        console.print(
            f"FNA layers: {len(manifest.layers)}, {plugins} by the plugin, inputs and outputs {kinds} (layers {manifest.inspection})"
        )
    for note in notes:
        console.print(f"fp16 overflow: {note}")
