"""`fna inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.errors import InputFileError, InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from fna.engines.manifest import Manifest
    from fna.export.surgery.recognise.rows import Row
    from fna.validate.token_report import FoundToken, TokenReport

MOST_PLACES = 3
"""Places of massive or artifact tokens that the table names for each block; --json has all."""


@click.command("inspect", short_help="Show what attention is in an ONNX file, or what an engine is.")
@click.argument("file", metavar="FILE|MODEL")
@options.input_shapes()
@click.option("--tokens", is_flag=True, help="Find massive and artifact tokens of a PyTorch MODEL on photographs.")
@options.images()
@options.resolution(help="With --tokens, image size: 518, or HEIGHTxWIDTH.  [default: the model's own]")
@options.output("folder", help="With --tokens, folder for a picture of each.")
@options.json_file()
@options.quiet()
def command(
    file: str,
    input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
    tokens: bool,
    images: Path | None,
    resolution: tuple[int, int] | None,
    folder: Path | None,
    json_file: Path | None,
    quiet: bool,
) -> None:
    """Print the attention blocks of an ONNX FILE, with what graft would say of each, or what an engine is: its manifest, in words.

    With --tokens: which tokens of a PyTorch MODEL (as for fna export) are massive or artifacts, block by block, and the lines of a
    plan (masks, landmarks_include, landmarks_exclude) that fit them.
    """
    console = make_console(quiet)
    path = Path(file)
    if tokens:
        report = _survey(file, images, resolution, folder, quiet)
        print_tokens(console, report)
        answer: dict[str, Any] = report.model_dump(mode="json")
    elif images is not None or resolution is not None or folder is not None:
        raise InvalidArgumentError("--images, --resolution and --output belong to --tokens; add it, or leave them out")
    elif path.suffix == ".engine":
        from fna.engines.manifest import read_manifest

        manifest = read_manifest(path)
        print_engine(console, path, manifest)
        answer = manifest.model_dump(mode="json")
    else:
        from fna.export.surgery.graft import inspect_file

        rows = inspect_file(path, dict(input_shapes))
        print_table(console, path.name, rows)
        answer = {"file": path.name, "blocks": [row.as_dict() for row in rows]}
    write_json(json_file, answer)


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


def print_engine(console: Console, file: Path, manifest: Manifest) -> None:
    """Print what an engine is: versions, devices, types, shapes, and what became of its FNA nodes."""
    from rich.table import Table
    from rich.text import Text

    from fna.engines.flavours import FLAVOURS
    from fna.engines.targets import capability_text

    title = f"{FLAVOURS[manifest.backend].title} {manifest.backend_version}"
    kept = [
        title if not manifest.version_compatible else f"{title} and later of the same major version",
        "every chip from Ampere on" if manifest.hardware_compatible else "the chips named",
    ]
    capabilities = capability_text(*manifest.compute_capabilities)
    plan = manifest.plan
    facts = {
        "file": f"{file}, {manifest.engine_bytes / 1e6:.1f} MB",
        "built by": f"{title} in {manifest.seconds:.1f} s" + (f" on {manifest.device}" if manifest.device else ""),
        "built from": f"{manifest.onnx_name}, {manifest.lowering} lowering",
        "targets": f"{', '.join(manifest.targets)} (compute capability {capabilities})",
        "runs on": ", ".join(kept),
        "precision": f"{manifest.precision}, TF32 {'on' if manifest.tf32 else 'off'}",
        "attention": plan.describe_blocks(),
        "plugin": f"{manifest.plugin_name}, SHA-256 {manifest.plugin_sha256}"
        if manifest.plugin_name
        else "none needed",
        "debug tensors": manifest.debug_tensors or "none",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, fact in facts.items():
        table.add_row(name, Text(fact))
    for number, shapes in enumerate((manifest.profiles, *manifest.more_profiles)):
        for name, range_ in shapes.items():
            smallest, usual, largest = (
                "x".join(map(str, shape)) for shape in (range_.smallest, range_.usual, range_.largest)
            )
            table.add_row(f"profile {number}", Text(f"{name} {smallest} to {largest}, tuned for {usual}"))
    console.print(table)
    if not manifest.layers:
        console.print("no FNA layers")
        return
    layers = Table(title=f"FNA layers ({manifest.inspection})", title_justify="left")
    for name in ("node", "operator", "computed by", "asked for", "runs in"):
        layers.add_column(name, overflow="fold")
    for layer in manifest.layers:
        by = f"plugin version {layer.plugin_version}" if layer.implementation == "plugin" else "standard operators"
        layers.add_row(*map(Text, (layer.name, layer.op_type, by, layer.requested, layer.precision or "not known")))
    console.print(layers)


def print_tokens(console: Console, report: TokenReport) -> None:
    """Print one line per block, joined over the photographs, and a verdict."""
    from rich.table import Table
    from rich.text import Text

    count = len(report.images)
    table = Table(
        title=f"tokens of {report.model} at {report.height}x{report.width} on {count} photographs", title_justify="left"
    )
    for name in ("block", "median norm", "largest norm", "largest gap", "massive", "artifacts", "where"):
        table.add_column(name, overflow="fold", justify="left" if name == "where" else "right")
    totals = {"massive": 0, "artifact": 0}
    for blocks in zip(*(image.blocks for image in report.images), strict=True):
        unusual = [
            (kind, image.image, token)
            for image, block in zip(report.images, blocks, strict=True)
            for kind, tokens in (("massive", block.massive), ("artifact", block.artifacts or ()))
            for token in tokens
        ]
        counts = {kind: sum(other == kind for other, _, _ in unusual) for kind in totals}
        totals = {kind: totals[kind] + counts[kind] for kind in totals}
        places = [f"{kind} {_place(token)} of {image}" for kind, image, token in unusual[:MOST_PLACES]]
        more = f" and {len(unusual) - MOST_PLACES} more" if len(unusual) > MOST_PLACES else ""
        artifacts = "" if blocks[0].artifacts is None else str(counts["artifact"])
        cells = (
            str(blocks[0].block),
            f"{sum(block.median_norm for block in blocks) / count:.3g}",
            f"{max(block.largest_norm for block in blocks):.3g}",
            f"{max(block.gap for block in blocks):.2f}x",
            str(counts["massive"]),
            artifacts,
            ", ".join(places) + more,
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
    if not any(totals.values()):
        console.print("no massive and no artifact tokens: a plan needs no masks, and no landmarks for them")
    else:
        console.print(f"{totals['massive']} massive and {totals['artifact']} artifact tokens in all")
        if not report.proposals:
            console.print("in no block on half of the photographs, so no lines of a plan are proposed")
    for line in report.skipped:
        console.print(Text(f"skipped {line}"))
    if report.proposals:
        console.print("for a plan (landmarks: of those of these blocks that are FNA):")
    for proposal in report.proposals:
        lines = json.dumps(proposal.model_dump(mode="json")["plan"])
        console.print(Text(f"  {lines}\n    {proposal.why}"), soft_wrap=True)


def _place(token: FoundToken) -> str:
    at = "before the patches" if token.row is None else f"at row {token.row}, column {token.column}"
    return f"{token.token} {at} ({token.value:.3g})"


def _survey(
    name: str, images: Path | None, size: tuple[int, int] | None, folder: Path | None, quiet: bool
) -> TokenReport:
    if Path(name).suffix in (".onnx", ".engine"):
        raise InvalidArgumentError(
            f"--tokens looks into a PyTorch model as it runs, but {name} is a file; name the model that it was made from"
        )
    if folder is not None:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputFileError(f"output folder {folder} cannot be made: {error.strerror}") from None
    photographs, skipped = options.load_photographs(images)
    with progress(quiet) as say:
        say("importing PyTorch")
        from fna.export.sources.loading import load_model
        from fna.validate.token_report import survey_photographs

        say(f"loading {name}")
        model = load_model(name)
        return survey_photographs(
            model,
            photographs,
            size or model.native_size,
            skipped=skipped,
            picture_folder=folder,
            say=say,
        )


def _text(value: int | None) -> str:
    return "" if value is None else str(value)
