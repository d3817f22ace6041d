"""What masking massive and artifact tokens changes on real weights: `python -m studies.masking`.

Exact attention and FNA, without a mask, with masked keys and with sinks, on photographs: how smooth a k-means segmentation of the
patch tokens is, and how far the saliency map and the tokens move; on scikit-learn's digits: a linear probe of the class token.
The same with massive tokens planted into the residual stream, for models that have none; and what it does to FNA to have
massive tokens guaranteed as landmarks, or artifact tokens excluded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fna.attention import fast_nystrom_attention
from fna.errors import FnaError
from fna.export.preprocessing import bundled_photographs, load_images
from fna.export.sources.loading import DEFAULT_MODEL, LoadedModel, load_model
from fna.files import write_text
from fna.observing import AttentionCall
from fna.patching import find_attention_blocks, patch, unpatch
from fna.plan import MaskPlan, Plan, TokenRange, parse_layers, uniform_plan
from fna.samplers import landmark_bias, select_landmarks
from fna.special_tokens import LARGEST_SHARE, detect_prefix_tokens
from fna.token_survey import survey_tokens
from fna.validate.metrics import cosine

ATTENTIONS = ("exact", "FNA")
CLUSTERS = 5
PLANTED_BLOCK = 5
PLANTED_TOKENS = 8
PLANTED_CHANNELS = (7, 77)
PLANTED_CONSTANT = 200.0
"""Some 100 times the norm of a token of DINOv2-S there; published massive tokens have their norm in few channels as well."""

DIGIT_SIDE = 84
DIGIT_LANDMARKS = 16


class Smoothness(BaseModel):
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

    model_config = ConfigDict(frozen=True)

    attention: str
    mask: str
    planted: bool
    image: str
    masked_tokens: int
    smoothness: float
    saliency_change: float | None
    patch_cosine: float


class Probe(BaseModel):
    """Accuracy of a linear probe on the digits held out.

    Attributes:
        planted: whether massive tokens were planted.
        attention: `exact` or `FNA`.
        mask: which tokens are masked and how.
        train: digits that it was trained on.
        test: digits that it was tested on.
        accuracy: share of the latter that it names.
        masked_tokens: tokens masked per digit and block, on average.
    """

    model_config = ConfigDict(frozen=True)

    planted: bool
    attention: str
    mask: str
    train: int
    test: int
    accuracy: float
    masked_tokens: float


class LandmarkChoice(BaseModel):
    """FNA's error in single blocks for one choice of landmarks: relative 2-norm to exact attention on the same inputs, the mean."""

    model_config = ConfigDict(frozen=True)

    landmarks: str
    planted: bool
    error: float
    artifacts_or_massive: int


class GuidedPlan(BaseModel):
    """A whole model under a plan whose landmarks include or exclude tokens, the mean over photographs.

    Attributes:
        planted: whether massive tokens were planted.
        sampler: of the FNA blocks.
        landmarks: what they include or exclude, and what is masked.
        patch_cosine: mean cosine of the final patch tokens to exact, unmasked attention without planted tokens.
        class_cosine: of the final class token, likewise.
        same_cosine: as `patch_cosine`, but to exact attention with the same planted tokens: what FNA itself loses.
    """

    model_config = ConfigDict(frozen=True)

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
    return {
        "none": {},
        **rules,
        "massive masked": {"masks": masks},
        "massive masked and excluded": {"masks": masks, "landmarks_exclude": massive},
    }


def mask_plans(num_blocks: int) -> dict[str, tuple[MaskPlan, ...]]:
    """The masks that are compared: each block masks the tokens that it finds itself."""
    plans: dict[str, tuple[MaskPlan, ...]] = {"none": ()}
    for tokens in ("artifact", "massive"):
        for sink in (False, True):
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
    if not active:
        yield
        return
    layer = find_attention_blocks(model.module)[PLANTED_BLOCK].layer

    def add(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        count = min(PLANTED_TOKENS, hidden.shape[1] // LARGEST_SHARE)  # more would not be found
        tokens = torch.linspace(1, hidden.shape[1] - 1, count + 2).long()[1:-1]
        for channel in PLANTED_CHANNELS:
            hidden[:, tokens, channel] += PLANTED_CONSTANT
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def run_with_plan(model: LoadedModel, plan: Plan, pixels: Tensor) -> tuple[list[Tensor], int]:
    """Outputs under a plan, and how many tokens were masked in all blocks and items together."""
    counted = 0
    blocks = patch(model.module, plan)
    states = [vars(block.attention).get("_fna_mask") for block in blocks]
    finders = [state.tokens.finder for state in states if state is not None and state.tokens.finder is not None]
    try:
        with torch.inference_mode():
            outputs = list(model.module(pixels))
        counted = sum(int(finder.mask.sum()) for finder in finders)
    finally:
        unpatch(model.module)
    return outputs, counted


def measure_photographs(
    model: LoadedModel,
    images: Sequence[tuple[str, Image.Image]],
    side: int,
    landmarks: int,
    *,
    say: Callable[[str], None] = lambda _text: None,
) -> list[Smoothness]:
    """Segmentation smoothness, saliency change and token cosine of every condition on every photograph."""
    grid = (side // model.patch_size,) * 2
    prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    token_output = model.output_names.index(model.token_outputs[0])
    map_output = model.output_names.index(model.map_outputs[0]) if model.map_outputs else None
    results = []
    for name, image in images:
        pixels = torch.from_numpy(model.preprocessing.apply(image, side, side))[None]
        reference: list[Tensor] | None = None
        for plant in (False, True):
            for attention in ("exact", "FNA"):
                for label, masks in mask_plans(model.num_blocks).items():
                    say(f"{name}: {attention}, mask {label}{', planted' if plant else ''}")
                    layers = "none" if attention == "exact" else None
                    plan = uniform_plan(model.num_blocks, layers=layers, landmarks=landmarks, masks=masks)
                    with planted(model, plant):
                        outputs, counted = run_with_plan(model, plan, pixels)
                    reference = outputs if reference is None else reference
                    patches, wanted = (o[token_output][0, prefix:].numpy() for o in (outputs, reference))
                    change = None
                    if map_output is not None:
                        change = float((outputs[map_output] - reference[map_output]).abs().mean())
                    results.append(
                        Smoothness(
                            attention=attention,
                            mask=label,
                            planted=plant,
                            image=name,
                            masked_tokens=counted,
                            smoothness=segmentation_smoothness(patches, grid),
                            saliency_change=change,
                            patch_cosine=float(cosine(wanted.astype(np.float64), patches.astype(np.float64)).mean()),
                        )
                    )
    return results


def measure_digits(
    model: LoadedModel,
    count: int,
    *,
    attentions: Sequence[str] = ATTENTIONS,
    only_masks: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda _text: None,
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
    from sklearn.preprocessing import StandardScaler

    digits = load_digits()
    chosen = np.random.default_rng(0).permutation(len(digits.images))[:count]
    images = [Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).convert("RGB") for i in chosen]
    pixels = torch.from_numpy(np.stack([model.preprocessing.apply(i, DIGIT_SIDE, DIGIT_SIDE) for i in images]))
    labels, half = digits.target[chosen], count // 2
    token_output = model.output_names.index(model.token_outputs[0])
    results = []
    conditions = [
        (plant, attention, label, masks)
        for plant in (False, True)
        for attention in attentions
        for label, masks in mask_plans(model.num_blocks).items()
        if only_masks is None or label in only_masks
    ]
    for plant, attention, label, masks in conditions:
        say(f"digits: {attention}, mask {label}{', planted' if plant else ''}")
        layers = "none" if attention == "exact" else None
        plan = uniform_plan(model.num_blocks, layers=layers, landmarks=DIGIT_LANDMARKS, masks=masks)
        with planted(model, plant):
            parts = [run_with_plan(model, plan, batch) for batch in pixels.split(32)]
        features = torch.cat([outputs[token_output][:, 0] for outputs, _ in parts]).numpy()
        scaler = StandardScaler().fit(features[:half])
        probe = LogisticRegression(max_iter=2000).fit(scaler.transform(features[:half]), labels[:half])
        results.append(
            Probe(
                planted=plant,
                attention=attention,
                mask=label,
                train=half,
                test=count - half,
                accuracy=float(probe.score(scaler.transform(features[half:]), labels[half:])),
                masked_tokens=sum(masked for _, masked in parts) / (count * model.num_blocks),
            )
        )
    return results


def measure_landmarks(
    model: LoadedModel, images: Sequence[tuple[str, Image.Image]], side: int, landmarks: int
) -> list[LandmarkChoice]:
    """FNA's error in the later half of the blocks: the plain grid, massive tokens guaranteed, artifact tokens excluded."""
    prefix = detect_prefix_tokens(find_attention_blocks(model.module)[0].tower)
    results = []
    for plant in (False, True):
        errors: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        for _, image in images:
            pixels = torch.from_numpy(model.preprocessing.apply(image, side, side))[None]
            calls: list[AttentionCall] = []
            with planted(model, plant):
                found = survey_tokens(model.module, lambda p=pixels: model.module(p), observe=calls.append)  # type: ignore[misc]
            by_block = {entry.block: entry for entry in found}
            for call in calls[model.num_blocks // 2 :]:
                query, key, value = call.query, call.key, call.value
                artifacts = by_block[call.block].artifacts
                massive = by_block[call.block - 1].massive  # what enters this block
                choices: dict[str, dict[str, Tensor]] = {"grid": {}, "massive guaranteed": {"guarantee": massive}}
                if artifacts is not None:
                    choices["artifacts excluded"] = {"exclude": artifacts}
                for name, masks in choices.items():
                    for tokens in masks.values():
                        counts[name] = counts.get(name, 0) + int(tokens.sum())
                    chosen = select_landmarks(
                        query.mean(1),
                        landmarks,
                        method="grid",
                        prefix_tokens=prefix,
                        **masks,
                    )
                    own = masks.get("guarantee", torch.zeros_like(massive)).clone()
                    own[:, :prefix] = True
                    bias = _bias(chosen, own, query.shape[2], prefix, landmarks)
                    out = fast_nystrom_attention(
                        query, key, value, chosen, landmark_bias=bias, scale=call.scale, exact_rows=True
                    )
                    errors.setdefault(name, []).append(float((out - call.out).norm() / call.out.norm()))
        results += [
            LandmarkChoice(
                landmarks=name, planted=plant, error=float(np.mean(values)), artifacts_or_massive=counts.get(name, 0)
            )
            for name, values in errors.items()
        ]
    return results


def measure_guided(
    model: LoadedModel,
    images: Sequence[tuple[str, Image.Image]],
    side: int,
    landmarks: int,
    *,
    samplers: Sequence[str] = ("grid", "norm-grid", "fps"),
    say: Callable[[str], None] = lambda _text: None,
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
                for sampler in samplers:
                    rules = guided_plans(layers) | (guided_plans(layers, alone=True) if sampler == "grid" else {})
                    for label, fields in rules.items():
                        say(f"{name}: {sampler}, {label}{', planted' if plant else ''}")
                        plan = uniform_plan(
                            model.num_blocks, layers=layers, landmarks=landmarks, sampler=sampler, **fields
                        )
                        out = final(plan)
                        near, own = cosine(reference, out), cosine(same, out)
                        values = (float(near[prefix:].mean()), float(near[0]), float(own[prefix:].mean()))
                        cosines.setdefault((plant, sampler, label), []).append(values)
    results = []
    for (plant, method, label), found in cosines.items():
        patch_cosine, class_cosine, same_cosine = np.mean(found, axis=0)
        results.append(
            GuidedPlan(
                planted=plant,
                sampler=method,
                landmarks=label,
                patch_cosine=patch_cosine,
                class_cosine=class_cosine,
                same_cosine=same_cosine,
            )
        )
    return results


def _bias(chosen: Tensor, own: Tensor, num_tokens: int, prefix: int, landmarks: int) -> Tensor:
    """Guaranteed tokens stand for themselves, as the prefix tokens do; the rest share the others equally."""
    if int(own.sum()) == prefix:
        return landmark_bias(num_tokens, landmarks, prefix_tokens=prefix)
    alone = own.gather(1, chosen.long())
    weight = (num_tokens - alone.sum(1, keepdim=True)) / (landmarks - alone.sum(1, keepdim=True)).clamp(min=1)
    return torch.where(alone, 0.0, weight.log())


def _which(is_planted: bool) -> str:
    return "planted" if is_planted else "as they are"


def write_report(
    smoothness: Sequence[Smoothness],
    probes: Sequence[Probe],
    choices: Sequence[LandmarkChoice],
    guided: Sequence[GuidedPlan] = (),
) -> str:
    """The results as Markdown tables, means over the photographs."""
    lines: list[str] = []
    if smoothness:
        lines += [
            "| tokens | attention | masked | tokens masked | smoothness | saliency change | patch cosine |",
            "|---" * 7 + "|",
        ]
        for key in dict.fromkeys((r.planted, r.attention, r.mask) for r in smoothness):
            rows = [r for r in smoothness if (r.planted, r.attention, r.mask) == key]
            changes = [r.saliency_change for r in rows if r.saliency_change is not None]
            cells = [_which(key[0]), key[1], key[2], str(sum(r.masked_tokens for r in rows))]
            cells += [f"{np.mean([r.smoothness for r in rows]):.4f}", f"{np.mean(changes):.5f}" if changes else ""]
            lines.append("| " + " | ".join([*cells, f"{np.mean([r.patch_cosine for r in rows]):.5f}"]) + " |")
        lines.append("")
    if probes:
        lines += [
            "| tokens | attention | masked | tokens masked per digit and block | digits named |",
            "|---" * 5 + "|",
        ]
        for p in probes:
            lines.append(
                f"| {_which(p.planted)} | {p.attention} | {p.mask} | {p.masked_tokens:.3f} | {p.accuracy:.3f} of {p.test} |"
            )
        lines.append("")
    if choices:
        lines += [
            "| tokens | landmarks | tokens guaranteed or excluded | relative error in one block |",
            "|---|---|---|---|",
        ]
        for choice in choices:
            lines.append(
                f"| {_which(choice.planted)} | {choice.landmarks} | {choice.artifacts_or_massive} | {choice.error:.4f} |"
            )
        lines.append("")
    if guided:
        lines += [
            "| tokens | sampler | landmarks | patch cosine | class token | patch cosine to exact attention on the same tokens |",
            "|---" * 6 + "|",
        ]
        for row in guided:
            numbers = " | ".join(f"{value:.5f}" for value in (row.patch_cosine, row.class_cosine, row.same_cosine))
            lines.append(f"| {_which(row.planted)} | {row.sampler} | {row.landmarks} | {numbers} |")
    return "\n".join(lines)


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
    arguments = parser.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        model = load_model(arguments.model)
        images = bundled_photographs() if arguments.images is None else load_images(arguments.images)[0]
        images = images[: arguments.count]
        smoothness, choices, guided = [], [], []
        if not arguments.only_digits:
            guided = measure_guided(model, images, arguments.resolution, arguments.landmarks, say=say)
        if not (arguments.only_digits or arguments.only_landmarks):
            smoothness = measure_photographs(model, images, arguments.resolution, arguments.landmarks, say=say)
            choices = measure_landmarks(model, images, arguments.resolution, arguments.landmarks)
        probes = []
        if arguments.digits and not arguments.only_landmarks:
            attentions = (arguments.attention,) if arguments.attention else ATTENTIONS
            probes = measure_digits(model, arguments.digits, attentions=attentions, only_masks=arguments.mask, say=say)
        if arguments.json_file is not None:
            answer = _Everything(
                photographs=tuple(smoothness), digits=tuple(probes), landmarks=tuple(choices), guided=tuple(guided)
            )
            write_text(arguments.json_file, answer.model_dump_json(indent=1) + "\n")
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(write_report(smoothness, probes, choices, guided))
    return 0


class _Everything(BaseModel):
    """What --json has."""

    photographs: tuple[Smoothness, ...]
    digits: tuple[Probe, ...]
    landmarks: tuple[LandmarkChoice, ...]
    guided: tuple[GuidedPlan, ...]


if __name__ == "__main__":
    sys.exit(main())
