"""`fna run`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from fna.commands.options import (
    check_writable,
    image_options,
    load_photographs,
    make_console,
    parse_resolution,
    progress,
    quiet_option,
)


@click.command("run", short_help="Run an engine or an ONNX file on images.")
@click.argument("file", type=click.Path(path_type=Path))
@image_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write all outputs to this .npz file.")
@click.option("--resolution", help="Image size for files that leave it open: 518, or HEIGHTxWIDTH.")
@quiet_option
def command(file: Path, images: Path | None, output: Path | None, resolution: str | None, quiet: bool) -> None:
    """Run FILE, an .engine or .onnx file, on photographs and say what came out.

    An engine needs a GPU it was built for; without one the exit code is 3, and the ONNX file it came from runs anywhere.
    """
    size = parse_resolution(resolution)
    if output is not None:
        check_writable(output)
    with progress(quiet) as say:
        say("loading")
        import numpy as np

        from fna.export.files import written_whole

        execute, preprocess = _open(file, size)
        photographs, skipped = load_photographs(images)
        rows, parts = [], []
        for name, photograph in photographs:
            say(f"running {name}")
            pixels = preprocess(photograph)
            started = time.perf_counter()
            outputs = execute(pixels)
            rows.append((name, (time.perf_counter() - started) * 1e3, outputs))
            parts.append(outputs)
        if output is not None:
            stacked: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            with written_whole(output) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(stream, images=np.array([name for name, _ in photographs]), **stacked)
    _print(rows, skipped, output, quiet)


def _open(file: Path, size: tuple[int, int] | None) -> tuple[Any, Any]:
    """Return a function that runs one preprocessed image, and the function that preprocesses."""
    import numpy as np

    from fna.engines.run import RtxEngine, open_onnx, run_onnx
    from fna.errors import InputFileError
    from fna.export.files import load_onnx
    from fna.export.metadata import read_metadata
    from fna.export.preprocessing import Preprocessing

    if file.suffix == ".engine":
        engine = RtxEngine(file)
        manifest = engine.manifest
        ((name, shapes),) = manifest.profiles.items()
        height, width = shapes.usual[2:]
        preprocessing = manifest.preprocessing
        dtype = np.float16 if manifest.precision == "fp16" else np.float32
        return (
            lambda pixels: engine.run({name: pixels.astype(dtype)}),
            lambda image: preprocessing.apply(image, height, width)[None],
        )
    model = load_onnx(file, tensors=False)
    session = open_onnx(file)
    value = session.get_inputs()[0]
    has_metadata = any(entry.key.startswith("fna.") for entry in model.metadata_props)
    preprocessing = read_metadata(model, str(file)).preprocessing if has_metadata else Preprocessing()
    fixed = [side if isinstance(side, int) else None for side in value.shape[2:4]]
    height, width = (fixed[0] or (size or (0, 0))[0]), (fixed[1] or (size or (0, 0))[1])
    if len(value.shape) != 4 or not height or not width:
        raise InputFileError(
            f"{file} has input {value.name} {value.shape}: give --resolution for a [batch, 3, height, width] input"
        )
    dtype = np.float16 if "float16" in value.type else np.float32
    return (
        lambda pixels: run_onnx(session, {value.name: pixels.astype(dtype)}),
        lambda image: preprocessing.apply(image, height, width)[None],
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
