"""Task metrics of `fna validate` as goals of a plan: `saliency:IoU=0.97` instead of, or beside, cosines of tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fna.errors import InvalidArgumentError
from fna.runtime import Arrays
from fna.validate.task.inputs import OutputKinds
from fna.validate.task.measure import compare_outputs


@dataclass(frozen=True)
class TaskGoal:
    """A task's number that a plan has to keep.

    Attributes:
        name: task and measure as `fna validate --task` calls them, such as `retrieval:recall@5`.
        minimum: the smallest value allowed.
    """

    name: str
    minimum: float

    @property
    def task(self) -> str:
        """The task alone."""
        return self.name.partition(":")[0]


def parse_goal(text: str) -> TaskGoal:
    """Turn `saliency:IoU=0.97` into a goal.

    Raises:
        InvalidArgumentError: for text of another form, or a minimum that is not between 0 and 1.
    """
    name, _, number = text.rpartition("=")
    task, _, measure = name.partition(":")
    try:
        minimum = float(number)
    except ValueError:
        minimum = -1.0
    if not task.strip() or not measure.strip() or not 0 < minimum < 1:
        raise InvalidArgumentError(
            f"task goal {text!r} cannot be read; write TASK:MEASURE=MINIMUM with a minimum between 0 and 1, as in saliency:IoU=0.97"
        )
    return TaskGoal(f"{task.strip()}:{measure.strip()}", minimum)


def measure_agreement(
    kinds: OutputKinds, exact: Sequence[Arrays], reached: Sequence[Arrays], tasks: Collection[str] | None = None
) -> dict[str, float]:
    """Measure the tasks that a model's outputs allow, by `task:measure`.

    Args:
        kinds: what the outputs are.
        exact: outputs of each image, by name, batch of one.
        reached: the same by a plan.
        tasks: those that are measured; None is all.
    """
    result = compare_outputs(kinds, _stack(exact), _stack(reached), tasks)
    return {f"{measured.task}:{measured.measure}": measured.value for measured in result.measures}


def resolve_goals(goals: Sequence[TaskGoal], known: Mapping[str, float]) -> tuple[TaskGoal, ...]:
    """Return the goals under the names that this model's tasks have; capitals do not matter.

    Raises:
        InvalidArgumentError: for a task that this model or so few images do not allow, naming those that they do.
    """
    names = {name.lower(): name for name in known}
    for goal in goals:
        if goal.name.lower() not in names:
            raise InvalidArgumentError(
                f"task goal {goal.name} cannot be measured on this model and these images; what can: {', '.join(sorted(known))} "
                "(retrieval needs more images to plan and to verify on than neighbours)"
            )
    return tuple(TaskGoal(names[goal.name.lower()], goal.minimum) for goal in goals)


def _stack(outputs: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([arrays[name] for arrays in outputs]) for name in outputs[0]}
