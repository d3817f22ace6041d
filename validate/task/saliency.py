"""Whether maps stay the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fna.validate.task.inputs import TaskInputs
from fna.validate.task.results import Results


def measure_saliency(results: Results, inputs: TaskInputs) -> None:
    """Measure how far the first map output stays: its mask and its correlation."""
    if not inputs.kinds.maps:
        results.skipped.append("saliency: the model has no map output")
        return
    name = inputs.kinds.maps[0]
    exact, fna = inputs.exact[name], inputs.approximated[name]
    unit = exact.min() >= 0 and exact.max() <= 1
    limits = [0.5 if unit else (float(array.min()) + float(array.max())) / 2 for array in exact]
    overlaps = [intersection_over_union(e > limit, f > limit) for e, f, limit in zip(exact, fna, limits, strict=True)]
    where = "0.5" if unit else "the middle of the exact map's range"
    results.add("saliency", "IoU", float(np.mean(overlaps)), f"{name} above {where}, mean of {len(exact)} images")
    correlations = [np.corrcoef(e.ravel(), f.ravel())[0, 1] for e, f in zip(exact, fna, strict=True)]
    results.add(
        "saliency", "correlation", float(np.mean(correlations)), f"{name}, Pearson's, mean of {len(exact)} images"
    )


def intersection_over_union(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    """Pixels in both masks over pixels in either; 1 for two empty masks."""
    union = np.count_nonzero(left | right)
    return 1.0 if union == 0 else np.count_nonzero(left & right) / union
