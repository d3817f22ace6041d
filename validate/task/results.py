"""What tasks give back: numbers, and the reasons why there are none."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict


class Measure(BaseModel):
    """One number.

    Attributes:
        task: which task.
        measure: what is measured.
        value: in 0..1, 1 being full agreement; correlations and cosines in -1..1.
        detail: on what, and how.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    measure: str
    value: float
    detail: str


class TaskResult(BaseModel):
    """What `--task` measured.

    Attributes:
        measures: the numbers.
        skipped: tasks that this model or these images do not allow, with the reason.
    """

    model_config = ConfigDict(frozen=True)

    measures: tuple[Measure, ...]
    skipped: tuple[str, ...] = ()

    def find(self, task: str, measure: str) -> float | None:
        """Return one value."""
        return next(
            (result.value for result in self.measures if (result.task, result.measure) == (task, measure)), None
        )


@dataclass
class Results:
    """Filled task by task."""

    measures: list[Measure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, task: str, measure: str, value: float, detail: str) -> None:
        """Take in one number."""
        self.measures.append(Measure(task=task, measure=measure, value=float(value), detail=detail))
