"""Whether patches and pixels keep their segments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.validate.task.inputs import TaskInputs
from fna.validate.task.results import Results
from fna.validate.task.saliency import intersection_over_union

CLUSTERS = 8


def measure_segmentation(results: Results, inputs: TaskInputs) -> None:
    """Measure class maps pixel by pixel; without any, clusters of the patch features."""
    kinds, approximated = inputs.kinds, inputs.approximated
    for name, array in inputs.exact.items():
        if array.ndim == 4 and array.shape[1] > 1 and name not in kinds.maps:
            exact, fna = array.argmax(axis=1), approximated[name].argmax(axis=1)
            detail = f"argmax of {name}, {len(array)} images"
            results.add("segmentation", "pixel agreement", float((exact == fna).mean()), detail)
            results.add("segmentation", "mIoU", mean_iou(exact, fna), detail)
            return
    for name in kinds.tokens:
        array, prefix = inputs.exact[name], kinds.prefix_of(name)
        exact, fna = cluster(array[:, prefix:], approximated[name][:, prefix:])
        detail = f"{CLUSTERS} k-means clusters of the patch features of {name}, {len(array)} images"
        results.add("segmentation", "patch agreement", float((exact == fna).mean()), detail)
        results.add("segmentation", "mIoU", mean_iou(exact, fna), detail)
        return
    results.skipped.append("segmentation: the model has neither class maps nor patch features")


def mean_iou(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """Mean over the classes of `reference` of the IoU with `actual`."""
    return float(np.mean([intersection_over_union(reference == kind, actual == kind) for kind in np.unique(reference)]))


def cluster(
    exact: NDArray[Any],  # [B, N, C]
    fna: NDArray[Any],  # [B, N, C]
) -> tuple[NDArray[Any], NDArray[Any]]:  # [B, N] each
    """Find clusters in the exact patch features, and put every patch of both into the nearest."""
    from sklearn.cluster import KMeans

    flat = exact.reshape(-1, exact.shape[-1])
    some = flat[np.random.default_rng(0).permutation(len(flat))[:4000]]
    means = KMeans(n_clusters=min(CLUSTERS, len(some)), n_init=3, random_state=0).fit(some)
    return tuple(
        means.predict(array.reshape(-1, array.shape[-1]).astype(some.dtype)).reshape(array.shape[:2])
        for array in (exact, fna)
    )
