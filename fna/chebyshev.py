"""The cheaper core of FNA, without PyTorch: its settings, where it is the default, the coefficients of its steps.

`fna.attention.chebyshev_core` takes the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from fna.errors import InvalidArgumentError

CoreName = Literal["newton_schulz", "chebyshev"]
CORES: tuple[CoreName, ...] = get_args(CoreName)
NEWTON_SCHULZ, CHEBYSHEV = CORES
"""What stands for `Z @ Bv`: the published method's iterations, or the steps below."""

CHEBYSHEV_COLUMN_FLOOR = 0.1
"""A landmark that the others hardly attend to has a small column sum; without a floor its row would be weighted without bound."""

MAX_CHEBYSHEV_STEPS = 64

NEWTON_SCHULZ_LANDMARKS = 64
"""Up to so many landmarks nobody who names no core gets this one."""
MORE_STEPS_LANDMARKS = 96
"""Up to so many landmarks take more steps."""


@dataclass(frozen=True)
class ChebyshevSteps:
    """The cheaper core: how many steps, and the lowest eigenvalue that they aim at.

    Raises:
        InvalidArgumentError: for steps outside 1 to `MAX_CHEBYSHEV_STEPS`, or a `low` that is not above 0 and below 1.
    """

    steps: int
    low: float

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_CHEBYSHEV_STEPS:
            raise InvalidArgumentError(
                f"the chebyshev core has steps {self.steps}, but 1 to {MAX_CHEBYSHEV_STEPS} are needed"
            )
        if not 0 < self.low < 1:
            raise InvalidArgumentError(
                f"the chebyshev core has low {self.low}, but a number above 0 and below 1 is needed"
            )


class CoreChoice(BaseModel):
    """What stands for `Z @ Bv` in FNA, as plans say it.

    Attributes:
        core: `newton_schulz` or `chebyshev`. None in a block is the plan's, None in a plan is `newton_schulz`.
        steps: of the chebyshev core, which needs them.
        low: the lowest eigenvalue that they aim at.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    core: CoreName | None = None
    steps: int | None = None
    low: float | None = None

    @model_validator(mode="after")
    def _check_core(self) -> CoreChoice:
        given = (self.steps, self.low)
        if self.core == CHEBYSHEV and None in given:
            raise ValueError(f"core is chebyshev, which needs steps and low, but they are {given[0]} and {given[1]}")
        if self.core != CHEBYSHEV and given != (None, None):
            raise ValueError(f"steps and low are of the chebyshev core, but core is {self.core or 'not given'}")
        _ = self.chebyshev  # its values are in range
        return self

    @property
    def chebyshev(self) -> ChebyshevSteps | None:
        """The steps that are named here, None where none are."""
        return None if self.steps is None or self.low is None else ChebyshevSteps(self.steps, self.low)

    @model_serializer(mode="wrap")
    def _leave_out_what_older_versions_have_not(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        core = {name: fields.pop(name, None) for name in ("core", "steps", "low")}
        return {**fields, **{name: value for name, value in core.items() if value is not None}}


def chebyshev_from(steps: int, low: float) -> ChebyshevSteps | None:
    """Return the core of an operator's flat arguments: 0 steps are Newton-Schulz."""
    return ChebyshevSteps(steps, low) if steps else None


def core_settings(iterations: int, chebyshev: ChebyshevSteps | None) -> dict[str, float]:
    """Return the numbers that say a core, named so that those of two cores can be compared: of one that it is not, they are 0."""
    if chebyshev is None:
        return {"steps": 0, "low": 0.0, "iterations": iterations}
    return {"steps": chebyshev.steps, "low": chebyshev.low, "iterations": 0}


def usual_steps(landmarks: int) -> ChebyshevSteps:
    """Return the steps for S landmarks: fewer landmarks take more, measured on real weights."""
    return ChebyshevSteps(10, 0.03) if landmarks <= MORE_STEPS_LANDMARKS else ChebyshevSteps(8, 0.05)


def default_core(landmarks: int, method: str) -> ChebyshevSteps | None:
    """Return the core where nobody names one, None for Newton-Schulz: the only place that holds this rule.

    The published method has Newton-Schulz. So have up to 64 landmarks, whose iterations are short and no farther from exact
    attention.
    """
    if method == "published" or landmarks <= NEWTON_SCHULZ_LANDMARKS:
        return None
    return usual_steps(landmarks)


def choose_core(
    landmarks: int, method: str, core: CoreName | None, steps: int | None, low: float | None
) -> ChebyshevSteps | None:
    """Return the core that somebody names, None for Newton-Schulz; what is left open is as usual for S landmarks.

    Raises:
        InvalidArgumentError: for steps or a `low` of Newton-Schulz, or values out of range.
    """
    named = steps is not None or low is not None
    if core == NEWTON_SCHULZ and named:
        raise InvalidArgumentError("steps and low are of the chebyshev core, but core is newton_schulz; leave them out")
    if core is None and not named:
        return default_core(landmarks, method)
    if core == NEWTON_SCHULZ:
        return None
    usual = usual_steps(landmarks)
    return ChebyshevSteps(usual.steps if steps is None else steps, usual.low if low is None else low)


def chebyshev_coefficients(steps: int, low: float) -> list[tuple[float, float]]:
    """Return (alpha, beta) of each step `x = beta * x + alpha * residual` on the spectrum of `chebyshev_interval`."""
    middle, half = chebyshev_interval(steps, low)
    ratio = middle / half
    rho = 1 / ratio
    coefficients = [(1 / middle, 0.0)]
    for _ in range(steps - 1):
        following = 1 / (2 * ratio - rho)
        coefficients.append((2 * following / half, following * rho))
        rho = following
    return coefficients


def chebyshev_interval(steps: int, low: float) -> tuple[float, float]:
    """Return the middle and half the width of the spectrum [low, high] that the steps are for.

    `high` is chosen so that the residual polynomial is zero at exactly 1: an eigenvalue of 1 is solved exactly, whatever the steps.
    """
    cosine = math.cos(math.pi / (2 * steps))
    high = (2 - low * (1 - cosine)) / (1 + cosine)
    return (high + low) / 2, (high - low) / 2
