"""What masking massive and artifact tokens changes on real weights: `python -m studies.masking`.

Exact attention and FNA, without a mask, with masked keys and with sinks, on photographs: how smooth a k-means segmentation of the
patch tokens is, and how far the saliency map and the tokens move; on scikit-learn's digits: a linear probe of the class token.
The same with massive tokens planted into the residual stream, for models that have none; and what it does to FNA to have
massive tokens guaranteed as landmarks, or artifact tokens excluded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fna.attention import fast_nystrom_attention
from fna.block_numbers import parse_layers
from fna.errors import FnaError
from fna.export.preprocessing import bundled_photographs, load_images
from fna.export.sources.loading import DEFAULT_MODEL, LoadedModel, load_model
from fna.files import write_text
from fna.observing import AttentionCall
from fna.patching import find_attention_blocks, patch, unpatch
from fna.patching.attention import STATE
from fna.plan import MaskPlan, Plan, TokenRange, uniform_plan
from fna.samplers import landmark_bias, select_landmarks
from fna.special_tokens import LARGEST_SHARE, detect_prefix_tokens
from fna.token_survey import survey_tokens
from fna.validate.metrics import cosine

ATTENTIONS = ("exact", "FNA")
SAMPLERS = ("grid", "norm-grid", "fps")
CLUSTERS = 5
PLANTED_BLOCK = 5
PLANTED_TOKENS = 8
PLANTED_CHANNELS = (7, 77)
PLANTED_CONSTANT = 200.0
"""Some 100 times the norm of a token of DINOv2-S there; published massive tokens have their norm in few channels as well."""

DIGIT_SIDE = 84
DIGIT_LANDMARKS = 16

Photograph = tuple[str, Image.Image]


def quietly(_text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Smoothness:
    """One condition on one photograph.

    Attributes:
        attention: `exact` or `FNA`.
        mask: which tokens are masked and how.
        planted: whether massive tokens were planted.
        image: the photograph.
        masked_tokens: tokens masked, summed over the blocks.
        smoothness: share of neighbouring patches in one segment of a k-means segmentation of the final patch tokens.
        saliency_change: mean absolute difference of the map to exact, unmasked attention without planted tokens; None for models
            without a map.
        patch_cosine: mean cosine of the final patch tokens to the same reference.
    """

    attention: str
    mask: str
    planted: bool
    image: str
    masked_tokens: int
    smoothness: float
    saliency_change: float | None
    patch_cosine: float


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear probe on the digits held out; `masked_tokens` is per digit and block, on average."""

    planted: bool
    attention: str
    mask: str
    train: int
    test: int
    accuracy: float
    masked_tokens: float


@dataclass(frozen=True)
class LandmarkError:
    """FNA's error in single blocks for one choice of landmarks: relative 2-norm to exact attention on the same inputs, the mean."""

    landmarks: str
    planted: bool
    error: float
    artifacts_or_massive: int


@dataclass(frozen=True)
class GuidedPlan:
    """A whole model under a plan whose landmarks include or exclude tokens, the mean over photographs.

    Attributes:
        planted: whether massive tokens were planted.
        sampler: of the FNA blocks.
        landmarks: what they include or exclude, and what is masked.
        patch_cosine: mean cosine of the final patch tokens to exact, unmasked attention without planted tokens.
        class_cosine: of the final class token, likewise.
        same_cosine: as `patch_cosine`, but to exact attention with the same planted tokens: what FNA itself loses.
    """

    planted: bool
    sampler: str
    landmarks: str
    patch_cosine: float
    class_cosine: float
    same_cosine: float


def guided_plans(layers: str, *, alone: bool = False) -> dict[str, dict[str, Any]]:
    """What is compared, as fields of `Plan`: found at the first of the FNA blocks, or with `alone` in each of them."""
    blocks = [str(number) for number in parse_layers(layers, 1 << 10)] if alone else [layers]
    massive = tuple(TokenRange(blocks=part, tokens="massive") for part in blocks)
    artifacts = tuple(TokenRange(blocks=part, tokens="artifact") for part in blocks)
    masks = tuple(MaskPlan(blocks=part, tokens="massive") for part in blocks)
    rules: dict[str, dict[str, Any]] = {
        "massive included": {"landmarks_include": massive},
        "artifacts excluded": {"landmarks_exclude": artifacts},
        "both": {"landmarks_include": massive, "landmarks_exclude": artifacts},
    }
    if alone:
        return {f"{name}, found in each block": rule for name, rule in rules.items()}
    masked = {"masks": masks}
    return {
        "none": {},
        **rules,
        "massive masked": masked,
        "massive masked and excluded": {**masked, "landmarks_exclude": massive},
    }


def mask_plans(num_blocks: int) -> dict[str, tuple[MaskPlan, ...]]:
    """The masks that are compared: each block masks the tokens that it finds itself."""
    plans: dict[str, tuple[MaskPlan, ...]] = {"none": ()}
    for tokens, sink in itertools.product(("artifact", "massive"), (False, True)):
        plans[f"{tokens}{', sinks' if sink else ''}"] = tuple(
            MaskPlan(blocks=str(block), tokens=tokens, sink=sink) for block in range(num_blocks)
        )
    return plans


def segmentation_smoothness(
    patches: NDArray[np.float32],  # [rows * columns, C]
    grid: tuple[int, int],
    clusters: int = CLUSTERS,
) -> float:
    """Share of pairs of neighbouring patches (above, below, left, right) in the same cluster of a seeded k-means.

    Tokens are normalised first, so that clusters are of directions.
    """
    from sklearn.cluster import KMeans

    directions = patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12)
    labels = KMeans(clusters, n_init=4, random_state=0).fit_predict(directions).reshape(grid)
    same = [labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]]
    return float(np.concatenate([pairs.ravel() for pairs in same]).mean())


@contextmanager
def planted(model: LoadedModel, active: bool) -> Iterator[None]:
    """Add a large constant to two channels of a few patch tokens' residual after a block, while the context lasts."""

    def add(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        count = min(PLANTED_TOKENS, hidden.shape[1] // LARGEST_SHARE)  # more would not be found
        tokens = torch.linspace(1, hidden.shape[1] - 1, count + 2).long()[1:-1]
        for channel in PLANTED_CHANNELS:
            hidden[:, tokens, channel] += PLANTED_CONSTANT
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    layer = find_attention_blocks(model.module)[PLANTED_BLOCK].layer
    handle = layer.register_forward_hook(add) if active else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def run_with_plan(model: LoadedModel, plan: Plan, pixels: Tensor) -> tuple[list[Tensor], int]:
    """Outputs under a plan, and how many tokens were masked in all blocks and items together."""
    states = [getattr(block.attention, STATE, None) for block in patch(model.module, plan)]
    masks = [state.masked for state in states if state is not None and state.masked is not None]
    try:
        with torch.inference_mode():
            outputs = list(model.module(pixels))
        return outputs, sum(int(mask.finder.mask.sum()) for mask in masks)
    finally:
        unpatch(model.module)


def describe(plan: str, mask: str, is_planted: bool) -> str:
    """A condition in words, for the progress."""
    return f"{plan}, {mask}{', planted' if is_planted else ''}"


def measure_photographs(
    model: LoadedModel, images: Sequence[Photograph], side: int, landmarks: int, say: Callable[[str], None] = quietly
) -> list[Smoothness]:
    """Segmentation smoothness, saliency change and token cosine of every condition on every photograph."""
    prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    token_output = model.output_names.index(model.token_outputs[0])
    map_output = model.output_names.index(model.map_outputs[0]) if model.map_outputs else None
    results = []
    for name, image in images:
        pixels = torch.from_numpy(model.preprocessing.apply(image, side, side))[None]
        reference: list[Tensor] | None = None
        for plant, attention, mask in itertools.product((False, True), ATTENTIONS, mask_plans(model.num_blocks)):
            say(f"{name}: {describe(attention, f'mask {mask}', plant)}")
            plan = masked_plan(model, attention, mask, landmarks)
            with planted(model, plant):
                outputs, counted = run_with_plan(model, plan, pixels)
            reference = outputs if reference is None else reference
            patches, wanted = (tensors[token_output][0, prefix:].numpy() for tensors in (outputs, reference))
            change = None
            if map_output is not None:
                change = float((outputs[map_output] - reference[map_output]).abs().mean())
            smoothness = segmentation_smoothness(patches, (side // model.patch_size,) * 2)
            near = float(cosine(wanted.astype(np.float64), patches.astype(np.float64)).mean())
            results.append(Smoothness(attention, mask, plant, name, counted, smoothness, change, near))
    return results


def masked_plan(model: LoadedModel, attention: str, mask: str, landmarks: int) -> Plan:
    """The plan of one condition: exact attention, or FNA in the later half, with masks of `mask_plans`."""
    layers = "none" if attention == "exact" else None
    masks = mask_plans(model.num_blocks)[mask]
    return uniform_plan(model.num_blocks, layers=layers, landmarks=landmarks, masks=masks)


def measure_digits(
    model: LoadedModel,
    count: int,
    attentions: Sequence[str] = ATTENTIONS,
    only_masks: Sequence[str] | None = None,
    say: Callable[[str], None] = quietly,
) -> list[Probe]:
    """Accuracy of a logistic regression on the class token, half of the digits held out.

    Args:
        model: from `fna.export.sources.loading.load_model`.
        count: how many digits.
        attentions: `exact`, `FNA` or both.
        only_masks: labels of `mask_plans`; None is all.
        say: called with what is being done.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.images))[:count]
    images = [Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).convert("RGB") for i in chosen]
    pixels = torch.from_numpy(np.stack([model.preprocessing.apply(i, DIGIT_SIDE, DIGIT_SIDE) for i in images]))
    labels, half = digits.target[chosen], count // 2
    token_output = model.output_names.index(model.token_outputs[0])
    masks = [mask for mask in mask_plans(model.num_blocks) if only_masks is None or mask in only_masks]
    results = []
    for plant, attention, mask in itertools.product((False, True), attentions, masks):
        say(f"digits: {describe(attention, f'mask {mask}', plant)}")
        plan = masked_plan(model, attention, mask, DIGIT_LANDMARKS)
        with planted(model, plant):
            parts = [run_with_plan(model, plan, batch) for batch in pixels.split(32)]
        features = torch.cat([outputs[token_output][:, 0] for outputs, _ in parts]).numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features[:half], labels[:half])
        masked = sum(counted for _, counted in parts) / (count * model.num_blocks)
        accuracy = float(probe.score(features[half:], labels[half:]))
        results.append(Probe(plant, attention, mask, half, count - half, accuracy, masked))
    return results


def measure_landmarks(
    model: LoadedModel, images: Sequence[Photograph], side: int, landmarks: int
) -> list[LandmarkError]:
    """FNA's error in the later half of the blocks: the plain grid, massive tokens guaranteed, artifact tokens excluded."""
    prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    errors: dict[tuple[bool, str], list[float]] = {}
    counts: dict[tuple[bool, str], int] = {}
    for plant, (_, image) in itertools.product((False, True), images):
        pixels = torch.from_numpy(model.preprocessing.apply(image, side, side))[None]
        calls: list[AttentionCall] = []
        with planted(model, plant):
            blocks = survey_tokens(model.module, lambda p=pixels: model.module(p), observe=calls.append)  # type: ignore[misc]
        by_block = {tokens.block: tokens for tokens in blocks}
        for call in calls[model.num_blocks // 2 :]:
            artifacts = by_block[call.block].artifacts
            massive = by_block[call.block - 1].massive  # what enters this block
            choices: dict[str, dict[str, Tensor]] = {"grid": {}, "massive guaranteed": {"guarantee": massive}}
            if artifacts is not None:
                choices["artifacts excluded"] = {"exclude": artifacts}
            for name, masks in choices.items():
                key = (plant, name)
                counts[key] = counts.get(key, 0) + sum(int(tokens.sum()) for tokens in masks.values())
                errors.setdefault(key, []).append(_error_of_choice(call, landmarks, prefix, masks))
    return [
        LandmarkError(name, plant, float(np.mean(errors[plant, name])), counts[plant, name]) for plant, name in errors
    ]


def _error_of_choice(call: AttentionCall, landmarks: int, prefix: int, masks: dict[str, Tensor]) -> float:
    num_tokens = call.query.shape[2]
    chosen = select_landmarks(call.query.mean(1), landmarks, method="grid", prefix_tokens=prefix, **masks)
    bias = landmark_bias(num_tokens, landmarks, prefix_tokens=prefix)
    own = masks.get("guarantee", torch.zeros(1, num_tokens, dtype=torch.bool)).clone()
    own[:, :prefix] = True
    if (
        int(own.sum()) > prefix
    ):  # guaranteed tokens stand for themselves, as the prefix tokens do; the rest share the others
        alone = own.gather(1, chosen.long())
        weight = (num_tokens - alone.sum(1, keepdim=True)) / (landmarks - alone.sum(1, keepdim=True)).clamp(min=1)
        bias = torch.where(alone, 0.0, weight.log())
    out = fast_nystrom_attention(
        call.query, call.key, call.value, chosen, landmark_bias=bias, scale=call.scale, exact_rows=True
    )
    return float((out - call.out).norm() / call.out.norm())


def measure_guided(
    model: LoadedModel, images: Sequence[Photograph], side: int, landmarks: int, say: Callable[[str], None] = quietly
) -> list[GuidedPlan]:
    """The final tokens of the whole model, the later half of the blocks FNA, under every condition of `guided_plans`."""
    layers = f"{model.num_blocks // 2}-{model.num_blocks - 1}"
    prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    token_output = model.output_names.index(model.token_outputs[0])
    dense = uniform_plan(model.num_blocks, layers="none")
    cosines: dict[tuple[bool, str, str], list[tuple[float, float, float]]] = {}
    for name, image in images:
        pixels = torch.from_numpy(model.preprocessing.apply(image, side, side))[None]

        def final(plan: Plan, pixels: Tensor = pixels) -> NDArray[np.float64]:
            return run_with_plan(model, plan, pixels)[0][token_output][0].numpy().astype(np.float64)

        reference = final(dense)
        for plant in (False, True):
            with planted(model, plant):
                same = final(dense)
                for sampler in SAMPLERS:
                    rules = guided_plans(layers) | (guided_plans(layers, alone=True) if sampler == "grid" else {})
                    for label, fields in rules.items():
                        say(f"{name}: {describe(sampler, label, plant)}")
                        plan = uniform_plan(
                            model.num_blocks, layers=layers, landmarks=landmarks, sampler=sampler, **fields
                        )
                        out = final(plan)
                        near, own = cosine(reference, out), cosine(same, out)
                        values = (float(near[prefix:].mean()), float(near[0]), float(own[prefix:].mean()))
                        cosines.setdefault((plant, sampler, label), []).append(values)
    return [GuidedPlan(*condition, *np.mean(values, axis=0).tolist()) for condition, values in cosines.items()]


def write_table(titles: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; no lines where there are no rows."""
    if not rows:
        return []
    return [titles, "|---" * len(rows[0]) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def write_report(
    smoothness: Sequence[Smoothness],
    probes: Sequence[Probe],
    choices: Sequence[LandmarkError],
    guided: Sequence[GuidedPlan] = (),
) -> str:
    """The results as Markdown tables, means over the photographs."""
    which = {False: "as they are", True: "planted"}
    rows = []
    for key in dict.fromkeys((row.planted, row.attention, row.mask) for row in smoothness):
        same = [row for row in smoothness if (row.planted, row.attention, row.mask) == key]
        changes = [row.saliency_change for row in same if row.saliency_change is not None]
        rows.append([
            which[key[0]], key[1], key[2], str(sum(row.masked_tokens for row in same)),
            f"{np.mean([row.smoothness for row in same]):.4f}", f"{np.mean(changes):.5f}" if changes else "",
            f"{np.mean([row.patch_cosine for row in same]):.5f}",
        ])  # fmt: skip
    return "\n".join([
        *write_table(
            "| tokens | attention | masked | tokens masked | smoothness | saliency change | patch cosine |", rows
        ),
        *write_table(
            "| tokens | attention | masked | tokens masked per digit and block | digits named |",
            [
                [which[p.planted], p.attention, p.mask, f"{p.masked_tokens:.3f}", f"{p.accuracy:.3f} of {p.test}"]
                for p in probes
            ],
        ),
        *write_table(
            "| tokens | landmarks | tokens guaranteed or excluded | relative error in one block |",
            [[which[c.planted], c.landmarks, str(c.artifacts_or_massive), f"{c.error:.4f}"] for c in choices],
        ),
        *write_table(
            "| tokens | sampler | landmarks | patch cosine | class token | patch cosine to exact attention on the same tokens |",
            [
                [which[g.planted], g.sampler, g.landmarks]
                + [f"{value:.5f}" for value in (g.patch_cosine, g.class_cosine, g.same_cosine)]
                for g in guided
            ],
        ),
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.masking", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--images", type=Path, help="folder of photographs; five bundled ones by default")
    parser.add_argument("--count", type=int, help="use only so many of them")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--landmarks", type=int, default=64, help="of the FNA blocks, which are the later half")
    parser.add_argument("--digits", type=int, default=400, help="how many digits; 0 leaves the probe out")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only-digits", action="store_true")
    only.add_argument("--only-landmarks", action="store_true", help="plans that include and exclude landmarks, only")
    parser.add_argument("--attention", choices=ATTENTIONS, help="of the digits' probe; both by default")
    parser.add_argument(
        "--mask", action="append", help="of the digits' probe, as in the tables; all by default; repeatable"
    )
    parser.add_argument("--json", type=Path, dest="json_file", help="write every number as JSON")
    settings = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        model = load_model(settings.model)
        images = bundled_photographs() if settings.images is None else load_images(settings.images)[0]
        where = (model, images[: settings.count], settings.resolution, settings.landmarks)
        guided = [] if settings.only_digits else measure_guided(*where, say)
        has_all = not (settings.only_digits or settings.only_landmarks)
        smoothness = measure_photographs(*where, say) if has_all else []
        choices = measure_landmarks(*where) if has_all else []
        attentions = (settings.attention,) if settings.attention else ATTENTIONS
        has_digits = settings.digits and not settings.only_landmarks
        probes = measure_digits(model, settings.digits, attentions, settings.mask, say) if has_digits else []
        if settings.json_file is not None:
            results = {"photographs": smoothness, "digits": probes, "landmarks": choices, "guided": guided}
            numbers = {name: [asdict(row) for row in rows] for name, rows in results.items()}  # type: ignore[attr-defined]
            write_text(settings.json_file, json.dumps(numbers, indent=1) + "\n")
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(write_report(smoothness, probes, choices, guided))
    return 0


if __name__ == "__main__":
    sys.exit(main())
