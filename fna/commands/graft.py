"""`fna graft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fna.commands.options import (
    METHODS,
    SAMPLERS,
    json_option,
    make_console,
    parse_resolution,
    progress,
    quiet_option,
)
from fna.errors import CheckFailedError
from fna.files import check_writable


@click.command("graft", short_help="Replace the self-attention in an ONNX file by FNA.")
@click.argument("onnx_file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The ONNX file to write.")
@click.option(
    "--layers",
    help="Blocks of the table that become FNA: 6-11, or 0-2,6-11, all, or auto (see fna plan).  [default: all that can]",
)
@click.option("--landmarks", type=click.IntRange(min=1), default=64, show_default=True, help="Landmarks S per block.")
@click.option(
    "--sampler", type=click.Choice(SAMPLERS), default="grid", show_default=True, help="How landmarks are chosen."
)
@click.option("--method", type=click.Choice(METHODS), default="weighted", show_default=True)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file instead of the options above.")
@click.option("--prefix-tokens", type=click.IntRange(min=0), help="Class and register tokens.  [default: detected]")
@click.option("--seed", type=int, default=0, show_default=True, help="For the random sampler.")
@click.option("--resolution", help="Change the input size: 518, or HEIGHTxWIDTH, where the file's graph allows it.")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    help="NAME=1x3x224x224: a size that an open input takes (repeatable).",
)
@click.option("--check/--no-check", default=True, show_default=True, help="Prove every block in onnxruntime.")
@click.option("--strict", is_flag=True, help="Fail, and write nothing, if any attention is refused.")
@click.option("--dry-run", is_flag=True, help="Print the table and write nothing.")
@json_option
@quiet_option
def command(
    onnx_file: Path,
    output: Path | None,
    layers: str | None,
    plan_file: Path | None,
    resolution: str | None,
    input_shapes: tuple[str, ...],
    dry_run: bool,
    strict: bool,
    json_file: Path | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Find every attention block in ONNX_FILE, replace what is plain self-attention by FNA, and refuse the rest by name.

    Each replacement is proven in onnxruntime; a block that fails is put back. Refused blocks stay bit for bit as they were.
    """
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT.onnx, or --dry-run to see the table only")
    size = parse_resolution(resolution)
    if output is not None and not dry_run:
        check_writable(output)
    with progress(quiet) as say:
        say("starting")
        from fna.commands.inspect import parse_input_shapes, print_table
        from fna.export.surgery.graft import GraftOptions, graft
        from fna.files import write_text
        from fna.plan import load_plan

        plan = None if plan_file is None else load_plan(plan_file)
        if plan is None and layers == "auto":
            from fna.commands.plan import plan_automatically

            plan = plan_automatically(str(onnx_file), size, say)
        if plan is not None and size is None:
            size = plan.resolution
        options = GraftOptions(
            layers=layers or "all",
            plan=plan,
            resolution=size,
            strict=strict and not dry_run,
            input_shapes=parse_input_shapes(input_shapes),
            **settings,
        )
        result = graft(onnx_file, None if dry_run else output, options, say)
    console = make_console(quiet)
    print_table(console, onnx_file.name, result.rows)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    if json_file is not None:
        import json

        text = json.dumps(result.as_dict(), indent=2) + "\n"
        if str(json_file) == "-":
            click.echo(text, nl=False)
        else:
            write_text(json_file, text)
    if dry_run:
        if strict and result.refused:
            raise CheckFailedError(f"{result.refused} attention blocks would be refused (--strict)")
        return
    assert output is not None
    console.print(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, {result.replaced} blocks replaced, {result.refused} refused, "
        f"{len(result.rows) - result.replaced - result.refused} kept; {result.describe_proof()}",
        markup=False,
    )
