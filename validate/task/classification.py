"""Whether images keep their classes: by the model's class head, or by a linear probe where there are labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fna.errors import InputFileError
from fna.export.sources.loading import LoadedModel
from fna.validate.task.inputs import TaskInputs
from fna.validate.task.linear_probe import add_probe, hold_out, probe
from fna.validate.task.results import Results


def measure_classification(results: Results, inputs: TaskInputs) -> None:
    """Measure agreement and accuracy of a class head; without one, a linear probe where there are labels.

    Raises:
        InputFileError: if the labels do not match the model's classes, or are too few to hold some out.
    """
    vectors, labels = inputs.vectors, inputs.labels
    if vectors.exact_logits is not None and vectors.fna_logits is not None:
        exact, fna = vectors.exact_logits[: vectors.images], vectors.fna_logits[: vectors.images]
        _add_agreement(results, exact, fna)
        if labels is not None:
            truth = match_labels(labels, class_names(inputs.chain.model if inputs.chain else None), exact.shape[1])
            for kind, logits in (("exact", exact), ("FNA", fna)):
                value = float((logits.argmax(axis=1) == truth).mean())
                results.add("classification", f"accuracy, {kind}", value, f"{len(truth)} labelled images")
        return
    if labels is None:
        results.skipped.append(
            "classification: the model has no class head, and the images have no labels (class folders)"
        )
        return
    if vectors.exact is None or vectors.fna is None:
        results.skipped.append("classification: the model has neither a class head nor an embedding")
        return
    names, truth = np.unique(np.array(labels), return_inverse=True)
    train, test = hold_out(truth, names)
    scores = probe(vectors.exact[: vectors.images], vectors.fna[: vectors.images], truth, train, test)
    detail = f"linear probe on {len(train)} images, {len(test)} held out, {len(names)} classes"
    add_probe(results, "classification", scores, detail)


def _add_agreement(
    results: Results,
    exact: NDArray[Any],  # [M, K]
    fna: NDArray[Any],  # [M, K]
) -> None:
    for k in (1, 5):
        if k < exact.shape[1]:
            what = "the same best class" if k == 1 else f"exact attention's best class among FNA's best {k}"
            value = top_agreement(exact, fna, k)
            results.add("classification", f"top-{k} agreement", value, f"{what}, {len(exact)} images")


def top_agreement(exact: NDArray[Any], fna: NDArray[Any], k: int) -> float:
    """Share of items whose best class by `exact` `[M, K]` is among the best `k` by `fna`."""
    best = exact.argmax(axis=1)
    ranked = np.argsort(-fna, axis=1, kind="stable")[:, :k]
    return float((ranked == best[:, None]).any(axis=1).mean())


def class_names(model: LoadedModel | None) -> dict[str, int]:
    """Return class numbers by the names that a transformers model gives them, in lower case."""
    config = getattr(getattr(model.module, "model", None), "config", None) if model is not None else None
    names: dict[str, int] = {}
    for number, text in (getattr(config, "id2label", None) or {}).items():
        for part in (str(text), *str(text).split(",")):
            names.setdefault(part.strip().lower(), int(number))
    return names


def match_labels(labels: Sequence[str], names: dict[str, int], classes: int) -> NDArray[np.int64]:
    """Turn folder names into class numbers: the model's own names for its classes, or the numbers themselves.

    Raises:
        InputFileError: naming a folder that is neither.
    """
    numbers = []
    for label in labels:
        number = names.get(label.strip().lower(), int(label) if label.isdigit() else None)
        if number is None or not 0 <= number < classes:
            known = ", ".join(sorted(names)[:3]) or "none"
            raise InputFileError(
                f"class folder {label!r} is no class of the model, which has {classes} (such as: {known}); name folders as its "
                f"classes are, or by their numbers 0 to {classes - 1}"
            )
        numbers.append(number)
    return np.array(numbers, dtype=np.int64)
