"""Photographs as the input they become, and the outputs that an engine has to give for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fna.engines.bundle.format import Check, safe_name
from fna.engines.bundle.tolerances import task_tolerances, tolerance_of
from fna.engines.manifest import ShapeRange
from fna.errors import InputFileError, ModelSourceError
from fna.export.metadata import FileMetadata
from fna.export.sources.loading import load_model
from fna.export.sources.running import patched, run_torch
from fna.runtime import Arrays, open_session, run_session


def record_images(
    path: Path,
    root: Path,
    metadata: FileMetadata,
    profiles: dict[str, ShapeRange],
    images: Sequence[tuple[str, Image.Image]],
    precisions: Sequence[str],
) -> Check:
    """Write the photographs as the input they become, and the outputs that the engine has to give, both fp32.

    Raises:
        InputFileError: if the file has several inputs.
        ModelSourceError: if the model that the file was traced from cannot be loaded or run.
    """
    if len(profiles) != 1:
        raise InputFileError(f"the file has inputs {', '.join(profiles)}, but one image input can be recorded")
    ((name, shapes),) = profiles.items()
    height, width = shapes.usual[2:]
    pixels = np.stack([metadata.preprocessing.apply(image, height, width) for _, image in images])
    traced = metadata.origin == "trace"
    outputs = _run_pytorch(metadata, pixels) if traced else _run_onnxruntime(path, name, pixels)
    folder = root / "check"
    files = {}
    for output, array in outputs.items():
        files[output] = f"check/expected.{safe_name(output)}.npy"
        np.save(root / files[output], array)
    np.save(folder / "input.npy", pixels)
    return Check(
        images=tuple(name for name, _ in images),
        inputs={name: "check/input.npy"},
        outputs=files,
        reference="pytorch" if traced else "onnxruntime",
        tolerances={precision: tolerance_of(metadata, precision) for precision in precisions},
        tasks=task_tolerances(metadata, outputs),
    )


def _run_pytorch(metadata: FileMetadata, pixels: NDArray[np.float32]) -> Arrays:
    """Run FNA in PyTorch fp32 by the file's plan, an image at a time."""
    model = load_model(metadata.source)
    try:
        with patched(model, metadata):
            return run_torch(model, pixels)
    except Exception as error:  # the model is the user's and may raise anything
        raise ModelSourceError(f"model {metadata.source!r} does not run: {str(error).splitlines()[0]}") from error


def _run_onnxruntime(path: Path, name: str, pixels: NDArray[np.float32]) -> Arrays:
    session = open_session(path)
    parts = [run_session(session, {name: image[None]}) for image in pixels]
    return {output: np.concatenate([part[output] for part in parts]).astype(np.float32) for output in parts[0]}
