"""From photographs to the tensor that a model was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from fna.errors import InputFileError, describe_validation_error

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


_RESAMPLING = {"0": "nearest", "1": "lanczos", "2": "bilinear", "3": "bicubic", "4": "box", "5": "hamming"}  # PIL's

VIEW = 0.75
"""Of the width of a photograph, what one frame of a scene shows."""

_Mean = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)]
_Std = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class Preprocessing(BaseModel):
    """How an image becomes `pixel_values`: resize to a square, rescale (usually to 0..1), normalise per channel.

    Attributes:
        mean: subtracted per channel (RGB), after rescaling.
        std: divided by, per channel.
        resize: the resampling filter.
        rescale: factor on the bytes 0..255, before mean and std.
        frames: for models that take several images of a scene at once, how many; None for those that take one. A photograph then
            stands for a scene: its frames are views of it, each `VIEW` of its width, from its left end to its right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)
    resize: Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"] = "bicubic"
    rescale: float = Field(default=1 / 255, gt=0, le=1, allow_inf_nan=False)

    frames: int | None = Field(default=None, ge=1, le=4096)

    @model_serializer(mode="wrap")
    def _leave_out_what_older_versions_have_not(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if self.frames is None:
            fields.pop("frames", None)
        return fields

    def apply(
        self, image: Image.Image, height: int, width: int
    ) -> NDArray[np.float32]:  # [3, height, width] or [frames, 3, height, width]
        """Resize and normalise one image, or the views of it that stand for a scene."""
        if self.frames is None:
            return self._apply_once(image, height, width)
        view = max(1, round(VIEW * image.width))
        lefts = np.linspace(0, image.width - view, self.frames).round().astype(int)
        views = [image.crop((left, 0, left + view, image.height)) for left in lefts.tolist()]
        return np.stack([self._apply_once(shown, height, width) for shown in views])

    def _apply_once(self, image: Image.Image, height: int, width: int) -> NDArray[np.float32]:  # [3, height, width]
        resized = image.convert("RGB").resize((width, height), Image.Resampling[self.resize.upper()])
        pixels = np.asarray(resized, dtype=np.float32) * np.float32(self.rescale)
        normalised = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1), dtype=np.float32)


def parse_preprocessor(text: str, name: str) -> Preprocessing:
    """Read the settings of a transformers image processor, `preprocessor_config.json` or `processor_config.json`.

    Settings that the file does not give are ImageNet's mean and standard deviation, bytes scaled to 0..1, bicubic.

    Args:
        text: the file's JSON.
        name: says in errors where it came from.

    Raises:
        InputFileError: if it is not JSON, or a number in it is missing or out of range; the message names the key.
    """
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise InputFileError(f"{name} is not JSON: {error}; save the image processor again") from None
    if isinstance(settings, dict):
        settings = settings.get("image_processor", settings)
    if not isinstance(settings, dict):
        raise InputFileError(f"{name} holds a {type(settings).__name__}, but a JSON object of settings is needed")
    values: dict[str, Any] = {"rescale": 1.0} if settings.get("do_rescale") is False else {}
    if settings.get("do_normalize") is False:
        values.update(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std"), ("rescale", "rescale_factor")):
        if settings.get(theirs) is not None:
            values.setdefault(ours, settings[theirs])
    if settings.get("resample") is not None:
        values["resize"] = _RESAMPLING.get(str(settings["resample"]), settings["resample"])
    try:
        return Preprocessing(**values)
    except ValidationError as error:
        raise InputFileError(describe_validation_error(name, error)) from None


def bundled_photographs() -> list[tuple[str, Image.Image]]:
    """Return the photographs that scikit-image and scikit-learn carry in their packages, by name; no network is used."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    images = [(name, getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")]
    images += [(name, load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    return [(name, Image.fromarray(pixels)) for name, pixels in images]


def views_of(image: Image.Image) -> list[Image.Image]:
    """Return an image and its four quarters: more of what a model may see than the image alone has."""
    width, height = image.size
    columns, rows = (0, width // 2, width), (0, height // 2, height)
    boxes = [(columns[i], rows[j], columns[i + 1], rows[j + 1]) for j in range(2) for i in range(2)]
    return [image, *(image.crop(box) for box in boxes if box[0] < box[2] and box[1] < box[3])]


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
