"""Which shapes of its inputs an engine takes."""

from __future__ import annotations

from onnx import ModelProto, ValueInfoProto

from fna.engines.builder.options import DEFAULT_BATCH, BatchRange
from fna.engines.manifest import ShapeRange
from fna.errors import BuildError, InvalidArgumentError
from fna.export.metadata import FileMetadata


def input_profiles(
    model: ModelProto, batch: BatchRange | None, metadata: FileMetadata, size: tuple[int, int] | None = None
) -> dict[str, ShapeRange]:
    """Return the shapes of each input of an image model; `size` is the height and width of files that leave them open.

    Without `batch`, they are `DEFAULT_BATCH`, or the file's own where that is fixed.

    Raises:
        BuildError: for an input that is no batch of images, or whose size is not known.
        InvalidArgumentError: for a batch range or a size that the file does not take.
    """
    return {value.name: _shape_range(value, batch, metadata, size) for value in _real_inputs(model)}


def check_size(known: tuple[int | None, int | None], asked: tuple[int, int]) -> None:
    """Refuse a height and width that a file does not take; None stands for a side that it leaves open.

    Raises:
        InvalidArgumentError: with both.
    """
    if any(side not in (None, number) for side, number in zip(known, asked, strict=True)):
        sides = "x".join("any" if side is None else str(side) for side in known)
        raise InvalidArgumentError(
            f"the file takes {sides} images only, but --resolution asks for {asked[0]}x{asked[1]}; "
            "export it with --dynamic-size, or at that resolution"
        )


def _real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Inputs that are not initializers; files below IR version 4 list those as inputs too."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constant]


def _shape_range(
    value: ValueInfoProto, batch: BatchRange | None, metadata: FileMetadata, size: tuple[int, int] | None
) -> ShapeRange:
    dimensions = value.type.tensor_type.shape.dim
    fixed = [dimension.dim_value if dimension.HasField("dim_value") else None for dimension in dimensions]
    if len(fixed) != 4 or fixed[1] is None:
        raise BuildError(f"input {value.name!r} is not [batch, 3, height, width]; only image models can be built")
    height, width = _image_size(value.name, (fixed[2], fixed[3]), size, metadata)
    channels = fixed[1]
    if fixed[0] is None:
        asked = batch or DEFAULT_BATCH
        counts = (asked.smallest, asked.usual, asked.largest)
    else:
        counts = (fixed[0],) * 3
        if batch is not None and (batch.smallest, batch.largest) not in ((1, 1), counts[:2]):
            raise InvalidArgumentError(
                f"the file's batch size is fixed at {fixed[0]}; export it with a dynamic batch to use --batch"
            )
    smallest, usual, largest = ((count, channels, height, width) for count in counts)
    return ShapeRange(smallest=smallest, usual=usual, largest=largest)


def _image_size(
    name: str, fixed: tuple[int | None, int | None], asked: tuple[int, int] | None, metadata: FileMetadata
) -> tuple[int, int]:
    known = fixed[0] or metadata.height, fixed[1] or metadata.width
    if asked is not None:
        check_size(known, asked)
        return asked
    if known[0] is None or known[1] is None:
        raise BuildError(
            f"input {name!r} leaves height and width open; give --resolution (it may be repeated), or export with a fixed one"
        )
    return known[0], known[1]
