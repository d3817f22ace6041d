"""What tolerances of bundles in 8 bits come from: `python -m studies.task_tolerances FILE --types int8 fp8 --digits SMALL`.

FILE is an fp32 file of `fna export`, calibrated on the bundled photographs and run on those of `studies.eight_bits` that nothing was
chosen on. SMALL is one for 98 pixels. Prints the worst photograph for each measure of `fna.engines.bundle.tolerances`: of the outputs,
of the class token, and of the scores of a linear probe on handwritten digits, half of which trained it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fna.engines.bundle.tolerances import measure
from fna.export.metadata import read_metadata
from fna.export.passes.eight_bit import EIGHT_BIT
from fna.export.passes.quantize import quantize_model
from fna.export.preprocessing import bundled_photographs
from fna.export.variants import image_size
from fna.files import load_onnx
from fna.runtime import Arrays, open_session, run_session
from studies.eight_bits import unseen_photographs

DIGITS = 240


Pair = tuple[Arrays, Arrays]
"""Outputs of a file, and of what it becomes in 8 bits."""


def both_outputs(
    file: Path, kinds: Sequence[str], calibration: Sequence[Image.Image], images: Sequence[Image.Image]
) -> list[Pair]:
    """Run both files on each image; the class token is an output beside the file's own."""
    model = load_onnx(file)
    metadata = read_metadata(model, str(file))
    size = image_size(model, metadata, None)
    seen = [metadata.preprocessing.apply(image, *size)[None] for image in calibration]
    quantized = quantize_model(model, seen, kinds=[EIGHT_BIT[name] for name in kinds]).model
    sessions = [open_session(each) for each in (model, quantized)]
    pairs = []
    for image in images:
        pixels = metadata.preprocessing.apply(image, *size)[None]
        exact, other = (run_session(session, {session.get_inputs()[0].name: pixels}) for session in sessions)
        for arrays in (exact, other):
            arrays["class token"] = arrays[metadata.token_outputs[0]][:, 0]
        pairs.append((exact, other))
    return pairs


def probe_scores(exact: NDArray[np.float32], other: NDArray[np.float32], truth: NDArray[np.int64]) -> list[Arrays]:
    """Scores `[M, 10]` of the half that trained nothing, by features `[M, C]` of both files."""
    half = len(exact) // 2
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, C=0.1)).fit(exact[:half], truth[:half])
    scores = [head.decision_function(features[half:]).astype(np.float32) for features in (exact, other)]
    exact_classes, classes = (array.argmax(axis=1) for array in scores)
    accuracies = [float((found == truth[half:]).mean()) for found in (exact_classes, classes)]
    print(f"probe: accuracies {accuracies}, one class in {(exact_classes == classes).mean():.3f}")
    return [{"logits": array} for array in scores]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--types", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--digits", type=Path)
    arguments = parser.parse_args()
    bundled = [image for _, image in bundled_photographs()]
    for kind in arguments.types:
        pairs = both_outputs(arguments.file, kind.split("+"), bundled, unseen_photographs())
        for name in pairs[0][0]:
            found = [measure(exact[name], other[name]) for exact, other in pairs]
            worst = {
                each: (max if each in ("relative_l2", "regret") else min)(f[each] for f in found) for each in found[0]
            }
            print(f"{kind}, {name}: " + ", ".join(f"{each} {value:.6f}" for each, value in worst.items()), flush=True)
        if arguments.digits:
            bunch = load_digits()
            images = [Image.fromarray((array * 255 / 16).astype(np.uint8)) for array in bunch.images[:DIGITS]]
            pairs = both_outputs(arguments.digits, kind.split("+"), images[:5], images)
            tokens = [np.concatenate([pair[n]["class token"] for pair in pairs]) for n in (0, 1)]
            exact, other = probe_scores(tokens[0], tokens[1], bunch.target[:DIGITS])
            regrets = [
                measure(e[None], o[None])["regret"] for e, o in zip(exact["logits"], other["logits"], strict=True)
            ]
            print(
                f"{kind}, scores: regret of the worst {max(regrets):.4f}, 95th percentile {np.percentile(regrets, 95):.4f}"
            )


if __name__ == "__main__":
    main()
