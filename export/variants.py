"""The same model in another precision: from an fp32 FNA file to fp16, bf16, int8 or fp8, with the photographs that this needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from PIL import Image

from fna.errors import InvalidArgumentError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.passes.eight_bit import EIGHT_BIT, EightBitName
from fna.export.passes.layer_costs import measure_layer_costs
from fna.export.passes.precision import cast_model
from fna.export.passes.quantize import Quantized, quantize_model
from fna.export.passes.ranges import find_overflows, measure_ranges
from fna.export.preprocessing import views_of
from fna.files import load_onnx, save_model
from fna.precision import Precision

PHOTOGRAPHS_FOR_COSTS = 2
"""Each takes two runs for each linear layer."""
MANY_PHOTOGRAPHS = 16
"""From so many on 8 bits are calibrated on photographs as they are; of fewer, on their quarters as well."""
FEW_PHOTOGRAPHS = 4
"""Fewer leave no three to give the ranges that a fourth is tried with."""


@dataclass(frozen=True)
class FileVariant:
    """What to make of a file.

    Attributes:
        precision: of weights and activations.
        eight_bit: types of the linear layers, `int8`, `fp8` or both, each layer in the one that it bears best; attention is left
            in `precision`.
        keep_fp32: numbers of blocks that stay fp32 throughout.
        keep_linear: names of linear layers that stay in `precision`.
        linear_goal: mean cosine of the first token output to the fp32 file's, for which the costliest linear layers stay in
            `precision` as well, as few as reach it; None keeps none.
        keep_io: whether inputs and outputs stay fp32.
        check: whether an fp16 file's values are checked against fp16's range on the photographs.
    """

    precision: Precision = "fp32"
    eight_bit: tuple[EightBitName, ...] = ()
    keep_fp32: tuple[int, ...] = ()
    keep_linear: tuple[str, ...] = ()
    linear_goal: float | None = None
    keep_io: bool = True
    check: bool = True

    @property
    def changes(self) -> bool:
        """Whether it differs from the fp32 file."""
        return bool(self.eight_bit) or self.precision != "fp32"

    @property
    def label(self) -> str:
        """What file names say: fp16, bf16, int8, fp8, int8-fp16, int8-fp8-fp16 and so on."""
        parts = [*self.eight_bit, *([self.precision] if self.precision != "fp32" or not self.eight_bit else [])]
        return "-".join(parts)


def make_variant(
    source: Path,
    output: Path,
    variant: FileVariant,
    photographs: Sequence[tuple[str, Image.Image]],
    *,
    resolution: tuple[int, int] | None = None,
    on_step: Callable[[str], None] = lambda _name: None,
) -> list[str]:
    """Write a file in another precision.

    Args:
        source: an fp32 file, traced or grafted.
        output: the file to write.
        variant: what to make of it.
        photographs: by name; 8 bits are calibrated and fp16's range checked on them.
        resolution: height and width for files that leave them open.
        on_step: called with what is being done.

    Returns:
        What the user should know, a line each. The file is written all the same.

    Raises:
        InputFileError, InvalidArgumentError, BuildError: naming what was wrong.
    """
    model = load_onnx(source)
    metadata = read_metadata(model, str(source))
    notes: list[str] = []
    result = model
    pixels: list[NDArray[np.float32]] = []
    if variant.eight_bit or (variant.precision == "fp16" and variant.check):
        height, width = image_size(model, metadata, resolution)
        pixels = [metadata.preprocessing.apply(image, height, width)[None] for _, image in photographs]
    if variant.precision == "fp16" and variant.check:
        on_step(f"measuring ranges on {len(pixels)} photographs")
        ranges = [
            measured
            for measured in measure_ranges(model, pixels, str(source))
            if measured.block not in variant.keep_fp32
        ]
        notes += [f"fp16 overflow: {line}" for line in find_overflows(ranges)]
    if variant.eight_bit:
        on_step(f"quantising to {' and '.join(variant.eight_bit)} on {len(pixels)} photographs")
        kinds = [EIGHT_BIT[name] for name in variant.eight_bit]
        views = calibration_pixels(
            metadata, [image for _, image in photographs], image_size(model, metadata, resolution)
        )

        def quantize(kept: Sequence[str]) -> Quantized:
            return quantize_model(model, views, kinds=kinds, keep=variant.keep_fp32, keep_layers=kept, name=str(source))

        quantized = quantize(variant.keep_linear)
        if variant.linear_goal is not None:
            costly = _costliest(quantized.model, pixels, metadata, variant.linear_goal, on_step)
            if costly:
                quantized = quantize([*variant.keep_linear, *costly])
            notes.append(
                f"kept in {variant.precision} for a cosine of {variant.linear_goal}: {', '.join(costly) or 'none'}"
            )
        result = quantized.model
        notes += [*_doubts_about(photographs), quantized.describe(), *quantized.notes]
    if variant.precision != "fp32":
        on_step(f"casting to {variant.precision}")
        result = cast_model(
            result, variant.precision, keep_fp32=variant.keep_fp32, keep_io=variant.keep_io, name=str(source)
        )
    save_model(result, output)
    return notes


def calibration_pixels(
    metadata: FileMetadata, images: Sequence[Image.Image], size: tuple[int, int]
) -> list[NDArray[np.float32]]:
    """Return what 8 bits are calibrated on, `[V, 3, H, W]` for each photograph."""
    cuts = views_of if len(images) < MANY_PHOTOGRAPHS else lambda image: [image]
    return [np.stack([metadata.preprocessing.apply(view, *size) for view in cuts(image)]) for image in images]


def _costliest(
    quantized: ModelProto,
    pixels: Sequence[NDArray[np.float32]],
    metadata: FileMetadata,
    goal: float,
    on_step: Callable[[str], None],
) -> list[str]:
    """Names of the linear layers without which the rest in 8 bits reaches the goal, the costliest alone taken first."""
    output = metadata.token_outputs[0] if metadata.token_outputs else quantized.graph.output[0].name
    costs = measure_layer_costs(
        quantized,
        pixels[:PHOTOGRAPHS_FOR_COSTS],
        output,
        lambda done, of: on_step(f"measuring what each linear layer costs, run {done} of {of}"),
    )
    if costs[0].everything >= goal:
        return []
    names: list[str] = []
    for cost in costs:
        names += cost.layers
        if cost.without is not None and cost.without >= goal:
            return names
    raise InvalidArgumentError(
        f"no choice of layers in 8 bits reaches a cosine of {goal}; with none in 8 bits it is {costs[-1].without:.6f}"
    )


def _doubts_about(photographs: Sequence[tuple[str, Image.Image]]) -> list[str]:
    """Say which photographs are no good to calibrate on, or that there are too few."""
    flat = [name for name, image in photographs if all(low == high for low, high in _extremes(image))]
    notes = [f"calibrated on {', '.join(flat)} too, of one colour throughout: leave such images out"] if flat else []
    if len(photographs) - len(flat) < FEW_PHOTOGRAPHS:
        notes.append(
            f"calibrated on {len(photographs) - len(flat)} photographs only: {FEW_PHOTOGRAPHS} or more give ranges that hold on others"
        )
    return notes


def _extremes(image: Image.Image) -> list[tuple[int, int]]:
    return [band.getextrema() for band in image.convert("RGB").split()]  # type: ignore[misc]


def image_size(model: ModelProto, metadata: FileMetadata, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Return the height and width that a file takes, or those asked for where it leaves them open.

    Raises:
        InvalidArgumentError: if the file leaves them open and none are asked for.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    value = next(declared for declared in model.graph.input if declared.name not in constant)
    dimensions = value.type.tensor_type.shape.dim
    sides = [dimensions[axis].dim_value if len(dimensions) == 4 else 0 for axis in (2, 3)]
    height, width = sides[0] or metadata.height, sides[1] or metadata.width
    if height and width:
        return height, width
    if asked is None:
        raise InvalidArgumentError("the file leaves height and width open; give --resolution for the photographs")
    return asked
