"""`fna export`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.files import check_writable

if TYPE_CHECKING:
    from fna.export.sources.loading import LoadedModel
    from fna.plan import Plan


@click.command("export", short_help="Trace a PyTorch model to an ONNX file with FNA.")
@click.argument("model")
@options.output(required=True, help="The ONNX file to write.")
@options.plan_options(
    layers={
        "help": "Blocks that become FNA: 6-11, or 0-2,6-11, all, none, or auto (see fna plan).  [default: the later half; with none "
        "of these options, focal attention in all blocks where that pays]"
    }
)
@options.weights()
@options.resolution(help="Image size: 518, or HEIGHTxWIDTH.  [default: the model's own]")
@options.precision_options
@options.images()
@click.option("--opset", type=click.IntRange(18, 23), help="ONNX operator set.  [default: 18]")
@click.option("--batch", default="dynamic", show_default=True, help="dynamic, or one fixed batch size.")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open.")
@options.json_file()
@options.quiet()
def command(
    model: str,
    output: Path,
    plan: options.PlanChoice,
    weights: Path | None,
    resolution: tuple[int, int] | None,
    precision: options.PrecisionChoice,
    images: Path | None,
    opset: int | None,
    batch: str,
    dynamic_size: bool,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Trace MODEL to ONNX, with the chosen blocks' attention as fna nodes.

    MODEL is dinov2-small-saliency (built in, with real weights), a transformers model id or local folder, timm:NAME,
    open_clip:NAME,pretrained=TAG, torchvision:NAME, or module.path:factory,size=518 (arguments behind commas). The file runs on any
    ONNX runtime as it is; fna build makes an engine of it.
    """
    check_writable(output)
    fixed_batch = _parse_batch(batch)
    with progress(quiet) as say:
        say("importing PyTorch")
        from fna.export.metadata import read_metadata
        from fna.export.sources.loading import load_model
        from fna.export.sources.model_names import with_weights
        from fna.export.trace import TraceOptions, export_onnx
        from fna.export.variants import make_variant
        from fna.files import load_onnx

        variant = precision.variant()
        model = with_weights(model, weights)
        say(f"loading {model}")
        loaded = load_model(model)
        notes: list[str] = []
        if plan.is_left_open and not dynamic_size:
            made, said = _plan_without_photographs(loaded, resolution, plan.settings["prefix_tokens"])
            notes += [f"note: {line}" for line in said]
        elif plan.is_automatic:
            from fna.commands.plan import plan_automatically

            made = plan_automatically(model, resolution, say)
        else:
            made = plan.make(loaded.num_blocks, towers=loaded.towers)
        height, width = resolution or made.resolution or loaded.native_size
        trace_options = TraceOptions(height, width, opset, "fp32", fixed_batch, dynamic_size)
        say(f"tracing {model} at {height}x{width}")
        if variant.changes:
            with tempfile.TemporaryDirectory() as folder:
                traced = Path(folder) / output.name
                export_onnx(loaded, made, trace_options, traced)
                notes += make_variant(
                    traced,
                    output,
                    variant,
                    options.load_photographs(images)[0],
                    resolution=(height, width),
                    on_step=say,
                )
        else:
            export_onnx(loaded, made, trace_options, output)
        metadata = read_metadata(load_onnx(output, tensors=False), str(output))
    write_json(json_file, metadata)
    opset = next(
        opset_id.version for opset_id in load_onnx(output, tensors=False).opset_import if opset_id.domain == ""
    )
    make_console(quiet).print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, opset {opset}, {variant.label}, "
        f"{metadata.plan.describe_blocks()}"
    )
    for note in notes:
        make_console(quiet).print(note, markup=False)


def _plan_without_photographs(
    loaded: LoadedModel, resolution: tuple[int, int] | None, prefix_tokens: int | None
) -> tuple[Plan, list[str]]:
    """The default plan, tower by tower, and lines that say what it is."""
    from fna.default_plan import plan_without_photographs
    from fna.errors import InvalidArgumentError
    from fna.plan import Plan
    from fna.validate.planning.subject import TorchSubject
    from fna.validate.planning.towers import check_grids, join_plans, towers_to_plan

    exact = Plan(num_blocks=loaded.num_blocks, towers=loaded.towers)
    if loaded.frames:
        return exact, [
            f"the model stays exact: it takes {loaded.frames} images at once; choose --layers and --landmarks, or a plan by fna plan"
        ]
    size = resolution or loaded.native_size
    layouts = [TorchSubject(loaded, *size, tower).layout for tower in towers_to_plan(loaded, None)]
    try:
        check_grids(layouts)
    except InvalidArgumentError as error:
        return exact, [f"the model stays exact: {error}"]
    plans, notes = [], []
    for layout in layouts:
        own = None if layout.towers else layout.prefix_tokens
        made, said = plan_without_photographs(
            layout.num_blocks,
            set(layout.refused),
            layout.patches,
            own if prefix_tokens is None else prefix_tokens,
            layout.towers,
        )
        plans.append(made)
        notes.append(f"{'the model' if layout.tower is None else f'tower {layout.tower}'} {said}")
    return join_plans(plans), notes


def _parse_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise click.BadParameter(f"{text!r} is neither 'dynamic' nor a batch size of at least 1", param_hint="--batch")
    return int(text)
