"""Pictures of single images for the report: landmarks, what exact attention and FNA give, and the error, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fna.validate.budget.measure import Outputs, Validation
from fna.validate.metrics import cosine
from fna.validate.report.focal_panel import draw_focal_keys

SIDE = 288
"""Pixels along a panel's longer side."""

_STRENGTH = 0.62
"""How much of a heat map covers the photograph under it."""


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: what it shows.
        alt: the same for people who do not see it.
        uri: the picture as a data URI.
        scale_path: where the document holds the value that the brightest colour stands for; None where there is no scale.
    """

    title: str
    alt: str
    uri: str
    scale_path: str | None = None


def draw_panels(
    validation: Validation, outputs: Outputs, images: Sequence[tuple[str, Image.Image]]
) -> list[tuple[str, list[Panel]]]:
    """Return for each image that has outputs its name and its panels: landmarks, exact, FNA, error."""
    count = len(next(iter(outputs.exact.values()), []))
    rows = []
    for index, (name, image) in enumerate(images[:count]):
        size = _panel_size(validation.height, validation.width)
        photograph = image.convert("RGB").resize(size)
        panels = [_landmark_panel(validation, name, photograph)]
        panels += _focal_panels(validation, name, photograph)
        panels += _output_panels(validation, outputs, index, name, photograph)
        rows.append((name, panels))
    return rows


def _panel_size(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    return round(SIDE * width / longer), round(SIDE * height / longer)


def patch_grid(validation: Validation) -> tuple[int, int] | None:
    """Rows and columns of patches; None where the patch size is not known."""
    side = validation.metadata.patch_size
    return (validation.height // side, validation.width // side) if side else None


def _landmark_panel(validation: Validation, name: str, photograph: Image.Image) -> Panel:
    landmarks = next((chosen for chosen in validation.landmarks if chosen.image == name), None)
    grid = patch_grid(validation)
    if landmarks is None or grid is None:
        return Panel("photograph", f"photograph {name}", encode(photograph))
    prefix = validation.metadata.plan.prefix_tokens or 0
    picture = photograph.copy()
    draw = ImageDraw.Draw(picture)
    rows, columns = grid
    for token in landmarks.tokens:
        if token < prefix:
            continue
        row, column = divmod(token - prefix, columns)
        x, y = (column + 0.5) * picture.width / columns, (row + 0.5) * picture.height / rows
        radius = max(2.0, min(picture.width / columns, picture.height / rows) * 0.3)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=(255, 255, 255), outline=(194, 65, 12), width=2)
    text = f"photograph {name} with its landmark tokens drawn as circles"
    return Panel("landmarks", text, encode(picture))


def _focal_panels(validation: Validation, name: str, photograph: Image.Image) -> list[Panel]:
    plan, grid = validation.metadata.plan, patch_grid(validation)
    if not plan.focal or grid is None:
        return []
    picture = draw_focal_keys(photograph, plan.focal[0], grid, plan.prefix_tokens or 0)
    text = f"photograph {name} with the keys of one tile of the first focal block: near ones small, sampled ones larger"
    return [Panel("keys of one tile", text, encode(picture))]


def _output_panels(
    validation: Validation, outputs: Outputs, index: int, name: str, photograph: Image.Image
) -> list[Panel]:
    metadata = validation.metadata
    if metadata.map_outputs:
        output = metadata.map_outputs[0]
        exact, fna = (np.squeeze(arrays[output][index]) for arrays in (outputs.exact, outputs.exported))
        lowest, highest = min(exact.min(), fna.min(), 0.0), max(exact.max(), fna.max())
        error = np.abs(fna - exact)
        return [
            Panel(
                f"{output}, exact",
                f"{output} of {name} with exact attention",
                heat(photograph, exact, "viridis", lowest, highest),
            ),
            Panel(f"{output}, FNA", f"{output} of {name} with FNA", heat(photograph, fna, "viridis", lowest, highest)),
            Panel("error", f"error of {output} of {name}", heat(photograph, error, "magma", 0, _top(error))),
        ]
    token_output = next((key for key, array in outputs.exact.items() if _fits_grid(validation, array)), None)
    grid = patch_grid(validation)
    if token_output is None or grid is None:
        return []
    prefix = metadata.plan.prefix_tokens or 0
    exact, fna = (arrays[token_output][index, prefix:] for arrays in (outputs.exact, outputs.exported))
    error = (1 - cosine(exact, fna)).reshape(grid)
    colours = _principal_colours(exact, fna, grid)
    return [
        Panel(
            f"features, {kind}",
            f"patch features of {name} with {kind} attention, their three principal components as colours",
            encode(Image.fromarray(picture).resize(photograph.size, Image.Resampling.NEAREST)),
        )
        for kind, picture in zip(("exact", "FNA"), colours, strict=True)
    ] + [Panel("error", f"1 - cosine of each patch of {name}", heat(photograph, error, "magma", 0, _top(error)))]


def _top(error: NDArray[Any]) -> float:
    return max(float(error.max()), 1e-9)


def _fits_grid(validation: Validation, array: NDArray[Any]) -> bool:
    grid = patch_grid(validation)
    prefix = validation.metadata.plan.prefix_tokens or 0
    return grid is not None and array.ndim == 3 and array.shape[1] == grid[0] * grid[1] + prefix


def _principal_colours(
    exact: NDArray[Any],  # [N, C]
    fna: NDArray[Any],  # [N, C]
    grid: tuple[int, int],
) -> list[NDArray[np.uint8]]:
    """Both along the principal components of the exact features, so that equal colours are equal features."""
    mean = exact.mean(axis=0)
    _, _, axes = np.linalg.svd(exact - mean, full_matrices=False)
    projected = [(features - mean) @ axes[:3].T for features in (exact, fna)]
    low, high = (np.percentile(projected[0], percent, axis=0) for percent in (2, 98))
    pictures = []
    for values in projected:
        scaled = np.clip((values - low) / np.maximum(high - low, 1e-9), 0, 1)
        channels = np.zeros((scaled.shape[0], 3))
        channels[:, : scaled.shape[1]] = scaled
        pictures.append((channels.reshape(*grid, 3) * 255).astype(np.uint8))
    return pictures


def heat(photograph: Image.Image, values: NDArray[Any], colours: str, low: float, high: float) -> str:
    """Return a heat map over a grey photograph as a data URI."""
    scaled = np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    coloured = matplotlib.colormaps[colours](scaled)[..., :3]
    layer = Image.fromarray((coloured * 255).astype(np.uint8)).resize(photograph.size, Image.Resampling.BILINEAR)
    return encode(Image.blend(photograph.convert("L").convert("RGB"), layer, _STRENGTH))


def colour_map(values: NDArray[Any]) -> str:
    """Return a grid of values from zero to its largest as a data URI, a square for each."""
    scaled = values / max(float(values.max()), 1e-12)
    coloured = (matplotlib.colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8)
    factor = max(1, SIDE // max(values.shape))
    return encode(Image.fromarray(np.kron(coloured, np.ones((factor, factor, 1), np.uint8))))


def encode(picture: Image.Image) -> str:
    """Return a picture as a data URI."""
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
