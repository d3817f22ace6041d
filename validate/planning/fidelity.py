"""How close two runs of a model are, in the terms that a plan is made for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fna.validate.metrics import cosine


class Fidelity(BaseModel):
    """Cosines of the final tokens to exact attention, over all images.

    Attributes:
        mean: of the patch tokens' cosines; of whole outputs where the model has no token output.
        p5: their 5th percentile.
        first: mean cosine of the class token; None where there is none.
        tasks: values of task metrics, by `task:measure`; empty where none was asked for.
    """

    model_config = ConfigDict(frozen=True)

    mean: float
    p5: float
    first: float | None = None
    tasks: dict[str, float] = {}

    @property
    def loss(self) -> float:
        """`1 - mean`."""
        return 1 - self.mean

    def describe(self) -> str:
        """Say it in one line."""
        tasks = "".join(f", {name} {value:.4f}" for name, value in self.tasks.items())
        return f"{self.mean:.6f} (5th percentile {self.p5:.6f}{tasks})"


def measure_fidelity(
    reference: Sequence[NDArray[np.float32]],  # [T, C] each
    reached: Sequence[NDArray[np.float32]],
    prefix_tokens: int,
) -> Fidelity:
    """Compare runs of several images; `prefix_tokens` are those of the T that precede the patches."""
    cosines = [cosine(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(reference, reached, strict=True)]
    patches = np.concatenate([values[prefix_tokens:] for values in cosines])
    first = float(np.mean([values[0] for values in cosines])) if prefix_tokens else None
    return Fidelity(mean=float(patches.mean()), p5=float(np.percentile(patches, 5)), first=first)
