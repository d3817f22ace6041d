"""Task metrics of `fna validate` as goals of a plan."""

from __future__ import annotations

import numpy as np
import pytest

from fna.errors import InvalidArgumentError
from fna.validate.planning.goals import TaskGoal, measure_agreement, parse_goal, resolve_goals
from fna.validate.task.inputs import OutputKinds
from fna.validate.task.saliency import intersection_over_union

RANDOM = np.random.default_rng(0)
KINDS = OutputKinds(maps=("saliency",), tokens=("tokens",), prefix_tokens=1)


def outputs(images: int) -> list[dict[str, np.ndarray]]:
    return [
        {"tokens": RANDOM.standard_normal((1, 17, 8)), "saliency": RANDOM.random((1, 1, 8, 8))} for _ in range(images)
    ]


def test_a_goal_names_a_task_a_measure_and_a_minimum() -> None:
    assert parse_goal(" retrieval:recall@5=0.9") == TaskGoal("retrieval:recall@5", 0.9)


@pytest.mark.parametrize(
    "text", ["saliency", "saliency=0.9", "saliency:IoU", "saliency:IoU=much", "saliency:IoU=1.5", ":x=0.5"]
)
def test_other_forms_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"TASK:MEASURE=MINIMUM.*saliency:IoU=0\.97"):
        parse_goal(text)


def test_everything_agrees_with_itself() -> None:
    exact = outputs(3)
    found = measure_agreement(KINDS, exact, exact)
    assert set(found) == {
        "retrieval:recall@1",
        "saliency:IoU",
        "saliency:correlation",
        "segmentation:patch agreement",
        "segmentation:mIoU",
    }
    assert all(value == pytest.approx(1) for value in found.values())


def test_only_the_tasks_asked_for_are_measured() -> None:
    exact, given = outputs(2), outputs(2)
    whole = measure_agreement(KINDS, exact, given)
    found = measure_agreement(KINDS, exact, given, {"saliency"})
    assert found == {name: whole[name] for name in ("saliency:IoU", "saliency:correlation")}


def test_what_a_task_says_is_what_validate_says() -> None:
    exact, given = outputs(2), outputs(2)
    overlap = [
        intersection_over_union(a["saliency"] > 0.5, b["saliency"] > 0.5) for a, b in zip(exact, given, strict=True)
    ]
    assert measure_agreement(KINDS, exact, given)["saliency:IoU"] == pytest.approx(np.mean(overlap))


def test_goals_are_found_whatever_their_capitals_and_unknown_ones_list_what_there_is() -> None:
    known = {"saliency:IoU": 1.0, "segmentation:mIoU": 1.0}
    assert resolve_goals([TaskGoal("Saliency:iou", 0.9)], known) == (TaskGoal("saliency:IoU", 0.9),)
    with pytest.raises(
        InvalidArgumentError, match="retrieval:recall@10 cannot be measured .* saliency:IoU, segmentation:mIoU"
    ):
        resolve_goals([TaskGoal("retrieval:recall@10", 0.9)], known)
