"""`fna inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands.options import json_option, make_console, quiet_option
from fna.errors import InputFileError, InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from fna.export.surgery.rows import Row


@click.command("inspect", short_help="Show what attention is in an ONNX file, or what an engine is.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    help="NAME=1x3x224x224: a size that an open input takes (repeatable).",
)
@json_option
@quiet_option
def command(file: Path, input_shapes: tuple[str, ...], json_file: Path | None, quiet: bool) -> None:
    """Print the attention blocks of an ONNX FILE, with what graft would say of each, or the manifest of an engine."""
    from fna.export.files import write_text

    console = make_console(quiet)
    if file.suffix == ".engine":
        answer = _engine_manifest(file)
        console.print_json(data=answer)
    else:
        from fna.export.surgery.graft import inspect_file

        rows = inspect_file(file, parse_input_shapes(input_shapes))
        print_table(console, file.name, rows)
        answer = {"file": file.name, "blocks": [row.as_dict() for row in rows]}
    if json_file is not None:
        text = json.dumps(answer, indent=2) + "\n"
        if str(json_file) == "-":
            click.echo(text, nl=False)
        else:
            write_text(json_file, text)


def print_table(console: Console, title: str, rows: Sequence[Row]) -> None:
    """Print one line per attention block."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        console.print(f"{title}: no attention found")
        return
    table = Table(title=f"attention in {title}", title_justify="left")
    for name in ("block", "node", "family", "heads", "head size", "tokens", "scale", "decision", "reason"):
        table.add_column(
            name, overflow="fold", justify="right" if name in ("block", "heads", "head size", "tokens") else "left"
        )
    for row in rows:
        values = row.as_dict()
        scale = "" if row.scale is None else f"{row.scale:.5g}"
        tokens = "" if values["tokens"] is None else str(values["tokens"])
        cells = [str(row.block), row.node, row.family, _text(row.heads), _text(row.head_size), tokens, scale]
        table.add_row(*(Text(cell) for cell in [*cells, row.decision.value, row.reason]))
    console.print(table)


def parse_input_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Parse `NAME=1x3x224x224`.

    Raises:
        InvalidArgumentError: for other text.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        match = re.fullmatch(r"(.+)=(\d{1,6}(?:x\d{1,6})*)", text.strip())
        if match is None or "0" in match[2].split("x"):
            raise InvalidArgumentError(f"input shape {text!r} cannot be read; write NAME=1x3x224x224")
        shapes[match[1]] = tuple(int(size) for size in match[2].split("x"))
    return shapes


def _text(value: int | None) -> str:
    return "" if value is None else str(value)


def _engine_manifest(file: Path) -> dict[str, Any]:
    manifest = file.with_name(file.name + ".json")
    if not file.is_file():
        raise InputFileError(f"{file} does not exist; give an ONNX file or an engine")
    try:
        answer: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputFileError(
            f"the engine's manifest {manifest} cannot be read: {error}; keep it beside the engine"
        ) from None
    return answer
