"""`fna graft`."""

from __future__ import annotations

from pathlib import Path

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.errors import CheckFailedError
from fna.files import check_writable


@click.command("graft", short_help="Replace the self-attention in an ONNX file by FNA.")
@click.argument("onnx_file", type=options.PATH)
@options.output(help="The ONNX file to write.")
@options.plan_options(
    without=("resample",),
    layers={
        "help": "Blocks of the table that become FNA: 6-11, or 0-2,6-11, all, or auto (see fna plan).  [default: all that can]"
    },
)
@options.resolution(help="Change the input size: 518, or HEIGHTxWIDTH, where the file's graph allows it.")
@options.input_shapes()
@click.option("--check/--no-check", default=True, show_default=True, help="Prove every block in onnxruntime.")
@click.option("--strict", is_flag=True, help="Fail, and write nothing, if any attention is refused.")
@click.option("--dry-run", is_flag=True, help="Print the table and write nothing.")
@options.json_file()
@options.quiet()
def command(
    onnx_file: Path,
    output: Path | None,
    plan: options.PlanChoice,
    resolution: tuple[int, int] | None,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    check: bool,
    dry_run: bool,
    strict: bool,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Find every attention block in ONNX_FILE, replace what is plain self-attention by FNA, and refuse the rest by name.

    Each replacement is proven in onnxruntime; a block that fails is put back. Refused blocks stay bit for bit as they were.
    """
    if output is None and not dry_run:
        raise click.UsageError("give -o OUT.onnx, or --dry-run to see the table only")
    if output is not None and not dry_run:
        check_writable(output)
    with progress(quiet) as say:
        say("starting")
        from fna.commands.inspect import print_table
        from fna.export.surgery.graft import GraftOptions, graft

        whole_plan = plan.load()
        if plan.is_automatic:
            from fna.commands.plan import plan_automatically

            whole_plan = plan_automatically(str(onnx_file), resolution, say)
        if whole_plan is not None and resolution is None:
            resolution = whole_plan.resolution
        graft_options = GraftOptions(
            **{**plan.settings, "layers": plan.settings["layers"] or "all"},
            plan=whole_plan,
            resolution=resolution,
            strict=strict and not dry_run,
            check=check,
            input_shapes=dict(input_shapes),
        )
        result = graft(onnx_file, None if dry_run else output, graft_options, say)
    console = make_console(quiet)
    print_table(console, onnx_file.name, result.rows)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    write_json(json_file, result.as_dict())
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
