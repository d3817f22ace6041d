"""From photographs to the tensor that a model was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from fna.errors import InputFileError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


class Preprocessing(BaseModel):
    """How an image becomes `pixel_values`: resize to a square, scale to 0..1, normalise per channel.

    Attributes:
        mean: subtracted per channel (RGB), after scaling to 0..1.
        std: divided by, per channel.
        resize: the resampling filter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resize: str = "bicubic"

    def apply(self, image: Image.Image, height: int, width: int) -> NDArray[np.float32]:  # [3, height, width]
        """Resize and normalise one image."""
        resized = image.convert("RGB").resize((width, height), Image.Resampling[self.resize.upper()])
        pixels = np.asarray(resized, dtype=np.float32) / 255.0
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def bundled_photographs() -> list[tuple[str, Image.Image]]:
    """Return the photographs that scikit-image and scikit-learn carry in their packages, by name; no network is used."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    images = [(name, getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")]
    images += [(name, load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    return [(name, Image.fromarray(pixels)) for name, pixels in images]


def load_images(folder: Path) -> tuple[list[tuple[str, Image.Image]], list[str]]:
    """Read every image in a folder, sorted by name.

    Returns:
        The images by file name, and a line for each image file that could not be read.

    Raises:
        InputFileError: if the folder does not exist or holds no readable image.
    """
    if not folder.is_dir():
        raise InputFileError(f"image folder {folder} does not exist; give a folder of photographs")
    images: list[tuple[str, Image.Image]] = []
    skipped: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        try:
            with Image.open(path) as opened:
                images.append((path.name, opened.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            skipped.append(f"{path.name}: {error}")
    if not images:
        detail = f" ({len(skipped)} could not be read, first: {skipped[0]})" if skipped else ""
        raise InputFileError(f"no readable image in {folder}{detail}; supported: {' '.join(IMAGE_SUFFIXES)}")
    return images, skipped
