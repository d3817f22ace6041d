"""Preprocessing: what image processors' files say is what is done to the pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fna.errors import InputFileError
from fna.export.preprocessing import Preprocessing, bundled_photographs, load_images, parse_preprocessor

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def parse(settings: Any) -> Preprocessing:
    return parse_preprocessor(json.dumps(settings), "preprocessor_config.json")


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (level, level, level))


def test_mean_std_and_filter_are_read() -> None:
    preprocessing = parse(CLIP)
    assert preprocessing.mean == tuple(CLIP["image_mean"])
    assert preprocessing.std == tuple(CLIP["image_std"])
    assert preprocessing.resize == "bicubic"
    assert parse({**CLIP, "resample": 2}).resize == "bilinear"


def test_pixels_are_rescaled_then_normalised() -> None:
    pixels = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0)).apply(grey(255), 4, 6)
    assert pixels.shape == (3, 4, 6)
    assert pixels.dtype == np.float32
    assert np.allclose(pixels[:, 0, 0], [1.0, 3.0, 0.5])


@pytest.mark.parametrize(
    ("settings", "white"),
    [
        ({"do_normalize": False}, 1.0),
        ({"do_normalize": False, "do_rescale": False}, 255.0),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5}, 2.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 1.0),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, 1.0),
    ],
)
def test_switches_are_heeded(settings: dict[str, Any], white: float) -> None:
    assert np.allclose(parse(settings).apply(grey(255), 2, 2), white)


def test_settings_nested_in_a_processor_file_are_found() -> None:
    assert parse({"image_processor": CLIP, "processor_class": "LlavaProcessor"}) == parse(CLIP)


def test_settings_that_a_file_does_not_give_are_imagenets() -> None:
    assert parse({}) == Preprocessing()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "std"),
        ({"image_std": [0.5, -1.0, 0.5]}, "std"),
        ({"image_std": [0.5, 0.5]}, "std"),
        ({"image_mean": [0.5, 0.5, 1e9]}, "mean"),
        ({"image_mean": "grey"}, "mean"),
        ({"image_mean": [float("nan")] * 3}, "mean"),
        ({"rescale_factor": 0}, "rescale"),
        ({"rescale_factor": float("inf")}, "rescale"),
        ({"resample": 77}, "resize"),
        ({"resample": [3]}, "resize"),
    ],
)
def test_numbers_out_of_range_are_refused_by_key(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(InputFileError, match=rf"preprocessor_config\.json: {key}") as caught:
        parse(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"', '{"image_processor": 3}'])
def test_what_is_no_settings_file_is_refused(text: str) -> None:
    with pytest.raises(InputFileError, match=r"preprocessor_config\.json"):
        parse_preprocessor(text, "preprocessor_config.json")


def test_bundled_photographs_are_there_without_a_network() -> None:
    photographs = bundled_photographs()
    assert len(photographs) >= 4
    assert all(image.size[0] >= 224 and image.mode == "RGB" for _, image in photographs)


def test_a_folder_of_images_is_read_in_order_and_bad_files_are_named(tmp_path: Path) -> None:
    grey(3).save(tmp_path / "b.png")
    grey(2).convert("L").save(tmp_path / "a.jpg")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("no image")
    images, skipped = load_images(tmp_path)
    assert [name for name, _ in images] == ["a.jpg", "b.png"]
    assert [image.mode for _, image in images] == ["RGB", "RGB"]
    assert len(skipped) == 1
    assert skipped[0].startswith("broken.png")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no readable image"):
        load_images(tmp_path)
    with pytest.raises(InputFileError, match="does not exist"):
        load_images(tmp_path / "missing")
