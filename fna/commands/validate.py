"""`fna validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fna.commands.options import (
    image_options,
    json_option,
    load_photographs,
    make_console,
    parse_resolution,
    progress,
    quiet_option,
)

if TYPE_CHECKING:
    from fna.validate.budget import Validation


@click.command("validate", short_help="Measure how far a file is from PyTorch, step by step.")
@click.argument("file", type=click.Path(path_type=Path))
@image_options
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for the JSON and the picture.  [default: FILE-validation]"
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True), help="Of the export error.  [default: by precision]"
)
@click.option("--resolution", help="Image size for files that leave it open: 518, or HEIGHTxWIDTH.")
@json_option
@quiet_option
def command(
    file: Path,
    images: Path | None,
    output: Path | None,
    tolerance: float | None,
    resolution: str | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare FILE, an .onnx file or an .engine with its ONNX file beside it, with PyTorch on photographs.

    Three separate errors: approximation (FNA against exact attention), export (the ONNX file against FNA in PyTorch) and engine
    (where this machine can run one). Exit code 1 when an error is out of tolerance.
    """
    size = parse_resolution(resolution)
    with progress(quiet) as say:
        say("importing PyTorch")
        from fna.errors import CheckFailedError, InputFileError
        from fna.export.files import write_text
        from fna.validate.budget import validate_file
        from fna.validate.overlay import draw_overlay

        folder = output or file.with_name(f"{file.stem}-validation")
        photographs, skipped = load_photographs(images)
        result, outputs = validate_file(
            file, photographs, skipped=skipped, tolerance=tolerance, resolution=size, on_step=say
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputFileError(f"{folder} cannot be made: {error.strerror}; give another --output") from None
        say("drawing")
        picture = folder / "overlay.png"
        drawn = draw_overlay(photographs, outputs, result.metadata, picture)
        text = result.model_dump_json(indent=2) + "\n"
        write_text(folder / "errors.json", text)
        if json_file is not None:
            write_text(json_file, text)
    _print(result, folder, picture if drawn else None, quiet)
    failures = [line for step in result.steps for line in step.failures()]
    if failures:
        raise CheckFailedError("; ".join(failures))


def _print(result: Validation, folder: Path, picture: Path | None, quiet: bool) -> None:
    from rich.table import Table

    console = make_console(quiet)
    plan = result.metadata.plan
    counts = sorted({entry.landmarks for entry in plan.blocks})
    samplers = sorted({entry.sampler for entry in plan.blocks})
    numbers = [entry.block for entry in plan.blocks]
    console.print(
        f"{result.file}: {result.metadata.source}, {len(result.images)} photographs, FNA blocks {numbers} of {plan.num_blocks}, "
        f"S={'/'.join(map(str, counts))}, {'/'.join(samplers)}, {plan.method}"
    )
    table = Table(box=None, pad_edge=False)
    for title in (
        "step",
        "output",
        "max abs",
        "rel L2",
        "cos min",
        "cos p5",
        "cos mean",
        "class",
        "patches",
        "worst",
        "verdict",
    ):
        left = title in ("step", "output", "worst", "verdict")
        table.add_column(title, justify="left" if left else "right", no_wrap=True)
    for step in result.steps:
        failed = {line.split("output ")[1].split()[0] for line in step.failures()}
        for index, error in enumerate(step.errors):
            verdict = "FAILED" if error.output in failed else "ok" if step.tolerance is not None else ""
            table.add_row(
                step.step if index == 0 else "",
                error.output,
                f"{error.max_abs:.2e}",
                f"{error.relative_l2:.2e}",
                f"{error.cosine_min:.5f}",
                f"{error.cosine_p5:.5f}",
                f"{error.cosine_mean:.5f}",
                _optional(error.cosine_first_token),
                _optional(error.cosine_patches),
                result.images[error.worst_item],
                verdict,
            )
    console.print(table)
    for step in result.steps:
        if step.not_measured:
            console.print(f"{step.step}: not measured: {step.not_measured}")
    if result.skipped:
        console.print(f"skipped {len(result.skipped)} unreadable: {'; '.join(result.skipped)}")
    console.print(f"numbers: {folder / 'errors.json'}" + (f"   picture: {picture}" if picture else ""))


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
