"""Whether the model still does its job: retrieval, classification, segmentation, saliency, projected tokens.

Everything compares exact attention in PyTorch with the last step of the chain that can be run (the file; the engine, where it
runs), except the linear probe on digits, which needs images of its own size and compares PyTorch exact and FNA.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from fna.errors import InputFileError
from fna.export.sources.loading import LoadedModel
from fna.plan import Plan
from fna.runtime import Arrays
from fna.validate.budget.chain import EXACT, Chain, Say
from fna.validate.budget.measure import Outputs, is_tokens, prefix_of
from fna.validate.budget.runners import patched
from fna.validate.metrics import cosine
from fna.validate.photographs import Photographs

RECALLS = (1, 5, 10)
CLUSTERS = 8
DIGITS = 240
DIGITS_SIDE = 98
"""Pixels: DINOv2's patches are 14 wide, so digits become 7x7 patches."""

EMBEDDINGS = ("image_embeds", "pooler_output", "image_features")
FEWEST_FOR_RETRIEVAL = 11
"""Images that ten neighbours of each need."""


class Measure(BaseModel):
    """One number.

    Attributes:
        task: which task.
        measure: what is measured.
        value: in 0..1, 1 being full agreement; correlations and cosines in -1..1.
        detail: on what, and how.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    measure: str
    value: float
    detail: str


class TaskResult(BaseModel):
    """What `--task` measured.

    Attributes:
        measures: the numbers.
        skipped: tasks that this model or these images do not allow, with the reason.
    """

    model_config = ConfigDict(frozen=True)

    measures: tuple[Measure, ...]
    skipped: tuple[str, ...] = ()

    def find(self, task: str, measure: str) -> float | None:
        """Return one value."""
        return next((item.value for item in self.measures if (item.task, item.measure) == (task, measure)), None)


@dataclass(frozen=True)
class OutputKinds:
    """What a model's outputs are, as far as tasks need to know.

    Attributes:
        maps: outputs that are one-channel maps.
        tokens: outputs that are `[B, N, C]` tokens.
        prefix_tokens: class and register tokens at their front.
        patches_only: those of `tokens` that have none; LLaVA's projector takes patches alone.
    """

    maps: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    prefix_tokens: int = 0
    patches_only: tuple[str, ...] = ()

    def prefix_of(self, name: str) -> int:
        """How many tokens precede the patches in one of `tokens`."""
        return 0 if name in self.patches_only else self.prefix_tokens


def output_kinds(chain: Chain, arrays: Arrays, size: tuple[int, int] | None = None) -> OutputKinds:
    """Read off a chain what the outputs of its model are; `size` is the images' height and width, None the chain's."""
    height, width = size or (chain.height, chain.width)
    tokens = tuple(name for name, array in arrays.items() if array.ndim == 3 and is_tokens(chain, name, array))
    bare = tuple(name for name in tokens if prefix_of(chain.metadata, height, width, arrays[name]) == 0)
    return OutputKinds(chain.metadata.map_outputs, tokens, chain.metadata.plan.prefix_tokens or 0, bare)


@dataclass
class Results:
    """Filled task by task."""

    measures: list[Measure] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, task: str, measure: str, value: float, detail: str) -> None:
        """Take in one number."""
        self.measures.append(Measure(task=task, measure=measure, value=float(value), detail=detail))


def measure_tasks(
    chain: Chain, last: str, photographs: Photographs, outputs: Outputs, on_step: Say, *, digits: int = DIGITS
) -> TaskResult:
    """Measure every task that the model and the images allow.

    Args:
        chain: from `open_chain`.
        last: the stage that is compared with exact attention.
        photographs: the images, with labels where there are class folders.
        outputs: of the images that were kept, for maps and patch features.
        on_step: called with what is being done, how much of it is done, and how much there is.
        digits: images of the linear probe; half of them are held out.

    Raises:
        InputFileError: if the labels do not match the model's, or are too few to hold some out.
    """
    results = Results()
    collected = _collect(chain, last, photographs, outputs, on_step)
    _retrieval(results, collected)
    measure_classification(results, chain, collected, photographs)
    kinds, exact, given = output_kinds(chain, outputs.exact), outputs.exact, outputs.exported
    _maps(results, kinds, exact, given)
    _segmentation(results, kinds, exact, given)
    _projected(results, exact, given)
    _digits_probe(results, chain, digits, on_step)
    return TaskResult(measures=tuple(results.measures), skipped=tuple(results.skipped))


def compare_outputs(
    kinds: OutputKinds,
    exact: Arrays,  # [M, ...] each
    given: Arrays,
    tasks: Collection[str] | None = None,
) -> TaskResult:
    """Measure what the outputs of the same images, exact and otherwise, say by themselves: all tasks but the probes.

    Args:
        kinds: what the outputs are.
        exact: outputs of M images by name.
        given: the same, to be compared.
        tasks: those that are measured; None is all.
    """
    results, count = Results(), len(next(iter(exact.values())))
    rows, name = _rows(lambda _: kinds, ((_image_of(exact, i), _image_of(given, i)) for i in range(count)))
    found = Collected(rows.get("exact"), rows.get("fna"), rows.get("exact_logits"), rows.get("fna_logits"), count, name)
    steps: dict[str, Callable[[], object]] = {
        "retrieval": lambda: _retrieval(results, found),
        "classification": lambda: _agreement_of_classes(results, found),
        "saliency": lambda: _maps(results, kinds, exact, given),
        "segmentation": lambda: _segmentation(results, kinds, exact, given),
        "projected tokens": lambda: _projected(results, exact, given),
    }
    for task, step in steps.items():
        if tasks is None or task in tasks:
            step()
    return TaskResult(measures=tuple(results.measures), skipped=tuple(results.skipped))


# ---------------------------------------------------------------- running


@dataclass
class Collected:
    """Embeddings `[M, C]` and, for models with a head, logits `[M, K]`, exact and FNA; crops of images come after the images."""

    exact: NDArray[np.float32] | None
    fna: NDArray[np.float32] | None
    exact_logits: NDArray[np.float32] | None
    fna_logits: NDArray[np.float32] | None
    images: int
    embedding: str


def _collect(chain: Chain, last: str, photographs: Photographs, outputs: Outputs, on_step: Say) -> Collected:
    """Run all images, and crops of them where there are too few to have ten neighbours; what was kept is not run again."""
    pictures = [image for _, image in photographs.images]
    whole = len(pictures)
    if whole < FEWEST_FOR_RETRIEVAL:
        pictures = [*pictures, *(crop for image in pictures for crop in _crops(image, FEWEST_FOR_RETRIEVAL + 4, whole))]
    rows, name = _rows(
        lambda arrays: output_kinds(chain, arrays), _run_pairs(chain, last, pictures, whole, outputs, on_step)
    )
    return Collected(rows.get("exact"), rows.get("fna"), rows.get("exact_logits"), rows.get("fna_logits"), whole, name)


def _run_pairs(
    chain: Chain, last: str, pictures: Sequence[Image.Image], whole: int, outputs: Outputs, on_step: Say
) -> Iterator[tuple[Arrays, Arrays]]:
    """The outputs of each picture, exact and by the last step; one picture's at a time, for they may be large."""
    kept = len(next(iter(outputs.exact.values()), []))
    for index, picture in enumerate(pictures):
        on_step("task: embeddings and classes", index, len(pictures))
        if index < min(whole, kept):
            yield _image_of(outputs.exact, index), _image_of(outputs.exported, index)
        else:
            pixels = chain.metadata.preprocessing.apply(picture, chain.height, chain.width)[None]
            yield chain.stages[EXACT](pixels), chain.stages[last](pixels)


def _rows(
    kinds_of: Callable[[Arrays], OutputKinds], pairs: Iterable[tuple[Arrays, Arrays]]
) -> tuple[dict[str, NDArray[Any]], str]:
    """Embeddings and logits of pairs of single images, exact and FNA, stacked; and what the embedding is."""
    rows: dict[str, list[NDArray[Any]]] = {}
    name = ""
    for pair in pairs:
        for kind, arrays in zip(("exact", "fna"), pair, strict=True):
            name, vector = _embedding(kinds_of(arrays), arrays)
            if vector is not None:
                rows.setdefault(kind, []).append(vector)
            if _is_classifier(arrays):
                rows.setdefault(f"{kind}_logits", []).append(arrays["logits"][0])
    return {key: np.stack(values) for key, values in rows.items()}, name


def _image_of(arrays: Arrays, index: int) -> Arrays:
    return {name: array[index : index + 1] for name, array in arrays.items()}


def _crops(image: Image.Image, wanted: int, images: int) -> list[Image.Image]:
    """Corners and edges of a photograph at six tenths of its size, as many as make `wanted` images in all."""
    count = -(-(wanted - images) // images)
    width, height = int(image.width * 0.6), int(image.height * 0.6)
    places = [(0, 0), (1, 1), (1, 0), (0, 1), (0.5, 0.5), (0.5, 0), (0.5, 1), (0, 0.5), (1, 0.5)]
    crops = []
    for across, down in (places * (count // len(places) + 1))[:count]:
        left, top = round(across * (image.width - width)), round(down * (image.height - height))
        crops.append(image.crop((left, top, left + width, top + height)))
    return crops


def _embedding(kinds: OutputKinds, arrays: Arrays) -> tuple[str, NDArray[Any] | None]:
    """The image's vector: the model's own, else its class token, else the mean of its tokens."""
    for name in EMBEDDINGS:
        if name in arrays and arrays[name].ndim == 2:
            return name, arrays[name][0]
    for name in kinds.tokens:
        tokens = arrays[name][0]
        return (
            (f"class token of {name}", tokens[0])
            if kinds.prefix_of(name)
            else (f"mean token of {name}", tokens.mean(0))
        )
    for name, array in arrays.items():
        if array.ndim == 2 and name != "logits":
            return name, array[0]
    return "", None


def _is_classifier(arrays: Arrays) -> bool:
    return "logits" in arrays and arrays["logits"].ndim == 2


# ---------------------------------------------------------------- the tasks


def _retrieval(results: Results, found: Collected) -> None:
    if found.exact is None or found.fna is None:
        results.skipped.append("retrieval: the model has no image embedding")
        return
    count = len(found.exact)
    crops = f" ({found.images} images and {count - found.images} crops of them)" if count > found.images else ""
    for k in RECALLS:
        if k >= count:
            results.skipped.append(f"retrieval: {k} neighbours need more than {count} images")
            continue
        value = neighbour_recall(found.exact, found.fna, k)
        detail = (
            f"share of each image's {k} nearest among {count} that stay among the {k} nearest{crops}; {found.embedding}"
        )
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


def measure_classification(results: Results, chain: Chain, found: Collected, photographs: Photographs) -> None:
    """Agreement and accuracy of a class head; without one, a linear probe where there are labels."""
    labels = photographs.labels
    if found.exact_logits is not None and found.fna_logits is not None:
        exact, fna = _agreement_of_classes(results, found)
        if labels is not None:
            truth = match_labels(labels, class_names(chain.model), exact.shape[1])
            for kind, logits in (("exact", exact), ("FNA", fna)):
                value = float((logits.argmax(axis=1) == truth).mean())
                results.add("classification", f"accuracy, {kind}", value, f"{len(truth)} labelled images")
        return
    if labels is None:
        results.skipped.append(
            "classification: the model has no class head, and the images have no labels (class folders)"
        )
        return
    if found.exact is None or found.fna is None:
        results.skipped.append("classification: the model has neither a class head nor an embedding")
        return
    names, truth = np.unique(np.array(labels), return_inverse=True)
    train, test = hold_out(truth, names)
    scores = probe(found.exact[: found.images], found.fna[: found.images], truth, train, test)
    _add_probe(
        results,
        "classification",
        scores,
        f"linear probe on {len(train)} images, {len(test)} held out, {len(names)} classes",
    )


def _agreement_of_classes(results: Results, found: Collected) -> tuple[NDArray[Any], NDArray[Any]]:
    """Compare the classes of the images, crops left out, where there is a class head; returns its logits `[M, K]`."""
    if found.exact_logits is None or found.fna_logits is None:
        return np.empty((0, 0)), np.empty((0, 0))
    exact, fna = found.exact_logits[: found.images], found.fna_logits[: found.images]
    for k in (1, 5):
        if k < exact.shape[1]:
            value = top_agreement(exact, fna, k)
            what = "the same best class" if k == 1 else f"exact attention's best class among FNA's best {k}"
            results.add("classification", f"top-{k} agreement", value, f"{what}, {len(exact)} images")
    return exact, fna


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
        items = np.flatnonzero(truth == number)
        if len(items) < 2:
            raise InputFileError(
                f"class folder {name} has one image, but two are needed: one to train on, one held out"
            )
        half = (len(items) + 1) // 2
        train += items[:half].tolist()
        test += items[half:].tolist()
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
    expected, given = first.predict(exact[test]), first.predict(fna[test])
    return ProbeScores(
        exact=float((expected == truth[test]).mean()),
        fna=float((given == truth[test]).mean()),
        retrained=float(fit(fna).score(fna[test], truth[test])),
        agreement=float((expected == given).mean()),
    )


def _add_probe(results: Results, task: str, scores: ProbeScores, detail: str) -> None:
    results.add(task, "accuracy, exact", scores.exact, detail)
    results.add(task, "accuracy, FNA", scores.fna, f"{detail}; the probe trained on exact features")
    results.add(task, "accuracy, FNA, probe retrained", scores.retrained, detail)
    results.add(
        task, "agreement", scores.agreement, "share of held-out images put into the same class by exact and FNA"
    )


def _maps(results: Results, kinds: OutputKinds, exact_outputs: Arrays, given: Arrays) -> None:
    if not kinds.maps:
        results.skipped.append("saliency: the model has no map output")
        return
    name = kinds.maps[0]
    exact, fna = exact_outputs[name], given[name]
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


def mean_iou(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """Mean over the classes of `reference` of the IoU with `actual`."""
    return float(np.mean([intersection_over_union(reference == kind, actual == kind) for kind in np.unique(reference)]))


def _segmentation(results: Results, kinds: OutputKinds, exact_outputs: Arrays, given: Arrays) -> None:
    for name, array in exact_outputs.items():
        if array.ndim == 4 and array.shape[1] > 1 and name not in kinds.maps:
            exact, fna = array.argmax(axis=1), given[name].argmax(axis=1)
            detail = f"argmax of {name}, {len(array)} images"
            results.add("segmentation", "pixel agreement", float((exact == fna).mean()), detail)
            results.add("segmentation", "mIoU", mean_iou(exact, fna), detail)
            return
    for name in kinds.tokens:
        array, prefix = exact_outputs[name], kinds.prefix_of(name)
        exact, fna = cluster(array[:, prefix:], given[name][:, prefix:])
        detail = f"{CLUSTERS} k-means clusters of the patch features of {name}, {len(array)} images"
        results.add("segmentation", "patch agreement", float((exact == fna).mean()), detail)
        results.add("segmentation", "mIoU", mean_iou(exact, fna), detail)
        return
    results.skipped.append("segmentation: the model has neither class maps nor patch features")


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


def _projected(results: Results, exact: Arrays, given: Arrays) -> None:
    array = exact.get("image_features")
    if array is None or array.ndim != 3:
        return
    cosines = cosine(array.astype(np.float64), given["image_features"].astype(np.float64))
    detail = f"tokens as the language model is given them, {len(array)} images of {array.shape[1]} tokens"
    results.add("projected tokens", "cosine, mean", float(cosines.mean()), detail)
    results.add("projected tokens", "cosine, 5th percentile", float(np.percentile(cosines, 5)), detail)
    results.add("projected tokens", "cosine, min", float(cosines.min()), detail)


# ---------------------------------------------------------------- the probe on digits


def _digits_probe(results: Results, chain: Chain, count: int, on_step: Say) -> None:
    model = chain.model
    if model is None:
        results.skipped.append("digits probe: a grafted file has no PyTorch model to run at another size")
        return
    side = (
        max(DIGITS_SIDE // model.patch_size, 4) * model.patch_size if model.any_resolution else model.native_resolution
    )
    tokens = (side // model.patch_size) ** 2 + (chain.metadata.plan.prefix_tokens or 0)
    full = (chain.height // model.patch_size) * (chain.width // model.patch_size)
    plan = shrink_plan(chain.metadata.plan, tokens, full)
    pixels, truth = digits(chain, side, count)
    found: dict[str, NDArray[Any]] = {}
    for kind, run in (("exact", _batched(chain, model, None)), ("fna", _batched(chain, model, plan))):
        features = run(pixels, lambda done, kind=kind: on_step(f"task: digits, {kind}", done, len(pixels)))
        if features is None:
            results.skipped.append("digits probe: the model has no image embedding")
            return
        found[kind] = features
    train, test = hold_out(truth, np.unique(truth))
    counts = sorted({entry.landmarks for entry in plan.blocks})
    detail = (
        f"linear probe on {len(train)} of scikit-learn's digits at {side} pixels, {len(test)} held out; PyTorch, S="
        f"{'/'.join(map(str, counts))} of {tokens} tokens, in proportion to the plan"
    )
    _add_probe(results, "digits probe", probe(found["exact"], found["fna"], truth, train, test), detail)


def shrink_plan(plan: Plan, tokens: int, full: int) -> Plan:
    """Return the plan for square images of fewer tokens: as many landmarks in proportion, at least two beside the prefix tokens.

    What was fitted to the plan's own resolution, such as corrections, is kept as it is.
    """
    prefix = plan.prefix_tokens or 0
    share = min(1.0, (tokens - prefix) / full)
    blocks = tuple(
        entry.model_copy(
            update={"landmarks": min(tokens, max(prefix + 2, prefix + round((entry.landmarks - prefix) * share)))}
        )
        for entry in plan.blocks
    )
    return plan.for_squares().model_copy(update={"blocks": blocks})


def digits(chain: Chain, side: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits as the model's input `[M, 3, side, side]`, and their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))[:count]
    pictures = [Image.fromarray((bunch.images[index] * 255 / 16).astype(np.uint8)) for index in order]
    pixels = np.stack([chain.metadata.preprocessing.apply(picture, side, side) for picture in pictures])
    return pixels, bunch.target[order]


def _batched(chain: Chain, model: LoadedModel, plan: Plan | None) -> Callable[..., NDArray[Any] | None]:
    """Return a function that gives the embeddings of many images `[M, C]`, exact or by a plan."""
    import torch

    def run(pixels: NDArray[np.float32], tell: Callable[[int], None]) -> NDArray[Any] | None:
        vectors: list[NDArray[Any]] = []
        with torch.inference_mode():
            for start in range(0, len(pixels), 25):
                tell(start)
                tensors = model.module(torch.from_numpy(pixels[start : start + 25]))
                batch = {name: t.float().numpy() for name, t in zip(model.output_names, tensors, strict=True)}
                for index in range(len(pixels[start : start + 25])):
                    _, vector = _embedding(
                        output_kinds(chain, batch, (pixels.shape[2], pixels.shape[3])), _image_of(batch, index)
                    )
                    if vector is None:
                        return None
                    vectors.append(vector.copy())
        return np.stack(vectors)

    if plan is None:
        return run

    def run_patched(pixels: NDArray[np.float32], tell: Callable[[int], None]) -> NDArray[Any] | None:
        with patched(model, plan):
            return run(pixels, tell)

    return run_patched
