"""What kind of mask or bias is added to scores."""

from __future__ import annotations

import numpy as np

from fna.export.surgery.recognise.context import Context

NEGLIGIBLE = -1e4
"""Mask values below this remove a key from the softmax."""


def constant_mask_kind(context: Context, mask: str, value: np.ndarray | None) -> str:
    """Say what a constant mask is: causal, a position bias, or another mask; `value` is its value where that is known."""
    if value is None:
        bounds = context.bounds.find(mask)
        if bounds.high <= 0 and bounds.low < NEGLIGIBLE:
            return "an attention mask that is not provably without effect"
        return "a position bias is added to its scores"
    array = np.asarray(value, np.float64) if value.dtype != bool else np.where(value, 0.0, -np.inf)
    blocked = array < NEGLIGIBLE
    if not blocked.any():
        return "a position bias is added to its scores"
    if array.ndim >= 2 and array.shape[-1] == array.shape[-2]:
        plane = blocked.reshape(-1, *array.shape[-2:])[0]
        if (plane == np.triu(np.ones_like(plane), 1)).all():
            return "a causal mask"
    return "an attention mask"
