"""Reading and writing files: errors in one line, and outputs that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fna.errors import BuildError, InputFileError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto

LARGEST_SINGLE_FILE = 2_000_000_000
"""Bytes; a protobuf message ends at 2 GiB, and the graph needs room beside the tensors."""


def load_onnx(path: Path, *, tensors: bool = True) -> ModelProto:
    """Read an ONNX file.

    Args:
        path: the file.
        tensors: whether to load external data as well; without it the references stay in the model.

    Raises:
        InputFileError: if it is missing, empty, or not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file; give an ONNX file")
    if path.stat().st_size == 0:
        raise InputFileError(f"{path} is empty; give an ONNX file")
    try:
        model = onnx.load(path, load_external_data=tensors)
    except (DecodeError, OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputFileError(f"{path} cannot be read as an ONNX model: {first_line(error)}") from None
    if not model.graph.node or not model.graph.output:
        raise InputFileError(f"{path} is not an ONNX model: it has no graph")
    return model


def save_model(model: ModelProto, path: Path) -> None:
    """Check a model and write it; tensors go to `<path>.data` where the file would exceed 2 GB.

    Raises:
        InputFileError: if the file cannot be written there.
        BuildError: if `onnx.checker`, shape inference included, refuses the model.
    """
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    with written_whole(path) as temporary:
        if size <= LARGEST_SINGLE_FILE:
            temporary.write_bytes(model.SerializeToString())
            _check(temporary)
            return
        with written_whole(path.with_name(f"{path.name}.data")) as data:
            _save_with_external_data(model, temporary, data)
            _check(temporary)
            _rename_external_data(model, f"{path.name}.data")
            temporary.write_bytes(model.SerializeToString())


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if nothing was raised.

    Raises:
        InputFileError: if `path` is a folder, or its folder does not exist or is not writable.
    """
    temporary = _make_part(path)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, in which something is made that is then renamed to `path` as a whole.

    Raises:
        InputFileError: if the folder that `path` is in does not exist.
    """
    parent = require_parent(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=parent) as folder:
        yield Path(folder)


def require_parent(path: Path) -> Path:
    """Return the folder that `path` is in.

    Raises:
        InputFileError: if it does not exist.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise InputFileError(f"{path} cannot be written: {parent} is no folder; make it first")
    return parent


def check_writable(path: Path) -> None:
    """Refuse an output path before the long work that would fill it; the error is that of `written_whole`."""
    _make_part(path).unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        InputFileError: if it cannot be written there.
    """
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_part(path: Path) -> Path:
    if path.is_dir():
        raise InputFileError(f"{path} cannot be written: it is a folder; give a file name")
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be written: {error.strerror}; give a folder that exists and is writable"
        ) from None
    os.close(descriptor)
    return Path(name)


def _check(path: Path) -> None:
    import onnx.shape_inference

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise BuildError(f"the model does not pass onnx.checker, so nothing was written: {reason}") from error


def _save_with_external_data(model: ModelProto, path: Path, data: Path) -> None:
    import onnx

    data.unlink()  # onnx appends to a file that is there
    onnx.external_data_helper.convert_model_to_external_data(model, location=data.name, size_threshold=1024)
    onnx.save(model, path)


def _rename_external_data(model: ModelProto, name: str) -> None:
    for tensor in model.graph.initializer:
        for field in tensor.external_data:
            if field.key == "location":
                field.value = name
