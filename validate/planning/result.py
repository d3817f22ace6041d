"""What planning comes to: the plan, the front that it was chosen from, and settings alike in all blocks to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from fna.plan import Method, Plan
from fna.validate.planning.fidelity import Fidelity


@dataclass(frozen=True)
class FrontPlan:
    """A plan on the front, with what was predicted and, where it was run, measured on the images held out."""

    plan: Plan
    cost: float
    saved: float
    predicted_loss: float
    measured: Fidelity | None = None


@dataclass(frozen=True)
class UniformRun:
    """A setting that treats all its blocks alike, run on the images held out, to compare with.

    Attributes:
        layers: its FNA blocks, as `--layers` has them.
        landmarks: S.
        sampler: of all of them.
        method: weighted or published.
        cost: as a `FrontPoint` has it.
        saved: part of the products.
        measured: on the images held out.
    """

    layers: str
    landmarks: int
    sampler: str
    method: Method
    cost: float
    saved: float
    measured: Fidelity

    @property
    def label(self) -> str:
        """The setting, for people."""
        return f"blocks {self.layers}, S={self.landmarks}, {self.sampler}, {self.method}"


@dataclass(frozen=True)
class Planned:
    """The result.

    Attributes:
        plan: the winner.
        point: its place on the front, verified.
        front: the Pareto front, dearest first.
        exact_cost: cost of exact attention in all blocks.
        reached: whether the winner keeps what was asked for on the images that it was not planned on.
        notes: what should be said about it.
        uniform: settings alike in all blocks, where they were asked for.
    """

    plan: Plan
    point: FrontPlan
    front: list[FrontPlan]
    exact_cost: float
    reached: bool
    notes: list[str]
    uniform: tuple[UniformRun, ...] = ()
