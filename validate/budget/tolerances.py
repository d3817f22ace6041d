"""How large the error of each step may be: one table, by step and precision, that the command line can override."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from fna.errors import InvalidArgumentError

STEPS = ("approximation", "export", "precision", "processor", "plugin", "engine")

TOLERANCES: Mapping[str, Mapping[str, float | None]] = MappingProxyType(
    {
        # How much approximation is too much is the user's choice: --tolerance approximation=0.1 makes it a check.
        "approximation": MappingProxyType({"fp32": None, "fp16": None, "bf16": None, "int8": None, "fp8": None}),
        # Always measured in fp32, whatever the file's precision: the same arithmetic in another order.
        "export": MappingProxyType({"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3, "int8": 1e-3, "fp8": 1e-3}),
        # 11 and 8 significant bits in weights and activations; 8 bits are measured, not derived, and depend on calibration.
        "precision": MappingProxyType({"fp32": None, "fp16": 2e-2, "bf16": 1e-1, "int8": 1e-1, "fp8": 1e-1}),
        # The same arithmetic in another order, fp32 inside.
        "processor": MappingProxyType({"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3, "int8": 1e-3, "fp8": 1e-3}),
        # The kernels' products take fp16 or bf16 where the file's operators compute in fp32 inside, and sum in another order.
        "plugin": MappingProxyType({"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2, "int8": 5e-2, "fp8": 5e-2}),
        # Another implementation of the same arithmetic at the same precision.
        "engine": MappingProxyType({"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": 1e-1, "fp8": 1e-1}),
    }
)
"""Of the relative L2 error of every output. None: the step is measured and not judged."""


def find_tolerance(step: str, precision: str, overrides: Mapping[str, float]) -> float | None:
    """Return the tolerance of a step: the override, else the table's; of `int8+fp8` it is that of the first."""
    return overrides.get(step, TOLERANCES[step].get(precision.partition("+")[0]))


def parse_tolerances(texts: Iterable[str]) -> dict[str, float]:
    """Parse `STEP=NUMBER`, one text each; a number alone is the export step's.

    Raises:
        InvalidArgumentError: for another step, or what is no positive number.
    """
    tolerances: dict[str, float] = {}
    for text in texts:
        step, separator, number = text.rpartition("=")
        step = step.strip() if separator else "export"
        if step not in STEPS:
            raise InvalidArgumentError(
                f"tolerance {text!r} names no step; write STEP=NUMBER, STEP one of {', '.join(STEPS)}"
            )
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise InvalidArgumentError(
                f"tolerance {text!r} cannot be read; a positive number is needed, as in {step}=1e-3"
            )
        tolerances[step] = value
    return tolerances
