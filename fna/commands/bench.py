"""`fna bench`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from fna.commands.options import (
    check_writable,
    json_option,
    make_console,
    make_plan,
    plan_options,
    progress,
    quiet_option,
)


@click.command("bench", short_help="Time dense against FNA on this machine.")
@click.argument("model", default="dinov2-small-saliency")
@click.option("--backend", type=click.Choice(("onnxruntime",)), default="onnxruntime", show_default=True)
@plan_options
@click.option(
    "--resolution", "resolutions", type=int, multiple=True, help="Side of the images; may be repeated.  [default: 518]"
)
@click.option("--runs", type=click.IntRange(min=1), default=7, show_default=True, help="Timed runs of each model.")
@json_option
@quiet_option
def command(
    model: str,
    backend: str,
    resolutions: tuple[int, ...],
    runs: int,
    json_file: Path | None,
    quiet: bool,
    **plan_settings: Any,
) -> None:
    """Time MODEL dense against FNA, taking turns in one process, batch 1."""
    if json_file is not None:
        check_writable(json_file)
    with progress(quiet) as say, tempfile.TemporaryDirectory() as folder:
        say("importing PyTorch")
        import json

        from fna.export.files import write_text
        from fna.export.sources import load_model
        from fna.validate.bench import bench_onnxruntime, describe_machine

        loaded = load_model(model)
        plan = make_plan(loaded.num_blocks, plan_settings)
        rows = bench_onnxruntime(
            loaded, plan, resolutions or (loaded.native_resolution,), runs=runs, folder=Path(folder), on_step=say
        )
        machine = describe_machine()
    if json_file is not None:
        document = {
            "model": model,
            "machine": machine,
            "plan": plan.model_dump(),
            "rows": [row.model_dump() for row in rows],
        }
        write_text(json_file, json.dumps(document, indent=2) + "\n")
    console = make_console(quiet)
    console.print(
        f"{model} on {backend}, {machine['processor']}, {machine['threads']} threads, batch 1, fp32, milliseconds"
    )
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in (
        "resolution",
        "tokens",
        "S",
        "FNA blocks",
        "dense (fastest-slowest)",
        "FNA (fastest-slowest)",
        "speed-up",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.resolution),
            str(row.tokens),
            str(row.landmarks),
            str(row.blocks),
            *(f"{timing.median:.0f} ({timing.fastest:.0f}-{timing.slowest:.0f})" for timing in (row.dense, row.fna)),
            f"{row.speedup:.2f}x",
        )
    console.print(table)
