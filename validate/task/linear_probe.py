"""A linear probe: logistic regression on features, half of them held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.errors import InputFileError
from fna.validate.task.results import Results


def hold_out(truth: NDArray[np.intp], names: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split items in half, class by class; the first half trains.

    Raises:
        InputFileError: for a single class, or a class with one image.
    """
    if len(names) < 2:
        raise InputFileError(f"there is one class folder ({names[0]}), but a linear probe needs at least two")
    train: list[int] = []
    test: list[int] = []
    for number, name in enumerate(names):
        images = np.flatnonzero(truth == number)
        if len(images) < 2:
            raise InputFileError(
                f"class folder {name} has one image, but two are needed: one to train on, one held out"
            )
        half = (len(images) + 1) // 2
        train += images[:half].tolist()
        test += images[half:].tolist()
    return np.array(train), np.array(test)


@dataclass(frozen=True)
class ProbeScores:
    """Accuracies of a linear probe on held-out items.

    Attributes:
        exact: trained and tested on exact features.
        fna: trained on exact features and tested on FNA's: the probe that exists already, on the new model.
        retrained: trained and tested on FNA's features.
        agreement: share of held-out items that the first two put into one class.
    """

    exact: float
    fna: float
    retrained: float
    agreement: float


def probe(
    exact: NDArray[Any],  # [M, C]
    fna: NDArray[Any],  # [M, C]
    truth: NDArray[Any],  # [M]
    train: NDArray[Any],
    test: NDArray[Any],
) -> ProbeScores:
    """Train logistic regression on the features of `train` and score it on those of `test`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(features: NDArray[Any]) -> Any:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=0.1)).fit(
            features[train], truth[train]
        )

    first = fit(exact)
    expected, predicted = first.predict(exact[test]), first.predict(fna[test])
    return ProbeScores(
        exact=float((expected == truth[test]).mean()),
        fna=float((predicted == truth[test]).mean()),
        retrained=float(fit(fna).score(fna[test], truth[test])),
        agreement=float((expected == predicted).mean()),
    )


def add_probe(results: Results, task: str, scores: ProbeScores, detail: str) -> None:
    """Take in a probe's scores; `detail` says on what."""
    results.add(task, "accuracy, exact", scores.exact, detail)
    results.add(task, "accuracy, FNA", scores.fna, f"{detail}; the probe trained on exact features")
    results.add(task, "accuracy, FNA, probe retrained", scores.retrained, detail)
    results.add(
        task, "agreement", scores.agreement, "share of held-out images put into the same class by exact and FNA"
    )
