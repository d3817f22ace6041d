"""What is asked of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field

from fna.validate.planning.candidates import SearchRange
from fna.validate.planning.fidelity import Fidelity
from fna.validate.planning.goals import TaskGoal


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        min_cosine: mean cosine of the final patch tokens to exact attention; None asks for nothing.
        min_p5: the 5th percentile of it; None asks for nothing.
        goals: task metrics to be kept.
        whole_blocks: only all heads of a block, or none; None lets the cost decide (`Planner.whole_blocks`).
        tried: the range of candidates.
    """

    min_cosine: float | None = 0.99
    min_p5: float | None = None
    goals: tuple[TaskGoal, ...] = ()
    whole_blocks: bool | None = None
    tried: SearchRange = field(default_factory=SearchRange)

    def excess(self, fidelity: Fidelity, keep_below: float = 1.0) -> float:
        """By how much the worst of the losses exceeds what is allowed: at most 1 where all that is asked for is kept.

        Args:
            fidelity: what a plan reached.
            keep_below: aim at this part of the mean loss allowed.
        """
        parts = [0.0]
        if self.min_cosine is not None:
            parts.append((1 - fidelity.mean) / (keep_below * (1 - self.min_cosine)))
        if self.min_p5 is not None:
            parts.append((1 - fidelity.p5) / (1 - self.min_p5))
        parts += [(1 - fidelity.tasks[goal.name]) / (1 - goal.minimum) for goal in self.goals]
        return max(parts)

    def describe(self) -> str:
        """What is asked for, in words."""
        parts = [] if self.min_cosine is None else [f"a mean cosine of {self.min_cosine}"]
        parts += [] if self.min_p5 is None else [f"a 5th percentile of {self.min_p5}"]
        return " and ".join([*parts, *(f"{goal.name} of {goal.minimum}" for goal in self.goals)])
