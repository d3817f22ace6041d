"""A linear probe on scikit-learn's handwritten digits; they have a size of their own, so PyTorch is compared, exact and FNA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fna.export.sources.loading import LoadedModel
from fna.export.sources.running import patched
from fna.plan import Plan
from fna.validate.budget.chain import Chain
from fna.validate.task.inputs import TaskInputs, find_embedding, image_of, output_kinds
from fna.validate.task.linear_probe import add_probe, hold_out, probe
from fna.validate.task.results import Results

DIGITS = 240

DIGITS_SIDE = 98
"""Pixels: DINOv2's patches are 14 wide, so digits become 7x7 patches."""


def measure_digits_probe(results: Results, inputs: TaskInputs) -> None:
    """Measure the probe's accuracy, exact and with FNA by the plan for images of the digits' size."""
    chain = inputs.chain
    if chain is None:
        return
    model = chain.model
    if model is None:
        results.skipped.append("digits probe: a grafted file has no PyTorch model to run at another size")
        return
    side = max(DIGITS_SIDE // model.patch_size, 4) * model.patch_size
    size = (side, side) if model.any_resolution else model.native_size
    patches = model.patches(*size)
    plan = shrink_plan(chain.metadata.plan, patches, math.prod(model.patches(chain.height, chain.width)))
    pixels, truth = load_digit_images(chain, size, inputs.digits)
    vectors: dict[str, NDArray[Any]] = {}
    for kind, run in (("exact", _batched(chain, model, None)), ("fna", _batched(chain, model, plan))):
        features = run(pixels, lambda done, kind=kind: inputs.say(f"task: digits, {kind}", done, len(pixels)))
        if features is None:
            results.skipped.append("digits probe: the model has no image embedding")
            return
        vectors[kind] = features
    train, test = hold_out(truth, np.unique(truth))
    counts = sorted({block.landmarks for block in plan.blocks})
    detail = (
        f"linear probe on {len(train)} of scikit-learn's digits at {size[0]}x{size[1]} pixels, {len(test)} held out; PyTorch, S="
        f"{'/'.join(map(str, counts))} of {math.prod(patches) + (plan.prefix_tokens or 0)} tokens, in proportion to the plan"
    )
    add_probe(results, "digits probe", probe(vectors["exact"], vectors["fna"], truth, train, test), detail)


def shrink_plan(plan: Plan, patches: tuple[int, int], full: int) -> Plan:
    """Return the plan for images of fewer patches: as many landmarks in proportion, at least two beside the prefix tokens, and
    as many hot keys in proportion, in tiles that are no larger than the images.

    What was fitted to the plan's own resolution, such as corrections, is kept as it is.

    Args:
        plan: for images of `full` patches.
        patches: rows and columns of those that it is to be for.
        full: patches of an image that it was made for.
    """
    prefix = plan.prefix_tokens or 0
    tokens = prefix + math.prod(patches)
    share = min(1.0, math.prod(patches) / full)
    blocks = tuple(
        block.model_copy(
            update={"landmarks": min(tokens, max(prefix + 2, prefix + round((block.landmarks - prefix) * share)))}
        )
        for block in plan.blocks
    )
    focal = tuple(
        block.model_copy(update={"hot": math.ceil(block.hot * share), "tile": min(block.tile, *patches)})
        for block in plan.focal
    )
    placed = {} if plan.towers else {"patches": patches}  # each tower has its own
    return plan.for_any_size().model_copy(update={"blocks": blocks, "focal": focal, **placed})


def load_digit_images(chain: Chain, size: tuple[int, int], count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scikit-learn's handwritten digits as the model's input `[M, 3, H, W]`, and their classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.images))[:count]
    pictures = [Image.fromarray((bunch.images[index] * 255 / 16).astype(np.uint8)) for index in order]
    pixels = np.stack([chain.metadata.preprocessing.apply(picture, *size) for picture in pictures])
    return pixels, bunch.target[order]


def _batched(chain: Chain, model: LoadedModel, plan: Plan | None) -> Callable[..., NDArray[Any] | None]:
    """Return a function that gives the embeddings of many images `[M, C]`, exact or by a plan."""

    def run(pixels: NDArray[np.float32], tell: Callable[[int], None]) -> NDArray[Any] | None:
        vectors: list[NDArray[Any]] = []
        with torch.inference_mode():
            for start in range(0, len(pixels), 25):
                tell(start)
                tensors = model.module(torch.from_numpy(pixels[start : start + 25]))
                batch = {name: t.float().numpy() for name, t in zip(model.output_names, tensors, strict=True)}
                for index in range(len(pixels[start : start + 25])):
                    _, vector = find_embedding(
                        output_kinds(chain, batch, (pixels.shape[2], pixels.shape[3])), image_of(batch, index)
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
