"""The error budget: how far each step is from the one before it, measured on photographs by changing one thing at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from fna.errors import InputFileError
from fna.export.metadata import FileMetadata
from fna.export.sources.running import patched, run_torch
from fna.observing import NystromCall
from fna.runtime import Arrays
from fna.validate.blame.not_finite import NotFinite, find_not_finite
from fna.validate.budget.block_parts import BlockPart, captured
from fna.validate.budget.chain import (
    DEPLOYED,
    EMULATED_IMAGES,
    ENGINE,
    EXACT,
    FNA,
    PLUGIN,
    PORTABLE,
    Chain,
    Comparison,
    Say,
    describe_types,
    open_chain,
    open_validated_file,
)
from fna.validate.budget.fna_nodes import NodeProbe, planned_output
from fna.validate.budget.tolerances import find_tolerance
from fna.validate.metrics import JUDGED, METRICS, ErrorMeter, Measured, OutputError

MOST_PICTURES = 6
"""Images whose outputs are kept for pictures; the others are measured and forgotten."""


class StepError(BaseModel):
    """The errors of one step, or why it was not measured.

    Attributes:
        step: its name.
        compares: what is compared with what.
        errors: one per output.
        tolerance: of the metric that is judged; None where the step has none.
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
        return [line for line in map(self.failure_of, self.errors) if line is not None]

    def failure_of(self, error: OutputError) -> str | None:
        """Say it for one of the outputs; None where it is within tolerance."""
        if error.not_finite:
            return f"{self.step}: output {error.output} holds {error.not_finite} NaN or infinite values"
        if self.tolerance is not None and not JUDGED.is_within(error.judged, self.tolerance):
            return (
                f"{self.step}: output {error.output} has {JUDGED.title} error {error.judged:{JUDGED.style}} "
                f"(tolerance {self.tolerance:.0e})"
            )
        return None


class BlockError(Measured):
    """How far the hidden states that leave a block are from exact attention's: the metrics with `by_block`, over all images.

    Attributes:
        block: its number.
        fna: whether it is FNA.
    """

    block: int
    fna: bool


class ImageLandmarks(BaseModel):
    """The landmark tokens of one image.

    Attributes:
        image: its name.
        block: the block that they were chosen for first.
        tokens: their indices, prefix tokens included.
    """

    model_config = ConfigDict(frozen=True)

    image: str
    block: int
    tokens: tuple[int, ...]


class Validation(BaseModel):
    """Everything that `fna validate` measured.

    Attributes:
        file: the file that was validated.
        kind: `onnx`, `engine` or `bundle`.
        metadata: what it says about itself.
        original: for grafted files, the file that they are compared with.
        height: of the images, in pixels.
        width: of the images, in pixels.
        images: names of the photographs.
        skipped: image files that could not be read.
        steps: the error budget, in order.
        total: from exact attention to the last step that was measured.
        blocks: the approximation error as it builds up, block by block; empty for grafted files.
        landmarks: of the images that have pictures.
        not_finite: the first tensor that holds NaN or infinite values, per step that has them.
        fna_types: the element type of each FNA node in the file, by block.
        notes: how something was run, where that matters.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    kind: str
    metadata: FileMetadata
    original: str | None = None
    height: int
    width: int
    images: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    steps: tuple[StepError, ...]
    total: StepError
    blocks: tuple[BlockError, ...] = ()
    landmarks: tuple[ImageLandmarks, ...] = ()
    not_finite: tuple[NotFinite, ...] = ()
    fna_types: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """Say what is out of tolerance, NaN and infinite values first."""
        lines = [line for step in self.steps for line in step.failures()]
        return [item.describe() for item in self.not_finite] + sorted(lines, key=lambda line: "NaN" not in line)


class Outputs(BaseModel):
    """The outputs of some images, for pictures and tasks.

    Attributes:
        exact: with exact attention.
        approximated: with FNA, in PyTorch (of grafted files: in the file).
        exported: of the last step that was measured.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    exact: Arrays
    approximated: Arrays
    exported: Arrays


def validate_file(
    path: Path,
    images: Sequence[tuple[str, Image.Image]],
    *,
    skipped: Sequence[str] = (),
    tolerances: Mapping[str, float] | None = None,
    resolution: tuple[int, int] | None = None,
    original: Path | None = None,
    on_step: Say = lambda *_progress: None,
) -> tuple[Validation, Outputs]:
    """Measure every step from exact attention in PyTorch to a file, an engine or a bundle.

    Args:
        path: an ONNX file, an engine with its manifest and its ONNX file beside it, or a bundle's folder.
        images: photographs, by name.
        skipped: names of image files that could not be read, for the record.
        tolerances: by step, instead of the table's (`fna.validate.budget.tolerances`).
        resolution: height and width for files that leave them open.
        original: of a grafted file, where it is not beside it.
        on_step: called with what is being done, how much of it is done, and how much there is.

    Raises:
        InputFileError: if the file cannot be read, or its model or original cannot be found.
    """
    chain = open_chain(open_validated_file(path, original), resolution, on_step)
    return measure_chain(chain, images, skipped=skipped, tolerances=tolerances or {}, on_step=on_step)


def measure_chain(
    chain: Chain,
    images: Sequence[tuple[str, Image.Image]],
    *,
    skipped: Sequence[str] = (),
    tolerances: Mapping[str, float],
    on_step: Say,
) -> tuple[Validation, Outputs]:
    """As `validate_file`, of a chain that is open already."""
    if not images:
        raise InputFileError("there are no images to validate on; give a folder of photographs as --images")
    gauge = _Gauge(chain)
    for index, (name, image) in enumerate(images):
        on_step(f"comparing on {name}", index, len(images))
        pixels = chain.metadata.preprocessing.apply(image, chain.height, chain.width)[None]
        gauge.add(name, pixels)
    on_step("summing up", len(images), len(images))
    steps = tuple(gauge.step(comparison, tolerances) for comparison in chain.comparisons)
    validation = Validation(
        file=str(chain.file.path),
        kind=chain.file.kind,
        metadata=chain.metadata,
        original=str(chain.file.original) if chain.file.original else None,
        height=chain.height,
        width=chain.width,
        images=tuple(name for name, _ in images),
        skipped=tuple(skipped),
        steps=steps,
        total=gauge.total(),
        blocks=gauge.block_errors(),
        landmarks=tuple(gauge.landmarks),
        not_finite=_locate_not_finite(chain, steps, images, on_step),
        fna_types=dict(describe_types(chain.proto)),
        notes=tuple(chain.notes),
    )
    return validation, gauge.outputs()


@dataclass
class _Gauge:
    """The meters of all steps, fed image by image."""

    chain: Chain
    meters: dict[str, dict[str, ErrorMeter]] = field(default_factory=dict)
    blocks: dict[BlockPart, ErrorMeter] = field(default_factory=dict)
    kept: dict[str, list[Arrays]] = field(default_factory=dict)
    landmarks: list[ImageLandmarks] = field(default_factory=list)
    probe: NodeProbe | None = None
    images: int = 0

    def __post_init__(self) -> None:
        if self.chain.reference is not None:
            self.probe = NodeProbe(self.chain.proto, self.chain.folder, self.chain.file.onnx.name)

    @property
    def last(self) -> str:
        """The last stage that can be run."""
        return last_stage(self.chain)

    def add(self, name: str, pixels: NDArray[np.float32]) -> None:
        """Run every stage on one image and compare."""
        chain = self.chain
        done = self._run_torch(name, pixels) if chain.model is not None else {}
        for stage, run in chain.stages.items():
            if stage == DEPLOYED and run is chain.stages.get(PORTABLE, chain.stages[FNA]):
                continue
            if stage == PLUGIN and self.images >= EMULATED_IMAGES:
                continue
            if stage not in done:
                done[stage] = run(pixels)
        self.images += 1
        if DEPLOYED in chain.stages:
            done.setdefault(DEPLOYED, done[PORTABLE if PORTABLE in done else FNA])
        for comparison in chain.comparisons:
            there = comparison.reference in done and comparison.actual in done
            if comparison.not_measured is None and comparison.reference != comparison.actual and there:
                self._compare(comparison.step, done[comparison.reference], done[comparison.actual])
        self._compare("total", done[EXACT], done[self.last])
        if self.probe is not None:
            self._compare_nodes(self.probe, name, pixels)
        for key, stage in (("exact", EXACT), ("approximated", FNA), ("exported", self.last)):
            kept = self.kept.setdefault(key, [])
            if len(kept) < MOST_PICTURES:
                kept.append({output: done[stage][output] for output in chain.outputs})

    def _run_torch(self, name: str, pixels: NDArray[np.float32]) -> dict[str, Arrays]:
        """Exact and FNA in PyTorch, comparing what leaves each block on the way."""
        model, plan = self.chain.model, self.chain.metadata.plan
        assert model is not None
        with captured(model.module) as seen:
            exact = run_torch(model, pixels)
            before = dict(seen.arrays)
        with patched(model, plan), captured(model.module) as seen:
            fna = run_torch(model, pixels)
        for part, array in before.items():
            if part in seen.arrays and part.part == "output" and array.ndim == 3:
                meter = self.blocks.setdefault(part, ErrorMeter(str(part), 0))
                meter.add(array, seen.arrays[part])
        with_landmarks = [call for call in seen.calls if isinstance(call, NystromCall)]
        if with_landmarks and len(self.landmarks) < MOST_PICTURES:
            first = with_landmarks[0]
            self.landmarks.append(
                ImageLandmarks(image=name, block=first.block, tokens=tuple(first.landmarks[0].tolist()))
            )
        return {EXACT: exact, FNA: fna}

    def _compare(self, step: str, reference: Arrays, actual: Arrays) -> None:
        chain = self.chain
        for output in chain.outputs:
            meters = self.meters.setdefault(step, {})
            tokens = is_tokens(chain, output, reference[output])
            prefix = prefix_of(chain.metadata, chain.height, chain.width, reference[output]) if tokens else None
            try:
                meters.setdefault(output, ErrorMeter(output, prefix)).add(reference[output], actual[output])
            except ValueError as error:
                raise InputFileError(f"{chain.file.onnx.name} does not fit its model: {error}") from None

    def _compare_nodes(self, probe: NodeProbe, image: str, pixels: NDArray[np.float32]) -> None:
        arrays = probe.run(pixels)
        with_landmarks = [node for node in probe.nodes if not node.is_focal]
        if with_landmarks and len(self.landmarks) < MOST_PICTURES:
            first = with_landmarks[0]
            tokens = tuple(int(index) for index in arrays[first.inputs["landmarks"]][0])
            self.landmarks.append(ImageLandmarks(image=image, block=first.block, tokens=tokens))
        meters = self.meters.setdefault("export", {})
        for node in probe.nodes:
            meter = meters.setdefault(node.name, ErrorMeter(node.name))
            meter.add(planned_output(node, arrays, self.chain.metadata), arrays[node.output].astype(np.float32))

    def step(self, comparison: Comparison, tolerances: Mapping[str, float]) -> StepError:
        """The errors of one step."""
        meters = self.meters.get(comparison.step, {}) if comparison.not_measured is None else {}
        return StepError(
            step=comparison.step,
            compares=comparison.compares,
            errors=tuple(meter.result() for meter in meters.values()),
            tolerance=find_tolerance(comparison.step, self.chain.file.precision, tolerances),
            not_measured=comparison.not_measured,
        )

    def total(self) -> StepError:
        """From exact attention to the last stage."""
        names = {ENGINE: "the engine", DEPLOYED: "the file", PORTABLE: "the fp32 file", FNA: "FNA"}
        return StepError(
            step="total",
            compares=f"{names[self.last]} against exact attention",
            errors=tuple(meter.result() for meter in self.meters["total"].values()),
        )

    def block_errors(self) -> tuple[BlockError, ...]:
        """The approximation error as it builds up."""
        plan = self.chain.metadata.plan
        errors = {part.block: meter.result() for part, meter in sorted(self.blocks.items())}
        values: dict[int, dict[str, Any]] = {
            block: {name: error.value(name) for name, metric in METRICS.items() if metric.by_block}
            for block, error in errors.items()
        }
        return tuple(
            BlockError(block=block, fna=block in plan.replaced_blocks, **numbers) for block, numbers in values.items()
        )

    def outputs(self) -> Outputs:
        """The outputs that were kept, images stacked."""
        stacked = {
            key: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for key, parts in self.kept.items()
        }
        return Outputs(**stacked)


def last_stage(chain: Chain) -> str:
    """Return the last stage of a chain that can be run."""
    return next(stage for stage in (ENGINE, DEPLOYED, PORTABLE, FNA) if stage in chain.stages)


def is_tokens(chain: Chain, output: str, array: NDArray[Any]) -> bool:
    """Return whether an output is `[B, N, C]` tokens: its file says so, or, grafted, its attention has that many tokens."""
    if chain.reference is None:
        return output in chain.metadata.token_outputs
    table = chain.metadata.attention_table or []
    return array.ndim == 3 and array.shape[1] in {row.get("tokens") for row in table}


def prefix_of(metadata: FileMetadata, height: int | None, width: int | None, tokens: NDArray[Any]) -> int:
    """Return how many tokens precede the patches in an output.

    The plan's prefix tokens; but none where there are fewer tokens than the model has: LLaVA's projector takes patches alone.

    Args:
        metadata: of the file.
        height: of the images, in pixels.
        width: of the images, in pixels.
        tokens: the output, `[B, N, C]`.
    """
    prefix = metadata.plan.prefix_tokens or 0
    if metadata.patch_size is None or height is None or width is None:
        return prefix
    patches = (height // metadata.patch_size) * (width // metadata.patch_size)
    return prefix if tokens.shape[1] >= patches + prefix else 0


def _locate_not_finite(
    chain: Chain, steps: Sequence[StepError], images: Sequence[tuple[str, Image.Image]], say: Say
) -> tuple[NotFinite, ...]:
    """For the first step whose result is not finite, the first tensor that is not; later steps inherit it."""
    for step in steps:
        bad = next((error for error in step.errors if error.not_finite), None)
        if bad is None:
            continue
        name, image = images[bad.worst_item]
        say(f"looking for the first tensor that is not finite on {name}")
        pixels = chain.metadata.preprocessing.apply(image, chain.height, chain.width)[None]
        first = find_not_finite(chain, step.step, pixels, name)
        return (first,) if first is not None else ()
    return ()
