"""The report's charts: matplotlib's SVG, its ink taken from the page, so that they follow the light and the dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fna.validate.metrics import JUDGED

_INK, _GRID = "#010203", "#040506"
"""Stand-ins for the page's text and rule colours, put in their place afterwards."""

COLOURS = {"exact": "#7a8591", "fna": "#2b7bba", "second": "#c2571a", "third": "#3a8f6b", "fourth": "#8a63b8"}
"""Readable on white and on near black."""

SERIES = ("fna", "second", "third", "fourth", "exact")
MARKERS = "osD^v"


def new_chart(width: float = 4.6, height: float = 3.0) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes; sizes in inches, near what a phone is wide, so that its text stays readable."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_INK, labelsize=9, which="both")
    axes.grid(True, which="major", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def finish(figure: Figure, axes: Axes, *, title: str, x: str, y: str, name: str, legend: bool = True) -> Markup:
    """Label a chart and return it as an SVG element.

    Args:
        figure: from `new_chart`.
        axes: likewise.
        title: what the chart shows, for readers who do not see it.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        name: unique on the page.
        legend: draw one.
    """
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return _as_element(stream.getvalue(), title, name)


def _as_element(text: str, title: str, name: str) -> Markup:
    body = text[text.index("<svg") :]
    view = re.search(r'viewBox="([^"]+)"', body)
    inner = body[body.index(">") + 1 : body.rindex("</svg>")]
    inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
    inner = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', inner)
    inner = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", inner).replace('xlink:href="#', f'href="#{name}-')
    inner = re.sub(r"font:\s*([\d.]+)px[^;\"]*", r"font-size: \1px", inner)
    inner = inner.replace(_INK, "currentColor").replace(_GRID, "var(--rule)")
    safe = escape(title)
    return Markup(
        f'<svg role="img" aria-label="{safe}" class="chart" viewBox="{view[1] if view else ""}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{safe}</title>{inner}</svg>'
    )


def block_chart(
    series: Sequence[tuple[str, Sequence[int], Sequence[float | None]]],
    *,
    title: str,
    name: str,
    y: str = f"{JUDGED.title} error",
) -> Markup:
    """Errors by block on a logarithmic axis: label, block numbers and errors of each curve; errors of zero are left out."""
    figure, axes = new_chart()
    for index, (label, blocks, values) in enumerate(series):
        shown = [value if value is not None and value > 0 else np.nan for value in values]
        colour = COLOURS[SERIES[index % len(SERIES)]]
        axes.plot(
            blocks, shown, color=colour, marker=MARKERS[index % len(MARKERS)], markersize=4, linewidth=1.6, label=label
        )
    axes.set_yscale("log")
    numbers = sorted({block for _, blocks, _ in series for block in blocks})
    axes.set_xticks(numbers if len(numbers) <= 16 else numbers[:: -(-len(numbers) // 12)])
    return finish(figure, axes, title=title, x="block", y=y, name=name, legend=len(series) > 1)


def time_chart(rows: Sequence[dict[str, Any]], crossings: Sequence[dict[str, Any]], *, title: str, name: str) -> Markup:
    """Latency against tokens, both on logarithmic axes: exact, FNA for each S, and where they meet."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = new_chart()
    by_tokens = {row["tokens"]: row["dense"]["median"] for row in rows}
    tokens = sorted(by_tokens)
    axes.plot(
        tokens,
        [by_tokens[n] for n in tokens],
        color=COLOURS["exact"],
        marker="v",
        markersize=5,
        label="exact attention",
    )
    for index, count in enumerate(sorted({row["landmarks"] for row in rows})):
        chosen = sorted((row["tokens"], row["fna"]["median"]) for row in rows if row["landmarks"] == count)
        colour = COLOURS[SERIES[index % 4]]
        axes.plot(
            *zip(*chosen, strict=True), color=colour, marker=MARKERS[index % 4], markersize=4, label=f"FNA, S={count}"
        )
        for crossing in crossings:
            if crossing["landmarks"] == count and crossing["tokens"] is not None:
                axes.axvline(crossing["tokens"], color=colour, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes, tokens)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # few enough that each can have its number
    axes.yaxis.set_minor_formatter(plain)
    axes.yaxis.set_major_formatter(plain)
    return finish(figure, axes, title=title, x="tokens", y="milliseconds", name=name)


def share_chart(rows: Sequence[dict[str, Any]], *, title: str, name: str) -> Markup:
    """What share of the dense model's operations attention is, against tokens: the most that FNA can save."""
    figure, axes = new_chart()
    values = sorted({(row["tokens"], row["counts"]["attention_share"]) for row in rows if row.get("counts")})
    axes.plot(*zip(*values, strict=True), color=COLOURS["fna"], marker="o", markersize=5)
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    _plain_ticks(axes, [tokens for tokens, _ in values])
    return finish(figure, axes, title=title, x="tokens", y="share of all operations", name=name, legend=False)


def _plain_ticks(axes: Axes, tokens: Sequence[int]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(list(tokens), [str(value) for value in tokens])
