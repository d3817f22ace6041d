"""The report: one HTML page without a network, and a JSON file beside it that holds every number on it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from fna.files import write_text
from fna.validate.budget.measure import Outputs, StepError, Validation
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
        "focal_blocks": len(validation["metadata"]["plan"].get("focal", ())),
        "landmarks": sorted({block["landmarks"] for block in blocks}),
        "samplers": sorted({block["sampler"] for block in blocks}),
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
    for _, step in _steps(validation):
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


def _steps(validation: Validation) -> Iterator[tuple[str, StepError]]:
    """Each step and the total, with the path of its place in the document."""
    for number, step in enumerate(validation.steps):
        yield f"validation.steps.{number}", step
    yield "validation.total", validation.total


def _rows(validation: Validation) -> list[dict[str, str]]:
    rows = []
    for path, step in _steps(validation):
        for index, error in enumerate(step.errors):
            failed = step.failure_of(error) is not None
            judged = step.tolerance is not None or failed
            rows.append(
                {
                    "path": f"{path}.errors.{index}",
                    "step": step.step if index == 0 else "",
                    "output": error.output,
                    "worst": validation.images[error.worst_item],
                    "verdict": ("out of tolerance" if failed else "ok") if judged else "",
                    "style": "bad" if failed else "good",
                }
            )
    return rows


def _block_charts(data: dict[str, Any]) -> list[tuple[Markup, str]]:
    """Charts over the blocks, each with its caption: what was measured of them."""
    blocks, bisection = data["validation"]["blocks"], data.get("bisection")
    charts = []
    if blocks:
        charts.append(_build_up_chart(blocks))
    if bisection and bisection["effects"]:
        charts.append(_effects_chart(bisection["effects"]))
    if bisection and bisection["places"]:
        # the approximation is drawn already where its build-up is
        places = {step: rows for step, rows in bisection["places"].items() if step != "approximation" or not blocks}
        charts += _places_charts(places)
    return charts


def _build_up_chart(blocks: list[dict[str, Any]]) -> tuple[Markup, str]:
    what = "the hidden states that leave each block, FNA against exact attention"
    curve = ("hidden states", [row["block"] for row in blocks], [row[JUDGED.name] for row in blocks])
    chart = block_chart([curve], title=f"{JUDGED.title} error of {what}", name="chart-build-up")
    return chart, f"How the approximation error builds up: {what}."


def _effects_chart(effects: list[dict[str, Any]]) -> tuple[Markup, str]:
    output = effects[-1]["output"]
    rows = [row for row in effects if row["output"] == output]
    numbers = [row["block"] for row in rows]
    curves = [
        (label, numbers, [row[key] for row in rows])
        for label, key in (
            ("this block alone", "alone"),
            ("all but this block", "all_but"),
            ("whole plan", "everything"),
        )
    ]
    title = f"{JUDGED.title} error of {output} with one block FNA, and with all FNA blocks but one"
    return block_chart(curves, title=title, name="chart-effects"), f"What each FNA block costs, on {output}."


def _places_charts(places: dict[str, list[dict[str, Any]]]) -> list[tuple[Markup, str]]:
    """One chart of the hidden states where they were looked at, else of the FNA operators; none where nothing differs."""
    part = "output" if any(row["part"] == "output" for rows in places.values() for row in rows) else "fna"
    curves = []
    for step, rows in places.items():
        chosen = [row for row in rows if row["part"] == part]
        if any(row["relative_l2"] for row in chosen):
            curves.append((step, [row["block"] for row in chosen], [row["relative_l2"] for row in chosen]))
    if not curves:
        return []
    what = "the hidden states that leave each block" if part == "output" else "what each FNA operator returns"
    chart = block_chart(curves, title=f"{JUDGED.title} error of {what}, by step", name="chart-places")
    return [(chart, f"Each step's own error of {what}.")]


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
    maps = []
    for path, step in _steps(validation):
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
            maps.append(Panel(title, f"{title}, as a map", uri, f"{path}.errors.{index}.tokens.{JUDGED.name}.{top}"))
    return maps
