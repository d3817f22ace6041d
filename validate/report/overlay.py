"""A picture of what FNA changed: exact, FNA and their difference over the photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fna.export.metadata import FileMetadata
from fna.files import written_whole
from fna.validate.budget.measure import Outputs, prefix_of
from fna.validate.metrics import cosine

_SIDE = 256
"""Pixels along a panel's side."""


def draw_overlay(
    images: Sequence[tuple[str, Image.Image]],
    outputs: Outputs,
    metadata: FileMetadata,
    path: Path,
) -> bool:
    """Write a PNG with a row per photograph, in the square that the model sees: photograph, exact, FNA, difference.

    Models with a map output (saliency, depth) show that map; models with tokens only show each patch's error.

    Returns:
        Whether there was anything to draw.
    """
    if metadata.map_outputs:
        columns = _map_columns(outputs, metadata.map_outputs[0])
    elif metadata.token_outputs:
        columns = _token_columns(outputs, metadata)
    else:
        return False
    figure = Figure(figsize=(3 * (len(columns) + 1), 3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), len(columns) + 1, squeeze=False)
    for row, (name, image) in enumerate(images):
        photograph = np.asarray(image.convert("RGB").resize((_SIDE, _SIDE)))
        axes[row, 0].imshow(photograph)
        axes[row, 0].set_ylabel(name)
        for column, (title, maps, colours, top) in enumerate(columns, start=1):
            axes[row, column].imshow(photograph)
            shown = axes[row, column].imshow(
                maps[row], cmap=colours, vmin=0, vmax=top, alpha=0.65, extent=(0, _SIDE, _SIDE, 0)
            )
            if row == 0:
                axes[row, column].set_title(title)
                figure.colorbar(shown, ax=axes[:, column], location="bottom", shrink=0.8, pad=0.01)
    axes[0, 0].set_title("photograph")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    return True


_Column = tuple[str, NDArray[Any], str, float]


def _map_columns(outputs: Outputs, name: str) -> list[_Column]:
    exact, fna = (
        np.squeeze(arrays[name], axis=1) if arrays[name].ndim == 4 else arrays[name]
        for arrays in (outputs.exact, outputs.exported)
    )
    top = float(max(exact.max(), fna.max()))
    difference = np.abs(fna - exact)
    return [
        (f"{name}, exact", exact, "viridis", top),
        (f"{name}, FNA", fna, "viridis", top),
        (f"difference (max {difference.max():.3f})", difference, "magma", max(float(difference.max()), 1e-9)),
    ]


def _token_columns(outputs: Outputs, metadata: FileMetadata) -> list[_Column]:
    name = metadata.token_outputs[0]
    prefix = prefix_of(metadata, metadata.height, metadata.width, outputs.exact[name])
    error = 1 - cosine(outputs.exact[name][:, prefix:], outputs.exported[name][:, prefix:])
    side = metadata.patch_size or 1
    rows, columns = (metadata.height or 0) // side, (metadata.width or 0) // side
    if rows * columns != error.shape[1]:
        rows, columns = 1, error.shape[1]
    return [("1 - cosine per patch", error.reshape(-1, rows, columns), "magma", max(float(error.max()), 1e-9))]
