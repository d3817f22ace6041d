"""What a planning run says: the front as a table's rows, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fna.export.files import written_whole
from fna.validate.planning.planner import FrontPoint, Planned


def describe_cost(cost: float, unit: str) -> str:
    """A cost for people: milliseconds, or millions of products."""
    return f"{cost * 1e3:.3f} ms" if unit == "seconds" else f"{cost / 1e6:,.0f} M"


def count_heads(point: FrontPoint, heads: int) -> int:
    """How many heads of the whole model are FNA."""
    return sum(heads if entry.heads is None else len(entry.heads) for entry in point.plan.blocks)


def as_json(planned: Planned, unit: str) -> dict[str, Any]:
    """The result as `--json` has it."""

    def row(point: FrontPoint) -> dict[str, Any]:
        measured = None if point.measured is None else point.measured.model_dump()
        return {
            "cost": point.cost,
            "saved": point.saved,
            "predicted_cosine": 1 - point.predicted_loss,
            "measured": measured,
            "chosen": point.plan == planned.plan,
        }

    return {
        "unit": unit,
        "exact_cost": planned.exact_cost,
        "reached": planned.reached,
        "plan": planned.plan.model_dump(mode="json"),
        "front": [row(point) for point in planned.front],
        "notes": planned.notes,
    }


def draw_front(
    planned: Planned,
    unit: str,
    path: Path,
    *,
    title: str,
    wanted: float,
    others: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Write a PNG: fidelity measured on the images held out against cost, the front and the choice marked.

    Args:
        planned: the result.
        unit: of the costs.
        path: the file to write.
        title: of the picture.
        wanted: mean cosine that was asked for, drawn as a line.
        others: further points to compare with: label, part of the products saved, mean cosine.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    points = [point for point in planned.front if point.measured is not None and point.plan.blocks]
    by_time = unit == "seconds"

    def place(point: FrontPoint) -> float:
        return point.cost * 1e3 if by_time else 100 * (1 - point.saved)

    losses = [max(point.measured.loss, 1e-6) for point in points if point.measured is not None]
    axis.plot(
        [place(point) for point in points], losses, "o-", color="C0", label="planned, measured on images held out"
    )
    if not by_time and others:
        axis.plot(
            [100 * (1 - saved) for _, saved, _ in others], [1 - mean for _, _, mean in others], "x", color="C1",
            label="uniform settings, same images",
        )  # fmt: skip
        for label, saved, mean in others:
            axis.annotate(label, (100 * (1 - saved), 1 - mean), fontsize=7, xytext=(3, 3), textcoords="offset points")
    chosen = planned.point
    if chosen.measured is not None and chosen.plan.blocks:
        axis.plot([place(chosen)], [max(chosen.measured.loss, 1e-6)], "*", color="C3", markersize=15, label="the plan")
    axis.axhline(1 - wanted, color="grey", linestyle="--", linewidth=1)
    axis.annotate(
        f"asked for: {wanted}", (0.01, 1 - wanted), xycoords=("axes fraction", "data"), fontsize=8, va="bottom"
    )
    axis.set_yscale("log")
    axis.invert_yaxis()
    axis.set_xlabel("predicted time of all attention, ms" if by_time else "attention products, % of exact attention's")
    axis.set_ylabel("1 - mean cosine of the patch tokens")
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
