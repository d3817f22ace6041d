"""How close an engine's outputs have to be to the recorded ones: by precision, and in 8 bits by what an output is for.

The runner computes the same (`runner/difference.hpp`); a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fna.export.metadata import FileMetadata

Task = Literal["tokens", "vector", "map", "classes"]
"""What an output is for: tokens `[B, N, C]`, a vector of each image `[B, C]`, one value at each place `[B, H, W]` or `[B, 1, H, W]`,
scores of classes `[B, K]`."""


class Tolerance(BaseModel):
    """How close an output has to be to the recorded one, as one row of numbers.

    Attributes:
        relative_l2: largest relative L2 error.
        cosine: smallest cosine similarity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    relative_l2: float = Field(gt=0)
    cosine: float = Field(gt=0, le=1)


class TaskTolerance(BaseModel):
    """How close an output has to be for its task; None is not asked for.

    Attributes:
        task: what the output is for.
        row_cosine: smallest mean, over rows along the last axis, of the cosine with the recorded row.
        row_cosine_p5: smallest 5th percentile of those cosines.
        relative_l2: largest relative L2 error, since the others but regret do not see a wrong scale.
        correlation: smallest correlation of one image's whole output with the recorded one.
        regret: how far below the recorded best class the engine's best class may lie in the recorded scores, in their standard
            deviations; 0 where the two are one class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Task
    row_cosine: float | None = None
    row_cosine_p5: float | None = None
    correlation: float | None = None
    relative_l2: float | None = None
    regret: float | None = None

    def limits(self) -> dict[str, float]:
        """Return what is asked for, by measure."""
        return self.model_dump(exclude={"task"}, exclude_none=True)


TOLERANCES = {
    "fp32": Tolerance(relative_l2=1e-3, cosine=0.99999),
    "fp16": Tolerance(relative_l2=2e-2, cosine=0.999),
    "bf16": Tolerance(relative_l2=1e-1, cosine=0.99),
    "int8": Tolerance(relative_l2=1e-1, cosine=0.995),
    "fp8": Tolerance(relative_l2=1e-1, cosine=0.995),
}
"""Relative L2 as for the export error of `fna validate`; two vectors of equal length that are apart by a relative L2 of e have cosine
1 - e^2 / 2, and the limits here leave room for different lengths. Those of 8 bits are for outputs of no known task."""

TASK_TOLERANCES: dict[str, dict[Task, TaskTolerance]] = {
    "int8": {
        "tokens": TaskTolerance(task="tokens", row_cosine=0.9978, row_cosine_p5=0.9948, relative_l2=0.066),
        "vector": TaskTolerance(task="vector", row_cosine=0.9979, relative_l2=0.065),
        "map": TaskTolerance(task="map", correlation=0.9994, relative_l2=0.023),
        "classes": TaskTolerance(task="classes", regret=1),
    },
    "fp8": {
        "tokens": TaskTolerance(task="tokens", row_cosine=0.9946, row_cosine_p5=0.9893, relative_l2=0.105),
        "vector": TaskTolerance(task="vector", row_cosine=0.9915, relative_l2=0.13),
        "map": TaskTolerance(task="map", correlation=0.9976, relative_l2=0.036),
        "classes": TaskTolerance(task="classes", regret=1.2),
    },
}
"""Twice the error of the worst photograph that nothing was calibrated on (`studies.task_tolerances`, docs/notes/bundle.md). How far a
cosine is from 1 goes with the square of the error, so four times that."""


def tolerance_of(metadata: FileMetadata, precision: str) -> Tolerance:
    """Return the tolerance of a file's outputs of no known task, in one of its precisions."""
    return TOLERANCES[_coarsest(metadata) or precision]


def task_tolerances(metadata: FileMetadata, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, TaskTolerance]:
    """Return the tolerance of each output whose task is known, by name; none for files without 8 bits."""
    limits = TASK_TOLERANCES.get(_coarsest(metadata), {})
    tasks = {name: find_task(metadata, name, array.shape) for name, array in outputs.items()}
    return {name: limits[task] for name, task in tasks.items() if task in limits}


def find_task(metadata: FileMetadata, name: str, shape: tuple[int, ...]) -> Task | None:
    """Return what an output is for: as its file says, or by its shape where the file does not say.

    Args:
        metadata: of the file.
        name: of the output.
        shape: of the output.
    """
    counts = {row.get("tokens") for row in metadata.attention_table or []}
    if name in metadata.token_outputs or (len(shape) == 3 and shape[1] in counts):
        return "tokens"
    if name in metadata.map_outputs or (len(shape) == 4 and shape[1] == 1):
        return "map"
    if len(shape) == 2:
        return "classes" if name == "logits" else "vector"
    return None


def measure(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> dict[str, float]:
    """Return every measure of a tolerance, for outputs `[B, ...]` of one shape."""
    one, other = (array.astype(np.float64) for array in (expected, actual))
    rows = [array.reshape(-1, array.shape[-1]) for array in (one, other)]
    cosines = _cosines(*rows)
    items = [array.reshape(len(array), -1) for array in (one, other)]
    centred = [array - array.mean(axis=1, keepdims=True) for array in items]
    difference, norm = float(np.linalg.norm(one - other)), float(np.linalg.norm(one))
    chosen = np.take_along_axis(rows[0], rows[1].argmax(axis=1)[:, None], axis=1)[:, 0]
    lost, spread = rows[0].max(axis=1) - chosen, rows[0].std(axis=1)
    return {
        "relative_l2": difference / norm if norm > 0 else difference,
        "cosine": float(_cosines(one.reshape(1, -1), other.reshape(1, -1))[0]),
        "row_cosine": float(cosines.mean()),
        "row_cosine_p5": float(np.percentile(cosines, 5)),
        "correlation": float(_cosines(*centred).min()),
        "regret": float(np.max(np.where(lost > 0, lost / np.where(spread > 0, spread, 1), 0))),
    }


def failures(
    tolerance: Tolerance, task: TaskTolerance | None, expected: NDArray[np.float32], actual: NDArray[np.float32]
) -> list[str]:
    """Return what is out of tolerance, a text for each measure; by the task where there is one.

    Args:
        tolerance: of an output of no known task.
        task: of this output, where its task is known.
        expected: the recorded output, `[B, ...]`.
        actual: what the engine gave.
    """
    if expected.shape != actual.shape:
        return [f"shape {list(actual.shape)}, but {list(expected.shape)} was recorded"]
    if not np.isfinite(actual).all():
        return ["NaN or infinite values"]
    found = measure(expected, actual)
    limits = task.limits() if task is not None else tolerance.model_dump()
    return [
        f"{name.replace('_', ' ')} {found[name]:.6g} (tolerance {limit:g})"
        for name, limit in limits.items()
        if not (found[name] <= limit if name in LARGEST else found[name] >= limit)
    ]


LARGEST = ("relative_l2", "regret")
"""Measures whose tolerance is the largest value; of the others it is the smallest."""


def _coarsest(metadata: FileMetadata) -> str:
    return metadata.quantized.partition("+")[0] if metadata.quantized is not None else ""


def _cosines(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:  # of rows: [R, C] -> [R]
    """1 where both rows are zero, 0 where one is."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    equal = (one == other).all(axis=1)
    return np.asarray(np.where(norms > 0, np.sum(one * other, axis=1) / np.where(norms > 0, norms, 1), equal))
