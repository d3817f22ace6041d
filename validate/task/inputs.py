"""What tasks look at: what a model's outputs are, and the embeddings and logits of many images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fna.runtime import Arrays
from fna.validate.budget.chain import EXACT, Chain, Say
from fna.validate.budget.measure import Outputs, is_tokens, prefix_of
from fna.validate.photographs import Photographs

EMBEDDINGS = ("image_embeds", "pooler_output", "image_features")

FEWEST_FOR_RETRIEVAL = 11
"""Images that ten neighbours of each need."""


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


@dataclass(frozen=True)
class ImageVectors:
    """Vectors of images, exact and FNA; crops of images come after the images.

    Attributes:
        exact: embeddings `[M, C]`; None where the model has none.
        fna: likewise.
        exact_logits: `[M, K]` of models with a class head, else None.
        fna_logits: likewise.
        images: how many of the M are whole images.
        embedding: what the embedding is.
    """

    exact: NDArray[np.float32] | None
    fna: NDArray[np.float32] | None
    exact_logits: NDArray[np.float32] | None
    fna_logits: NDArray[np.float32] | None
    images: int
    embedding: str


@dataclass(frozen=True)
class TaskInputs:
    """What a task measures on.

    Attributes:
        kinds: what the outputs are.
        exact: outputs of some images by name, `[M, ...]` each, with exact attention.
        approximated: the same with FNA.
        vectors: embeddings and logits of all images.
        chain: the models; None where there are outputs alone.
        labels: the class of each image, where there are any.
        digits: images of the linear probe on digits; half of them are held out.
        say: called with what is being done, how much of it is done, and how much there is.
    """

    kinds: OutputKinds
    exact: Arrays
    approximated: Arrays
    vectors: ImageVectors
    chain: Chain | None = None
    labels: Sequence[str] | None = None
    digits: int = 0
    say: Say = lambda *_progress: None


def output_kinds(chain: Chain, arrays: Arrays, size: tuple[int, int] | None = None) -> OutputKinds:
    """Read off a chain what the outputs of its model are; `size` is the images' height and width, None the chain's."""
    height, width = size or (chain.height, chain.width)
    tokens = tuple(name for name, array in arrays.items() if array.ndim == 3 and is_tokens(chain, name, array))
    bare = tuple(name for name in tokens if prefix_of(chain.metadata, height, width, arrays[name]) == 0)
    return OutputKinds(chain.metadata.map_outputs, tokens, chain.metadata.plan.prefix_tokens or 0, bare)


def collect_vectors(chain: Chain, last: str, photographs: Photographs, outputs: Outputs, on_step: Say) -> ImageVectors:
    """Run all images, and crops of them where there are too few to have ten neighbours; what was kept is not run again."""
    pictures = [image for _, image in photographs.images]
    whole = len(pictures)
    if whole < FEWEST_FOR_RETRIEVAL:
        pictures = [*pictures, *(crop for image in pictures for crop in _crops(image, FEWEST_FOR_RETRIEVAL + 4, whole))]
    pairs = _run_pairs(chain, last, pictures, whole, outputs, on_step)
    return _stack_vectors(lambda arrays: output_kinds(chain, arrays), pairs, whole)


def vectors_of(kinds: OutputKinds, exact: Arrays, approximated: Arrays) -> ImageVectors:
    """Return the embeddings and logits of outputs `[M, ...]` that are there already."""
    count = len(next(iter(exact.values())))
    pairs = ((image_of(exact, index), image_of(approximated, index)) for index in range(count))
    return _stack_vectors(lambda _: kinds, pairs, count)


def _run_pairs(
    chain: Chain, last: str, pictures: Sequence[Image.Image], whole: int, outputs: Outputs, on_step: Say
) -> Iterator[tuple[Arrays, Arrays]]:
    """The outputs of each picture, exact and by the last step; one picture's at a time, for they may be large."""
    kept = len(next(iter(outputs.exact.values()), []))
    for index, picture in enumerate(pictures):
        on_step("task: embeddings and classes", index, len(pictures))
        if index < min(whole, kept):
            yield image_of(outputs.exact, index), image_of(outputs.exported, index)
        else:
            pixels = chain.metadata.preprocessing.apply(picture, chain.height, chain.width)[None]
            yield chain.stages[EXACT](pixels), chain.stages[last](pixels)


def _stack_vectors(
    kinds_of: Callable[[Arrays], OutputKinds], pairs: Iterable[tuple[Arrays, Arrays]], images: int
) -> ImageVectors:
    """Embeddings and logits of pairs of single images' outputs, exact and FNA."""
    rows: dict[str, list[NDArray[Any]]] = {}
    embedding = ""
    for pair in pairs:
        for kind, arrays in zip(("exact", "fna"), pair, strict=True):
            embedding, vector = find_embedding(kinds_of(arrays), arrays)
            if vector is not None:
                rows.setdefault(kind, []).append(vector)
            if "logits" in arrays and arrays["logits"].ndim == 2:
                rows.setdefault(f"{kind}_logits", []).append(arrays["logits"][0])
    stacked = {kind: np.stack(vectors) for kind, vectors in rows.items()}
    return ImageVectors(
        exact=stacked.get("exact"),
        fna=stacked.get("fna"),
        exact_logits=stacked.get("exact_logits"),
        fna_logits=stacked.get("fna_logits"),
        images=images,
        embedding=embedding,
    )


def image_of(arrays: Arrays, index: int) -> Arrays:
    """Return the outputs of one image of a batch, batch of one."""
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


def find_embedding(kinds: OutputKinds, arrays: Arrays) -> tuple[str, NDArray[Any] | None]:
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
