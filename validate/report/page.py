"""The report: one HTML page without a network, and a JSON file beside it that holds every number on it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from fna.files import write_text
from fna.validate.budget.measure import Outputs, Validation
from fna.validate.metrics import JUDGED, METRICS
from fna.validate.report.charts import block_chart, share_chart, time_chart
from fna.validate.report.document import Document, dump_compactly
from fna.validate.report.panels import Panel, colour_map, draw_panels, patch_grid

LOWEST, HIGHEST = 1e-7, 1.0
"""Ends of the bars' logarithmic scale of the metric that is judged."""


def write_report(document: Document, outputs: Outputs, images: Sequence[tuple[str, Image.Image]], path: Path) -> None:
    """Write the page to `path`, and the numbers to the same name with `.json`.

    Args:
        document: what was found.
        outputs: of the images that get pictures.
        images: in the order of the outputs.
        path: an HTML file.

    Raises:
        InputFileError: if the files cannot be written there.
    """
    data = report_data(document)
    write_text(path.with_suffix(".json"), dump_compactly(data))
    write_text(path, render(document, data, outputs, images))


def report_data(document: Document) -> dict[str, Any]:
    """Return the document as plain data, with the few numbers added that the page derives from it."""
    data: dict[str, Any] = json.loads(document.model_dump_json())
    validation = data["validation"]
    blocks = validation["metadata"]["plan"]["blocks"]
    data["facts"] = {
        "fna_blocks": len(blocks),
        "landmarks": sorted({entry["landmarks"] for entry in blocks}),
        "samplers": sorted({entry["sampler"] for entry in blocks}),
        "tokens": _count_tokens(document.validation),
        "images": len(validation["images"]),
        "skipped": len(validation["skipped"]),
        "shown_landmarks": bool(validation["landmarks"]),
    }
    validation["fna_types_list"] = [{"block": block} for block in validation["fna_types"]]
    data["bars"] = _bars(document.validation)
    return data


def _count_tokens(validation: Validation) -> int | None:
    grid = patch_grid(validation)
    return None if grid is None else grid[0] * grid[1] + (validation.metadata.plan.prefix_tokens or 0)


def _bars(validation: Validation) -> dict[str, Any]:
    steps = []
    for step in (*validation.steps, validation.total):
        bars = [
            {
                "output": error.output,
                "value": error.judged if math.isfinite(error.judged) else None,
                "width": _width(error.judged),
                "over": step.failure_of(error) is not None,
            }
            for error in step.errors
        ]
        limit = step.tolerance
        steps.append(
            {
                "step": step.step, "compares": step.compares, "bars": bars, "limit": limit if bars else None,
                "limit_width": _width(limit) if limit and bars else None, "not_measured": step.not_measured,
            }
        )  # fmt: skip
    return {"lowest": LOWEST, "highest": HIGHEST, "steps": steps}


def _width(value: float) -> float:
    """Percent of the bar's scale."""
    if not math.isfinite(value):
        return 100.0
    share = math.log10(max(value, LOWEST) / LOWEST) / math.log10(HIGHEST / LOWEST)
    return round(100 * min(max(share, 0.0), 1.0), 2)


def render(
    document: Document, data: dict[str, Any], outputs: Outputs, images: Sequence[tuple[str, Image.Image]]
) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("fna.validate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(n=_number_writer(data), s=_text_writer(data))
    validation = document.validation
    charts = {"blocks": _block_charts(data), "bench": _bench_charts(data)}
    panels = draw_panels(validation, outputs, images)
    sections = [
        ("budget", "Error budget", True),
        ("blocks", "Block by block", bool(charts["blocks"])),
        ("images", "Images", bool(panels)),
        ("task", "Does it still do the job", bool(data.get("task"))),
        ("bench", "Speed", bool(data.get("bench"))),
        ("plan", "Plan", True),
        ("reproduce", "Reproduce", True),
    ]
    unmeasured = [step.step for step in validation.steps if step.not_measured]
    return environment.get_template("report.html.j2").render(
        d=data,
        title=f"fna validation: {Path(validation.file).name}",
        failures=document.failures(),
        unmeasured=", ".join(unmeasured),
        contents=[(anchor, text) for anchor, text, shown in sections if shown],
        rows=_rows(validation),
        metrics=list(METRICS.values()),
        judged=JUDGED,
        charts=charts,
        panels=panels,
        token_maps=_token_maps(validation, images),
    )


def look_up(data: Any, path: str) -> Any:
    """Return the value at a path such as `validation.steps.0.tolerance`."""
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def _number_writer(data: dict[str, Any]) -> Any:
    """A number on the page says where in the JSON it comes from, so that a test can compare them."""

    def write(path: str, style: str = "") -> Markup:
        value = look_up(data, path)
        text = "–" if value is None else format(value, style)
        return Markup('<span data-path="{}" data-format="{}">{}</span>').format(path, style, text)

    return write


def _text_writer(data: dict[str, Any]) -> Any:
    def write(path: str) -> Markup:
        value = look_up(data, path)
        return Markup('<span data-text="{}">{}</span>').format(path, escape("–" if value is None else value))

    return write


def _rows(validation: Validation) -> list[dict[str, str]]:
    rows = []
    for number, step in enumerate((*validation.steps, validation.total)):
        base = f"validation.steps.{number}" if number < len(validation.steps) else "validation.total"
        for index, error in enumerate(step.errors):
            failed = step.failure_of(error) is not None
            judged = step.tolerance is not None or failed
            rows.append(
                {
                    "path": f"{base}.errors.{index}",
                    "step": step.step if index == 0 else "",
                    "output": error.output,
                    "worst": validation.images[error.worst_item],
                    "verdict": ("out of tolerance" if failed else "ok") if judged else "",
                    "style": "bad" if failed else "good",
                }
            )
    return rows


def _block_charts(data: dict[str, Any]) -> list[tuple[Markup, str]]:
    charts = []
    blocks = data["validation"]["blocks"]
    if blocks:
        numbers = [item["block"] for item in blocks]
        curve = ("hidden states", numbers, [item[JUDGED.name] for item in blocks])
        title = f"{JUDGED.title} error of the hidden states that leave each block, FNA against exact attention"
        charts.append(
            (
                block_chart([curve], title=title, name="chart-build-up"),
                "How the approximation error builds up: the hidden states that leave each block, FNA against exact attention.",
            )
        )
    bisection = data.get("bisection")
    if bisection and bisection["effects"]:
        output = bisection["effects"][-1]["output"]
        chosen = [item for item in bisection["effects"] if item["output"] == output]
        numbers = [item["block"] for item in chosen]
        curves = [
            ("this block alone", numbers, [item["alone"] for item in chosen]),
            ("all but this block", numbers, [item["all_but"] for item in chosen]),
            ("whole plan", numbers, [item["everything"] for item in chosen]),
        ]
        title = f"{JUDGED.title} error of {output} with one block FNA, and with all FNA blocks but one"
        charts.append(
            (block_chart(curves, title=title, name="chart-effects"), f"What each FNA block costs, on {output}.")
        )
    if bisection and bisection["places"]:
        part = "output" if any(item["part"] == "output" for item in _all_places(bisection)) else "fna"
        curves = [
            (step, [item["block"] for item in places if item["part"] == part],
             [item["relative_l2"] for item in places if item["part"] == part])
            for step, places in bisection["places"].items() if step != "approximation" or not blocks
        ]  # fmt: skip
        curves = [curve for curve in curves if curve[1] and any(value for value in curve[2])]
        if curves:
            what = "the hidden states that leave each block" if part == "output" else "what each FNA operator returns"
            charts.append(
                (
                    block_chart(curves, title=f"{JUDGED.title} error of {what}, by step", name="chart-places"),
                    f"Each step's own error of {what}.",
                )
            )
    return charts


def _all_places(bisection: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for places in bisection["places"].values() for item in places]


def _bench_charts(data: dict[str, Any]) -> list[tuple[Markup, str]]:
    bench = data.get("bench")
    if not bench:
        return []
    title = "milliseconds per batch against tokens, exact attention and FNA"
    charts = [
        (
            time_chart(bench["rows"], bench["break_even"], title=title, name="chart-time"),
            "Latency against tokens, both axes logarithmic.",
        )
    ]
    if any(row.get("counts") for row in bench["rows"]):
        title = "share of attention in all operations of the model with exact attention, against tokens"
        charts.append(
            (
                share_chart(bench["rows"], title=title, name="chart-share"),
                "How much of the exact model is attention: FNA can save no more than this.",
            )
        )
    return charts


def _token_maps(validation: Validation, images: Sequence[tuple[str, Image.Image]]) -> list[Panel]:
    """The error of each patch position over all images, per step with token outputs."""
    grid = patch_grid(validation)
    prefix = validation.metadata.plan.prefix_tokens or 0
    found = []
    for number, step in enumerate((*validation.steps, validation.total)):
        base = f"validation.steps.{number}" if number < len(validation.steps) else "validation.total"
        for index, error in enumerate(step.errors):
            if error.tokens is None or grid is None:
                continue
            first = len(error.tokens.judged) - grid[0] * grid[1]
            if first not in (0, prefix):
                continue
            values = error.tokens.judged[first:].reshape(grid)
            if not np.isfinite(values).all() or values.max() == 0:
                continue
            top = int(np.argmax(values)) + first
            title = f"{step.step}: {error.output}, {JUDGED.title} error of each patch over all images"
            uri = colour_map(values)
            found.append(Panel(title, f"{title}, as a map", uri, f"{base}.errors.{index}.tokens.{JUDGED.name}.{top}"))
    return found
