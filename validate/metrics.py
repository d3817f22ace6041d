"""How far one array is from another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict


class OutputError(BaseModel):
    """The distance of one output from its reference, over all images.

    Attributes:
        output: its name.
        max_abs: largest absolute difference, in the output's own unit.
        relative_l2: norm of the difference over norm of the reference.
        cosine_min: smallest cosine between corresponding vectors (tokens, or whole items for other outputs).
        cosine_p5: 5th percentile of those cosines.
        cosine_mean: their mean.
        cosine_first_token: mean cosine of the first token (the class token where there is one); None for other outputs.
        cosine_patches: mean cosine of the patch tokens; None for other outputs.
        worst_item: index of the image with the smallest cosine.
        not_finite: how many values are NaN or infinite.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    max_abs: float
    relative_l2: float
    cosine_min: float
    cosine_p5: float
    cosine_mean: float
    cosine_first_token: float | None = None
    cosine_patches: float | None = None
    worst_item: int
    not_finite: int


def measure(
    output: str,
    reference: NDArray[Any],  # [B, ...]
    actual: NDArray[Any],  # [B, ...]
    *,
    prefix_tokens: int | None = None,
) -> OutputError:
    """Compare two arrays of one shape, in fp64.

    Args:
        output: the output's name.
        reference: what it should be.
        actual: what it is.
        prefix_tokens: for `[B, N, C]` token outputs: how many tokens precede the patches. None compares whole items.

    Raises:
        ValueError: if the shapes differ.
    """
    if reference.shape != actual.shape:
        raise ValueError(
            f"output {output} has shape {list(actual.shape)}, but its reference has {list(reference.shape)}"
        )
    expected, given = reference.astype(np.float64), actual.astype(np.float64)
    difference = given - expected
    tokens = prefix_tokens is not None and expected.ndim == 3
    vectors = (
        (expected, given) if tokens else (expected.reshape(len(expected), 1, -1), given.reshape(len(given), 1, -1))
    )
    cosines = cosine(*vectors)  # [B, N] or [B, 1]
    first = prefix = prefix_tokens or 0
    return OutputError(
        output=output,
        max_abs=float(np.abs(difference).max()),
        relative_l2=float(np.linalg.norm(difference) / max(np.linalg.norm(expected), np.finfo(np.float64).tiny)),
        cosine_min=float(cosines.min()),
        cosine_p5=float(np.percentile(cosines, 5)),
        cosine_mean=float(cosines.mean()),
        cosine_first_token=float(cosines[:, 0].mean()) if tokens and first else None,
        cosine_patches=float(cosines[:, prefix:].mean()) if tokens else None,
        worst_item=int(np.argmin(cosines.min(axis=1))),
        not_finite=int(np.count_nonzero(~np.isfinite(given))),
    )


def cosine(
    left: NDArray[Any],  # [..., C]
    right: NDArray[Any],  # [..., C]
) -> NDArray[Any]:  # [...]
    """Cosine along the last axis; 1 where both vectors are zero, 0 where one is."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    both_zero = (np.linalg.norm(left, axis=-1) == 0) & (np.linalg.norm(right, axis=-1) == 0)
    safe = np.where(norms == 0, 1.0, norms)
    return np.where(both_zero, 1.0, np.where(norms == 0, 0.0, (left * right).sum(axis=-1) / safe))
