"""`fna build`."""

from __future__ import annotations

from pathlib import Path

import click

from fna.commands.options import check_writable, json_option, make_console, progress, quiet_option


@click.command("build", short_help="Build an engine from an FNA file; needs no GPU.")
@click.argument("onnx_file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The engine file to write.")
@click.option("--backend", type=click.Choice(("tensorrt-rtx",)), default="tensorrt-rtx", show_default=True)
@click.option(
    "--target", default="all", show_default=True, help="Devices to build for, as in rtx-ada or rtx-ampere,rtx-ada; all."
)
@click.option(
    "--batch",
    default="1:1:8",
    show_default=True,
    help="Batch sizes: 1, 1:4 (smallest:largest), 1:4:8 (with the usual).",
)
@json_option
@quiet_option
def command(
    onnx_file: Path, output: Path, backend: str, target: str, batch: str, json_file: Path | None, quiet: bool
) -> None:
    """Build an engine from ONNX_FILE, as fna export or fna graft wrote it.

    TensorRT-RTX builds for all its GPUs on a machine that has none. The manifest, OUTPUT.json, says what the engine is.
    """
    check_writable(output)
    with progress(quiet) as say:
        say("importing TensorRT-RTX")
        from fna.engines.build import build_rtx_engine, parse_batch
        from fna.engines.targets import find_targets
        from fna.export.files import write_text

        say(f"building {output.name} for {target}")
        manifest = build_rtx_engine(onnx_file, output, find_targets(target), parse_batch(batch))
    if json_file is not None:
        write_text(json_file, manifest.model_dump_json(indent=2) + "\n")
    capabilities = ", ".join(f"{capability / 10:.1f}" for capability in manifest.compute_capabilities)
    make_console(quiet).print(
        f"{output}: {manifest.engine_bytes / 1e6:.1f} MB, TensorRT-RTX {manifest.backend_version}, compute capability {capabilities}, "
        f"{manifest.lowering} lowering, built in {manifest.seconds:.1f} s"
    )
