"""`fna validate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.errors import CheckFailedError, InputFileError
from fna.files import check_writable

if TYPE_CHECKING:
    from fna.validate.report.document import Document


@click.command("validate", short_help="Measure how far a file is from PyTorch, step by step.")
@click.argument("file", type=options.PATH)
@options.images()
@options.output(help="Folder for the JSON and the picture.  [default: FILE-validation]")
@click.option("--original", type=options.PATH, help="What a grafted FILE was made from, where it is not beside it.")
@click.option(
    "--tolerance",
    "tolerances",
    multiple=True,
    metavar="STEP=NUMBER",
    help="Largest relative L2 error of a step: approximation, export, precision, plugin or engine (repeatable).",
)
@options.resolution()
@click.option("--bisect", "with_bisect", is_flag=True, help="Measure every block, and name the one to blame.")
@click.option("--task", "with_task", is_flag=True, help="Measure retrieval, classification, segmentation and saliency.")
@click.option(
    "--bench",
    metavar="FILE|quick",
    help="Show times: of a JSON file of fna bench, or measured now in PyTorch, a few runs each.",
)
@click.option(
    "--emulate-plugin",
    is_flag=True,
    help="Also run the FNA nodes of the first photograph in the plugin library, its kernels emulated; after fna plugin --checks.",
)
@click.option("--report", type=options.PATH, help="Write one HTML page, and a JSON file beside it.")
@options.json_file()
@options.quiet()
def command(
    file: Path,
    images: Path | None,
    output: Path | None,
    original: Path | None,
    tolerances: tuple[str, ...],
    resolution: tuple[int, int] | None,
    with_bisect: bool,
    with_task: bool,
    bench: str | None,
    emulate_plugin: bool,
    report: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Compare FILE with PyTorch on photographs. FILE is an .onnx file, an .engine with its .onnx beside it, or a bundle.

    Separate errors, each measured by changing one thing: approximation (FNA against exact attention), export (the ONNX file in
    fp32 against FNA in PyTorch), precision (fp16, bf16 or int8 against fp32), plugin (its compiled kernels, emulated, if asked
    for) and engine (where this machine can run one). A
    grafted file is compared with the file that it was made from. Exit code 1 when a step is out of tolerance; the block to blame is
    named, in engines that were built with --debug-tensors.
    """
    folder = output or file.with_name(f"{file.stem}-validation")
    for path in (json_file, report):
        if path is not None and path.parent != folder:  # which is made when there is something to put into it
            check_writable(path)
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise InputFileError(f"--report {report} is an HTML page, with JSON beside it; give a name ending in .html")
    with progress(quiet, bar=True) as say:
        say("importing PyTorch")
        from fna.files import write_text
        from fna.validate.budget.tolerances import parse_tolerances
        from fna.validate.photographs import load_labelled
        from fna.validate.report.document import Extras, make_document
        from fna.validate.report.overlay import draw_overlay

        limits = parse_tolerances(tolerances)
        photographs = load_labelled(images)
        extras = Extras(
            bisect=with_bisect, task=with_task, bench=bench, command=_command_line(), emulate_plugin=emulate_plugin
        )
        document, outputs = make_document(file, photographs, limits, resolution, original, extras, say)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputFileError(f"{folder} cannot be made: {error.strerror}; give another --output") from None
        say("drawing")
        picture = folder / "overlay.png"
        drawn = draw_overlay(photographs.images, outputs, document.validation.metadata, picture)
        text = document.dump_json()
        write_text(folder / "errors.json", text)
        write_json(json_file, text)
        if report is not None:
            from fna.validate.report.page import write_report

            write_report(document, outputs, photographs.images, report)
    _print(document, folder, picture if drawn else None, report, quiet)
    failures = document.failures()
    if failures:
        raise CheckFailedError("; ".join(failures))


def _command_line() -> str:
    import shlex

    words: list[str] = click.get_current_context().find_object(list) or []
    return shlex.join(["fna", *words])


def _print(document: Document, folder: Path, picture: Path | None, report: Path | None, quiet: bool) -> None:
    console = make_console(quiet)
    result = document.validation
    plan = result.metadata.plan
    console.print(
        f"{result.file}: {result.metadata.source}, {len(result.images)} photographs, {result.metadata.precision}, "
        f"{plan.describe_blocks()}"
    )
    for place in result.not_finite:
        console.print(place.describe(), markup=False)
    console.print(_budget_table(result))
    for step in result.steps:
        if step.not_measured:
            console.print(f"{step.step}: not measured: {step.not_measured}", markup=False)
    for line in document.summary():
        console.print(line, markup=False)
    if result.skipped:
        console.print(f"skipped {len(result.skipped)} unreadable: {'; '.join(result.skipped)}", markup=False)
    parts = [f"numbers: {folder / 'errors.json'}"]
    parts += [f"picture: {picture}"] if picture else []
    parts += [f"report: {report}"] if report else []
    console.print("   ".join(parts), markup=False)


def _budget_table(result: Any) -> Any:
    from rich.table import Table

    from fna.validate.metrics import METRICS

    table = Table(box=None, pad_edge=False)
    for title in ("step", "output"):
        table.add_column(title, no_wrap=True)
    for metric in METRICS.values():
        table.add_column(metric.short, justify="right", no_wrap=True)
    for title in ("worst", "verdict"):
        table.add_column(title, no_wrap=True)
    for step in (*result.steps, result.total):
        for index, error in enumerate(step.errors):
            verdict = "FAILED" if step.failure_of(error) else "ok" if step.tolerance is not None else ""
            table.add_row(
                step.step if index == 0 else "",
                error.output,
                *(metric.show(error.value(name)) for name, metric in METRICS.items()),
                result.images[error.worst_item],
                verdict,
            )
    return table
