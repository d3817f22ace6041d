"""The same model in another precision: from an fp32 FNA file to fp16, bf16 or int8, with the photographs that this needs."""

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
from fna.export.passes.precision import cast_model
from fna.export.passes.quantize import quantize_model
from fna.export.passes.ranges import find_overflows, measure_ranges
from fna.files import load_onnx, save_model
from fna.precision import Precision


@dataclass(frozen=True)
class FileVariant:
    """What to make of a file.

    Attributes:
        precision: of weights and activations.
        int8: whether the linear layers compute in int8; attention is left in `precision`.
        keep_fp32: numbers of blocks that stay fp32 throughout.
        keep_io: whether inputs and outputs stay fp32.
        check: whether an fp16 file's values are checked against fp16's range on the photographs.
    """

    precision: Precision = "fp32"
    int8: bool = False
    keep_fp32: tuple[int, ...] = ()
    keep_io: bool = True
    check: bool = True

    @property
    def changes(self) -> bool:
        """Whether it differs from the fp32 file."""
        return self.int8 or self.precision != "fp32"

    @property
    def label(self) -> str:
        """What file names say: fp16, bf16, int8, int8-fp16 or int8-bf16."""
        if not self.int8:
            return self.precision
        return "int8" if self.precision == "fp32" else f"int8-{self.precision}"


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
        photographs: by name; int8 is calibrated and fp16's range checked on them.
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
    if variant.int8 or (variant.precision == "fp16" and variant.check):
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
    if variant.int8:
        on_step(f"quantising to int8 on {len(pixels)} photographs")
        quantized = quantize_model(model, pixels, keep=variant.keep_fp32, name=str(source))
        result = quantized.model
        notes += quantized.notes
    if variant.precision != "fp32":
        on_step(f"casting to {variant.precision}")
        result = cast_model(
            result, variant.precision, keep_fp32=variant.keep_fp32, keep_io=variant.keep_io, name=str(source)
        )
    save_model(result, output)
    return notes


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
