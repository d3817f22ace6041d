"""Whether a language model is given the same tokens."""

from __future__ import annotations

import numpy as np

from fna.validate.metrics import cosine
from fna.validate.task.inputs import TaskInputs
from fna.validate.task.results import Results


def measure_projected_tokens(results: Results, inputs: TaskInputs) -> None:
    """Measure the cosines of a vision tower's projected tokens; other models have none."""
    array = inputs.exact.get("image_features")
    if array is None or array.ndim != 3:
        return
    cosines = cosine(array.astype(np.float64), inputs.approximated["image_features"].astype(np.float64))
    detail = f"tokens as the language model is given them, {len(array)} images of {array.shape[1]} tokens"
    results.add("projected tokens", "cosine, mean", float(cosines.mean()), detail)
    results.add("projected tokens", "cosine, 5th percentile", float(np.percentile(cosines, 5)), detail)
    results.add("projected tokens", "cosine, min", float(cosines.min()), detail)
