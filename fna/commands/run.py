"""`fna run`."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.files import check_writable


@click.command("run", short_help="Run an engine or an ONNX file on images.")
@click.argument("file", type=options.PATH)
@options.images()
@options.output(help="Write all outputs to this .npz file.")
@options.resolution()
@click.option(
    "--provider", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="For .onnx files."
)
@options.plugin()
@click.option("--bench", "runs", type=click.IntRange(min=1), is_flag=False, flag_value=100, help="Time RUNS batches.")
@options.batch_size(help="Images in a timed batch.")
@options.json_file()
@options.quiet()
def command(
    file: Path,
    images: Path | None,
    output: Path | None,
    resolution: tuple[int, int] | None,
    provider: Any,
    plugin: Path | None,
    runs: int | None,
    batch: int,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Run FILE, an .engine or .onnx file, on photographs and say what came out; with --bench, time it.

    An engine needs a GPU it was built for; without one the exit code is 3, and the ONNX file it came from runs anywhere.
    """
    for path in (output, json_file):
        if path is not None:
            check_writable(path)
    with progress(quiet) as say:
        say("loading")
        import numpy as np

        from fna.engines.run.model import open_model
        from fna.files import written_whole

        name, shape, preprocessing = _describe(file, resolution)
        photographs, skipped = options.load_photographs(images)
        pixels = [preprocessing.apply(photograph, *shape)[None] for _, photograph in photographs]
        rows: list[Any] = []
        latency = None
        with closing(open_model(file, provider=provider, plugin=plugin)) as model:
            if runs is not None:
                say(f"timing {runs} batches of {batch}")
                stacked = np.concatenate([pixels[index % len(pixels)] for index in range(batch)])
                latency = model.bench({name: stacked}, runs=runs, warm_up=max(2, runs // 10))
            else:
                for (title, _), image in zip(photographs, pixels, strict=True):
                    say(f"running {title}")
                    started = time.perf_counter()
                    outputs = model.run({name: image})
                    rows.append((title, (time.perf_counter() - started) * 1e3, outputs))
        if output is not None and rows:
            arrays: dict[str, Any] = {key: np.concatenate([row[2][key] for row in rows]) for key in rows[0][2]}
            with written_whole(output) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, images=np.array([row[0] for row in rows]), **arrays)
        write_json(json_file, _as_dict(file, rows, latency))
    if latency is not None:
        _print_latency(file, latency, quiet)
        return
    _print(rows, skipped, output, quiet)


def _describe(file: Path, size: tuple[int, int] | None) -> tuple[str, tuple[int, int], Any]:
    """Return a file's input, its height and width, and how photographs become it."""
    from fna.engines.builder.profiles import check_size
    from fna.errors import InputFileError
    from fna.export.metadata import has_metadata, read_metadata
    from fna.export.preprocessing import Preprocessing
    from fna.files import load_onnx

    if file.suffix == ".engine":
        from fna.engines.manifest import read_manifest

        manifest = read_manifest(file)
        ((name, shapes),) = manifest.profiles.items()
        return name, size or (shapes.usual[2], shapes.usual[3]), manifest.preprocessing
    model = load_onnx(file, tensors=False)
    constant = {tensor.name for tensor in model.graph.initializer}
    value = next(tensor for tensor in model.graph.input if tensor.name not in constant)
    preprocessing = read_metadata(model, str(file)).preprocessing if has_metadata(model) else Preprocessing()
    sides = [dimension.dim_value or None for dimension in value.type.tensor_type.shape.dim]
    if len(sides) == 4:
        height, width = sides[2:]
        if size is not None:
            check_size((height, width), size)
            height, width = size
        if height and width:
            return value.name, (height, width), preprocessing
    shown = ", ".join("any" if side is None else str(side) for side in sides)
    raise InputFileError(
        f"{file} has input {value.name} [{shown}]: give --resolution for a [batch, 3, height, width] input"
    )


def _as_dict(file: Path, rows: list[Any], latency: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"file": str(file)}
    if latency is not None:
        document["latency"] = latency.model_dump()
    document["images"] = [
        {"image": title, "ms": round(ms, 3), "outputs": {key: list(array.shape) for key, array in outputs.items()}}
        for title, ms, outputs in rows
    ]
    return document


def _print_latency(file: Path, latency: Any, quiet: bool) -> None:
    graph = ", CUDA graph" if latency.cuda_graph else ""
    make_console(quiet).print(
        f"{file}: median {latency.median:.2f} ms, p99 {latency.p99:.2f} ms, fastest {latency.fastest:.2f} ms, "
        f"{latency.throughput:.1f} images/s, batch {latency.batch}, {latency.runs} runs ({latency.measures}{graph})"
    )


def _print(rows: list[Any], skipped: list[str], output: Path | None, quiet: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("image", "ms", "output", "shape", "min", "mean", "max"):
        table.add_column(title, justify="left" if title in ("image", "output") else "right", no_wrap=True)
    for name, milliseconds, outputs in rows:
        for index, (key, array) in enumerate(outputs.items()):
            table.add_row(
                name if index == 0 else "",
                f"{milliseconds:.1f}" if index == 0 else "",
                key,
                "x".join(str(side) for side in array.shape),
                *(f"{float(value):.4g}" for value in (array.min(), array.mean(), array.max())),
            )
    console = make_console(quiet)
    console.print(table)
    if skipped:
        console.print(f"skipped {len(skipped)} unreadable: {'; '.join(skipped)}")
    if output is not None:
        console.print(f"outputs: {output}")
