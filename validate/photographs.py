"""The images that a model is validated on, with their labels where there are any."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fna.errors import InputFileError
from fna.export.preprocessing import IMAGE_SUFFIXES, bundled_photographs, load_images


@dataclass(frozen=True)
class Photographs:
    """Images by name.

    Attributes:
        images: names and images; in class folders the name is `class/file`.
        skipped: a line for each image file that could not be read.
        labels: the class of each image; None without class folders.
        source: where they come from, in words.
    """

    images: list[tuple[str, Image.Image]]
    skipped: list[str] = field(default_factory=list)
    labels: list[str] | None = None
    source: str = "bundled with scikit-image and scikit-learn"


def load_labelled(folder: Path | None) -> Photographs:
    """Read the images of a folder, or of its folders, one per class; None gives the bundled photographs.

    Raises:
        InputFileError: if the folder does not exist, holds no readable image, or holds images beside class folders.
    """
    if folder is None:
        return Photographs(bundled_photographs())
    if not folder.is_dir():
        raise InputFileError(f"image folder {folder} does not exist; give a folder of photographs")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = [path for path in classes if _has_images(path)]
    if not classes:
        images, skipped = load_images(folder)
        return Photographs(images, skipped, source=folder.name)
    if _has_images(folder):
        raise InputFileError(
            f"{folder} holds images and folders of images ({classes[0].name}, ...); labels need every image in a class folder"
        )
    images, skipped, labels = [], [], []
    for path in classes:
        try:
            found, unreadable = load_images(path)
        except InputFileError:
            found, unreadable = [], [f"{file.name}: not readable" for file in sorted(path.iterdir()) if _is_image(file)]
        images += [(f"{path.name}/{name}", image) for name, image in found]
        labels += [path.name] * len(found)
        skipped += [f"{path.name}/{line}" for line in unreadable]
    if not images:
        raise InputFileError(f"no readable image in {folder} ({len(skipped)} could not be read, first: {skipped[0]})")
    return Photographs(images, skipped, labels, source=folder.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _has_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.iterdir())
