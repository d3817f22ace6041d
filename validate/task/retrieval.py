"""Whether the nearest images stay the nearest."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.validate.task.inputs import TaskInputs
from fna.validate.task.results import Results

RECALLS = (1, 5, 10)


def measure_retrieval(results: Results, inputs: TaskInputs) -> None:
    """Measure the share of each image's nearest that stay the nearest."""
    vectors = inputs.vectors
    if vectors.exact is None or vectors.fna is None:
        results.skipped.append("retrieval: the model has no image embedding")
        return
    count = len(vectors.exact)
    crops = f" ({vectors.images} images and {count - vectors.images} crops of them)" if count > vectors.images else ""
    for k in RECALLS:
        if k >= count:
            results.skipped.append(f"retrieval: {k} neighbours need more than {count} images")
            continue
        value = neighbour_recall(vectors.exact, vectors.fna, k)
        detail = f"share of each image's {k} nearest among {count} that stay among the {k} nearest{crops}; {vectors.embedding}"
        results.add("retrieval", f"recall@{k}", value, detail)


def neighbour_recall(
    exact: NDArray[Any],  # [M, C]
    fna: NDArray[Any],  # [M, C]
    k: int,
) -> float:
    """Share of each item's `k` nearest by cosine, itself not counted, that are among its `k` nearest in the other embedding."""
    sets = []
    for vectors in (exact, fna):
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -np.inf)
        sets.append(np.argsort(-similarity, axis=1, kind="stable")[:, :k])
    return float(np.mean([len(set(left) & set(right)) / k for left, right in zip(*sets, strict=True)]))
