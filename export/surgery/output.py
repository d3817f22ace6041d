"""What graft leaves behind: the file, its external data, and in it what was done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

import fna
from fna.errors import InputFileError
from fna.export.metadata import FileMetadata, write_metadata
from fna.export.passes.eight_bit import quantized_types
from fna.export.preprocessing import Preprocessing
from fna.export.surgery.graph.files import all_tensors, external_file, one_line
from fna.export.surgery.recognise.rows import Decision, Row
from fna.export.types import PRECISION_OF
from fna.files import file_sha256, written_whole
from fna.plan import Plan
from fna.precision import Precision


def describe_graft(
    model: ModelProto,
    rows: Sequence[Row],
    plan: Plan,
    prefix_tokens: int | None,
    source: str,
    sha256: str | None,
    data_sha256: dict[str, str],
) -> None:
    """Say in a model what was done to it: the plan, the table, what it was made from and that file's SHA-256."""
    numbers = {row.block for row in rows if row.decision is Decision.REPLACED}
    kept = plan.only(numbers).model_copy(
        update={
            "num_blocks": len(rows),
            "prefix_tokens": plan.prefix_tokens if plan.prefix_tokens is not None else prefix_tokens,
        }
    )
    height, width = find_image_size(model)
    metadata = FileMetadata(
        plan=kept,
        preprocessing=_known_preprocessing(model),
        source=source,
        origin="graft",
        precision=_precision(model),
        quantized=quantized_types(model),
        height=height,
        width=width,
        patch_size=_patch_size(model),
        tools={"fna": fna.__version__, "onnx": onnx.__version__},
        original_sha256=sha256,
        original_data_sha256=data_sha256 or None,
        attention_table=[row.as_dict() for row in rows],
    )
    write_metadata(model, metadata)


def _image_input(model: ModelProto) -> onnx.ValueInfoProto | None:
    names = {tensor.name for tensor in model.graph.initializer}
    images = [
        value for value in model.graph.input if value.name not in names and len(value.type.tensor_type.shape.dim) == 4
    ]
    return images[0] if images else None


def find_image_size(model: ModelProto) -> tuple[int | None, int | None]:
    """Height and width of a file's image input; None where they are open, or there is no such input."""
    image = _image_input(model)
    if image is None:
        return None, None
    sizes = [dim.dim_value or None for dim in image.type.tensor_type.shape.dim[2:]]
    return sizes[0], sizes[1]


def _patch_size(model: ModelProto) -> int | None:
    """The stride of the convolution that reads the image."""
    image = _image_input(model)
    if image is None:
        return None
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] == image.name:
            strides = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "strides"), None)
            return int(strides[0]) if strides and strides[0] == strides[-1] else None
    return None


def _known_preprocessing(model: ModelProto) -> Preprocessing:
    """The preprocessing that an earlier run of this project left in the file; else the usual one."""
    for pair in model.metadata_props:
        if pair.key == "fna.preprocessing":
            try:
                return Preprocessing.model_validate_json(pair.value)
            except ValueError:
                break
    return Preprocessing()


def _precision(model: ModelProto) -> Precision:
    """The type of most weights."""
    sizes = dict.fromkeys(PRECISION_OF, 0.0)
    for tensor in model.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += float(np.prod(tensor.dims, dtype=np.float64))
    most = max(sizes, key=lambda kind: sizes[kind])
    return PRECISION_OF[most]


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that cannot be written, before any work is done.

    Raises:
        InputFileError: with what stands in the way.
    """
    if output.exists() and output.is_dir():
        raise InputFileError(f"{output} is a folder; give the path of the file to write")
    if not output.parent.is_dir():
        raise InputFileError(f"the folder {output.parent} does not exist; make it first")
    if not os.access(output.parent, os.W_OK):
        raise InputFileError(f"the folder {output.parent} cannot be written to")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputFileError(f"{output} is the input file; give another name for the output")


def write_beside_its_data(model: ModelProto, folder: Path, output: Path) -> None:
    """Write a model whole or not at all; external data that lies elsewhere is copied beside it.

    Raises:
        InputFileError: if it cannot be written.
    """
    try:
        content = model.SerializeToString()
    except Exception as error:
        raise InputFileError(f"the model cannot be written: {one_line(error)}") from None
    try:
        if folder.resolve() != output.parent.resolve():
            _copy_external_data(model, folder, output.parent)
        _write_bytes(content, output)
    except OSError as error:
        raise InputFileError(f"{output} cannot be written: {one_line(error)}") from None


def _write_bytes(content: bytes, output: Path) -> None:
    with written_whole(output) as temporary:
        temporary.write_bytes(content)


def external_files(model: ModelProto, folder: Path) -> list[Path]:
    """Files beside a model that hold its weights."""
    files = {
        external_file(tensor, folder) for tensor in all_tensors(model) if tensor.data_location == TensorProto.EXTERNAL
    }
    return sorted(files)


def _copy_external_data(model: ModelProto, folder: Path, target: Path) -> None:
    for path in external_files(model, folder):
        destination = target / path.relative_to(folder)
        if destination.exists():
            if destination.stat().st_size == path.stat().st_size and file_sha256(destination) == file_sha256(path):
                continue
            raise InputFileError(
                f"external data file {destination} exists and is another; choose another output folder"
            )
        destination.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(destination) as partial:
            shutil.copyfile(path, partial)
