"""What a planning run says: the front as a table's rows, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fna.files import written_whole
from fna.samplers import DEFAULT_SAMPLER
from fna.validate.planning.result import FrontPlan, Planned, UniformRun
from fna.validate.planning.wish import Wish


def describe_cost(cost: float, unit: str) -> str:
    """A cost for people: milliseconds, or millions of products."""
    return f"{cost * 1e3:.3f} ms" if unit == "seconds" else f"{cost / 1e6:,.0f} M"


def count_heads(point: FrontPlan, heads: int) -> int:
    """How many heads of the whole model are FNA."""
    return sum(heads if block.heads is None else len(block.heads) for block in point.plan.blocks)


def as_json(planned: Planned, unit: str) -> dict[str, Any]:
    """The result as `--json` has it."""

    def row(point: FrontPlan) -> dict[str, Any]:
        measured = None if point.measured is None else point.measured.model_dump()
        return {
            "cost": point.cost,
            "saved": point.saved,
            "predicted_cosine": 1 - point.predicted_loss,
            "measured": measured,
            "chosen": point.plan == planned.point.plan,
        }

    def uniform(point: UniformRun) -> dict[str, Any]:
        return {
            "label": point.label,
            "cost": point.cost,
            "saved": point.saved,
            "measured": point.measured.model_dump(),
        }

    return {
        "unit": unit,
        "exact_cost": planned.exact_cost,
        "reached": planned.reached,
        "plan": planned.plan.model_dump(mode="json"),
        "front": [row(point) for point in planned.front],
        "uniform": [uniform(point) for point in planned.uniform],
        "notes": planned.notes,
    }


def draw_front(planned: Planned, unit: str, path: Path, *, title: str, wish: Wish) -> None:
    """Write a PNG: what was asked for, measured on the images held out, against cost; the front and the choice marked.

    Args:
        planned: the result.
        unit: of the costs.
        path: the file to write.
        title: of the picture.
        wish: what was asked for; where no cosine was, the first task metric is drawn.
    """
    from matplotlib.figure import Figure

    by_task = wish.min_cosine is None and bool(wish.goals)
    name = wish.goals[0].name if by_task else "mean cosine of the patch tokens"
    wanted = wish.goals[0].minimum if by_task else wish.min_cosine
    by_time = unit == "seconds"

    def place(point: FrontPlan | UniformRun) -> tuple[float, float]:
        assert point.measured is not None
        value = point.measured.tasks[name] if by_task else point.measured.mean
        return point.cost * 1e3 if by_time else 100 * (1 - point.saved), max(1 - value, 1e-6)

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    places = [place(point) for point in planned.front if point.measured is not None and point.plan.replaced_blocks]
    if places:
        axis.plot(*zip(*places, strict=True), "o-", color="C0", label="planned, measured on images held out")
    groups = dict.fromkeys((point.layers, point.method) for point in planned.uniform)
    for number, (layers, method) in enumerate(groups):
        points = [point for point in planned.uniform if (point.layers, point.method) == (layers, method)]
        colour = "C1" if method == "weighted" else "C2"
        label = f"blocks {layers} alike, {method}"
        axis.plot(*zip(*map(place, points), strict=True), "x+1"[number // 2 % 3], color=colour, label=label)
        for point in points:
            text = f"{point.landmarks}{'' if point.sampler == DEFAULT_SAMPLER else point.sampler[0]}"
            axis.annotate(text, place(point), fontsize=6, xytext=(3, 3), textcoords="offset points")
    if planned.point.measured is not None and planned.point.plan.replaced_blocks:
        axis.plot(*place(planned.point), "*", color="C3", markersize=15, label="the plan")
    if wanted is not None:
        axis.axhline(1 - wanted, color="grey", linestyle="--", linewidth=1)
        where = (0.01, 1 - wanted)
        axis.annotate(f"asked for: {wanted}", where, xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axis.set_yscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("predicted time of all attention, ms" if by_time else "attention products, % of exact attention's")
    axis.set_ylabel(f"1 - {name}")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
