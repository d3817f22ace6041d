"""What `fna bench` writes beside JSON: a table of numbers and a plot."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fna.errors import InputFileError
from fna.files import written_whole
from fna.validate.bench.models import BenchResult


def dump_csv(result: BenchResult) -> str:
    """Return the rows as CSV, one column per number."""
    stream = io.StringIO()
    rows = [_flatten(json.loads(row.model_dump_json())) for row in result.rows]
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def plot_kind(path: Path) -> str:
    """Return the format of a plot by its path's suffix.

    Raises:
        InputFileError: for another than .svg, .png and .pdf.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("svg", "png", "pdf"):
        raise InputFileError(f"{path} is to be a plot; give a name ending in .svg, .png or .pdf")
    return kind


def draw(result: BenchResult, path: Path) -> None:
    """Draw time against tokens on logarithmic axes, the break-even marked; SVG, PNG or PDF by the path's suffix.

    Raises:
        InputFileError: for another suffix, or if it cannot be written.
    """
    from matplotlib.figure import Figure

    kind = plot_kind(path)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    dense = {row.tokens: row.dense for row in result.rows}
    tokens = sorted(dense)
    medians = [dense[n].median for n in tokens]
    axes.plot(tokens, medians, color="#7a8591", marker="v", label="exact attention")
    axes.fill_between(
        tokens, [dense[n].fastest for n in tokens], [dense[n].slowest for n in tokens], color="#7a8591", alpha=0.2
    )
    for number, crossing in enumerate(result.break_even):
        chosen = sorted((row for row in result.rows if row.landmarks == crossing.landmarks), key=lambda row: row.tokens)
        (line,) = axes.plot(
            [row.tokens for row in chosen], [row.fna.median for row in chosen], marker="o", label=f"FNA, S={crossing.landmarks}",
            color=("#2b7bba", "#c2571a", "#3a8f6b", "#8a63b8")[number % 4],
        )  # fmt: skip
        if crossing.tokens is not None:
            label = f"S={crossing.landmarks} pays from {crossing.tokens:.0f} tokens"
            axes.axvline(crossing.tokens, color=line.get_color(), linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"milliseconds per batch of {result.batch}")
    axes.set_title(
        f"{result.model} on {result.backend}, {result.precision}, {result.machine['processor']}", fontsize=10
    )
    axes.minorticks_off()
    axes.set_xticks(tokens, [str(value) for value in tokens])
    axes.grid(True, alpha=0.4)
    axes.legend(frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=120)
