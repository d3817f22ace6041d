"""The error budget: how far each step is from the one before it, measured on photographs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from fna.engines.manifest import read_manifest
from fna.engines.run import RtxEngine, open_onnx, run_onnx
from fna.errors import InputFileError, MissingCapabilityError
from fna.export.files import file_sha256, load_onnx
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.sources import LoadedModel, check_resolution, load_model
from fna.patching import patch, unpatch
from fna.validate.metrics import OutputError, measure

Arrays = dict[str, NDArray[Any]]
Step = Callable[[str], None]

EXPORT_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Relative L2 error of the ONNX file against FNA in PyTorch fp32, by the file's precision. fp32 is the project's contract; fp16
and bf16 have 11 and 8 significant bits, and their tolerance covers the rounding of weights and activations as well."""


class StepError(BaseModel):
    """The errors of one step, or why it was not measured.

    Attributes:
        step: its name.
        compares: what is compared with what.
        errors: one per output.
        tolerance: of the relative L2 error; None where the step has none.
        not_measured: the reason, where it was not.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    compares: str
    errors: tuple[OutputError, ...] = ()
    tolerance: float | None = None
    not_measured: str | None = None

    def failures(self) -> list[str]:
        """Say for each output that is out of tolerance, or not finite, what it is and what it should be."""
        lines = []
        for error in self.errors:
            if error.not_finite:
                lines.append(f"{self.step}: output {error.output} holds {error.not_finite} NaN or infinite values")
            elif self.tolerance is not None and not error.relative_l2 <= self.tolerance:
                lines.append(
                    f"{self.step}: output {error.output} has relative L2 error {error.relative_l2:.2e} "
                    f"(tolerance {self.tolerance:.0e})"
                )
        return lines


class Validation(BaseModel):
    """Everything that `fna validate` measured.

    Attributes:
        file: the file that was validated.
        metadata: what it says about itself.
        images: names of the photographs.
        skipped: image files that could not be read.
        steps: the error budget, in order.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    metadata: FileMetadata
    images: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    steps: tuple[StepError, ...]


class Outputs(BaseModel):
    """The outputs of every step, for pictures."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    exact: Arrays
    approximated: Arrays
    exported: Arrays


def validate_file(
    path: Path,
    images: Sequence[tuple[str, Image.Image]],
    *,
    skipped: Sequence[str] = (),
    tolerance: float | None = None,
    resolution: tuple[int, int] | None = None,
    on_step: Step = lambda _name: None,
) -> tuple[Validation, Outputs]:
    """Measure the approximation, export and engine error of a traced file or of an engine built from one.

    Args:
        path: an ONNX file, or an engine with its manifest and its ONNX file beside it.
        images: photographs, by name.
        skipped: names of image files that could not be read, for the record.
        tolerance: of the export error; by precision if None.
        resolution: height and width for files that leave them open.
        on_step: called with the name of each step as it starts.

    Raises:
        InputFileError: if the file cannot be read, or its model cannot be loaded from its metadata.
    """
    engine = path if path.suffix == ".engine" else None
    onnx_path = _onnx_of_engine(path) if engine else path
    metadata = read_metadata(load_onnx(onnx_path, tensors=False), str(onnx_path))
    if metadata.origin != "trace":
        raise InputFileError(
            f"{onnx_path} was grafted from {metadata.source}, which has no PyTorch source to compare with"
        )
    on_step("loading the model")
    model = load_model(metadata.source)
    height, width = _size(metadata, resolution, model)
    pixels = np.stack([metadata.preprocessing.apply(image, height, width) for _, image in images])

    on_step("exact attention in PyTorch")
    exact = run_torch(model, pixels)
    on_step("FNA in PyTorch")
    with patched(model, metadata):
        approximated = run_torch(model, pixels)
    on_step("the ONNX file on onnxruntime")
    exported, failure = _run_file(onnx_path, model, metadata, pixels)

    compare = _comparer(metadata)
    limit = tolerance if tolerance is not None else EXPORT_TOLERANCE[metadata.precision]
    steps = [
        StepError(
            step="approximation",
            compares="FNA against exact attention, PyTorch fp32",
            errors=compare(exact, approximated),
        ),
        StepError(
            step="export",
            compares=f"ONNX file ({metadata.precision}, onnxruntime) against FNA in PyTorch fp32",
            errors=compare(approximated, exported) if exported else (),
            tolerance=limit,
            not_measured=failure,
        ),
    ]
    if engine is not None:
        on_step("the engine")
        steps.append(_engine_step(engine, metadata, pixels, exported or approximated, limit, compare))
    validation = Validation(
        file=str(path),
        metadata=metadata,
        images=tuple(name for name, _ in images),
        skipped=tuple(skipped),
        steps=tuple(steps),
    )
    return validation, Outputs(exact=exact, approximated=approximated, exported=exported or approximated)


def run_torch(
    model: LoadedModel,
    pixels: NDArray[np.float32],  # [B, 3, H, W]
) -> Arrays:
    """Run a model in PyTorch fp32, an image at a time, and return its outputs by name."""
    batches = []
    with torch.inference_mode():
        for image in pixels:
            batches.append([tensor.float().numpy() for tensor in model.module(torch.from_numpy(image[None]))])
    return {
        name: np.concatenate(parts) for name, parts in zip(model.output_names, zip(*batches, strict=True), strict=True)
    }


@contextmanager
def patched(model: LoadedModel, metadata: FileMetadata) -> Iterator[None]:
    """Have the model compute FNA by a file's plan within the block."""
    patch(model.module, metadata.plan)
    try:
        yield
    finally:
        unpatch(model.module)


def _run_file(
    path: Path, model: LoadedModel, metadata: FileMetadata, pixels: NDArray[np.float32]
) -> tuple[Arrays | None, str | None]:
    try:
        session = open_onnx(path)
    except InputFileError as error:
        if metadata.precision == "fp32":
            raise
        return None, f"onnxruntime's CPU provider does not run this {metadata.precision} file ({error})"
    name = session.get_inputs()[0].name
    if metadata.precision == "bf16":
        return None, "onnxruntime takes no bf16 arrays from Python on a CPU"
    parts = [run_onnx(session, {name: image[None]}) for image in pixels]
    return {output: np.concatenate([part[output] for part in parts]) for output in model.output_names}, None


def _comparer(metadata: FileMetadata) -> Callable[[Arrays, Arrays], tuple[OutputError, ...]]:
    def compare(reference: Arrays, actual: Arrays) -> tuple[OutputError, ...]:
        return tuple(
            measure(
                name,
                reference[name],
                actual[name],
                prefix_tokens=metadata.plan.prefix_tokens if name in metadata.token_outputs else None,
            )
            for name in reference
        )

    return compare


def _engine_step(
    engine: Path,
    metadata: FileMetadata,
    pixels: NDArray[np.float32],
    reference: Arrays,
    tolerance: float,
    compare: Callable[[Arrays, Arrays], tuple[OutputError, ...]],
) -> StepError:
    compares = "engine against the ONNX file"
    try:
        runner = RtxEngine(engine)
    except MissingCapabilityError as error:
        return StepError(step="engine", compares=compares, not_measured=str(error))
    (name,) = runner.manifest.profiles
    parts = [runner.run({name: image[None]}) for image in pixels]
    outputs = {output: np.concatenate([part[output] for part in parts]) for output in reference}
    return StepError(step="engine", compares=compares, errors=compare(reference, outputs), tolerance=tolerance)


def _onnx_of_engine(engine: Path) -> Path:
    manifest = read_manifest(engine)
    path = engine.parent / manifest.onnx_name
    if not path.is_file():
        raise InputFileError(
            f"{engine.name} was built from {manifest.onnx_name}, which is not beside it; put it there to validate"
        )
    if file_sha256(path) != manifest.onnx_sha256:
        raise InputFileError(
            f"{path} is not the file that {engine.name} was built from (its SHA-256 differs); build the engine again"
        )
    return path


def _size(metadata: FileMetadata, resolution: tuple[int, int] | None, model: LoadedModel) -> tuple[int, int]:
    size = (metadata.height, metadata.width)
    if size[0] is not None and size[1] is not None:
        if resolution is not None and resolution != size:
            raise InputFileError(
                f"the file takes {size[0]}x{size[1]} images, but --resolution asks for {resolution[0]}x{resolution[1]}"
            )
        return size[0], size[1]
    chosen = resolution or (model.native_resolution,) * 2
    check_resolution(model, *chosen)
    return chosen
