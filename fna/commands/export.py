"""`fna export`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from fna.commands.options import (
    image_options,
    json_option,
    load_photographs,
    make_console,
    make_plan,
    parse_resolution,
    plan_options,
    precision_options,
    progress,
    quiet_option,
)
from fna.files import check_writable


@click.command("export", short_help="Trace a PyTorch model to an ONNX file with FNA.")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@plan_options
@click.option("--resolution", help="Image size: 518, or HEIGHTxWIDTH.  [default: the model's own]")
@precision_options
@image_options
@click.option("--opset", type=click.IntRange(18, 23), help="ONNX operator set.  [default: 18]")
@click.option("--batch", default="dynamic", show_default=True, help="dynamic, or one fixed batch size.")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open.")
@click.option("--resample", is_flag=True, help="Choose landmarks anew in every block.")
@click.option("--prefix-tokens", type=click.IntRange(min=0), help="Class and register tokens.  [default: detected]")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random sampler.")
@json_option
@quiet_option
def command(
    model: str,
    output: Path,
    resolution: str | None,
    precision: Any,
    int8: bool,
    keep_fp32: str | None,
    images: Path | None,
    opset: int | None,
    batch: str,
    dynamic_size: bool,
    resample: bool,
    prefix_tokens: int | None,
    seed: int,
    json_file: Path | None,
    quiet: bool,
    **plan_settings: Any,
) -> None:
    """Trace MODEL to ONNX, with the chosen blocks' attention as fna nodes.

    MODEL is dinov2-small-saliency (built in, with real weights), a transformers model id or local folder, or
    module.path:factory. The file runs on any ONNX runtime as it is; fna build makes an engine of it.
    """
    check_writable(output)
    size = parse_resolution(resolution)
    fixed_batch = _parse_batch(batch)
    with progress(quiet) as say:
        say("importing PyTorch")
        from fna.export.metadata import read_metadata
        from fna.export.passes.precision import parse_blocks
        from fna.export.sources.loading import load_model
        from fna.export.trace import TraceOptions, export_onnx
        from fna.export.variants import Variant, make_variant
        from fna.files import load_onnx, write_text

        variant = Variant(precision or "fp32", int8, parse_blocks(keep_fp32))

        say(f"loading {model}")
        loaded = load_model(model)
        if plan_settings["layers"] == "auto" and plan_settings["plan_file"] is None:
            from fna.commands.plan import plan_automatically

            plan = plan_automatically(model, size, say)
        else:
            plan = make_plan(
                loaded.num_blocks, plan_settings, resample=resample, prefix_tokens=prefix_tokens, seed=seed
            )
        height, width = size or plan.resolution or (loaded.native_resolution,) * 2
        options = TraceOptions(height, width, opset, "fp32", fixed_batch, dynamic_size)
        say(f"tracing {model} at {height}x{width}")
        notes: list[str] = []
        if variant.changes:
            with tempfile.TemporaryDirectory() as folder:
                traced = Path(folder) / output.name
                export_onnx(loaded, plan, options, traced)
                notes = make_variant(
                    traced, output, variant, load_photographs(images)[0], resolution=(height, width), on_step=say
                )
        else:
            export_onnx(loaded, plan, options, output)
        metadata = read_metadata(load_onnx(output, tensors=False), str(output))
    if json_file is not None:
        write_text(json_file, metadata.model_dump_json(indent=2) + "\n")
    opset = next(entry.version for entry in load_onnx(output, tensors=False).opset_import if entry.domain == "")
    numbers = ", ".join(str(entry.block) for entry in metadata.plan.blocks) or "none"
    make_console(quiet).print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, opset {opset}, {variant.label}, "
        f"FNA blocks {numbers} of {metadata.plan.num_blocks}"
    )
    for note in notes:
        make_console(quiet).print(f"fp16 overflow: {note}")


def _parse_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither 'dynamic' nor a batch size of at least 1", param_hint="--batch")
    return int(text)
