"""What a file of this project says about itself: `metadata_props` with keys `fna.*`."""

from __future__ import annotations

import json
from typing import Any, Literal

from onnx import ModelProto
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fna.errors import InputFileError, describe_validation_error
from fna.export.preprocessing import Preprocessing
from fna.plan import Plan
from fna.precision import Precision

PREFIX = "fna."

QuantizedTypes = Literal["int8", "fp8", "int8+fp8"]


class FileMetadata(BaseModel):
    """The metadata of a traced or grafted ONNX file.

    Attributes:
        plan: the plan that the file was made by, prefix tokens filled in.
        preprocessing: how photographs become the input.
        source: the model name, or the grafted file's name.
        origin: which command wrote the file.
        precision: of weights and activations.
        fp32_blocks: blocks that stay fp32 although `precision` says otherwise.
        quantized: type that the linear layers compute in, where it is not `precision`.
        height: of the input in pixels; None where it is dynamic.
        width: of the input in pixels; None where it is dynamic.
        patch_size: pixels along a patch's side; None where it is not known.
        token_outputs: graph outputs that are `[B, N, C]` tokens.
        map_outputs: graph outputs that are one-channel maps.
        tools: versions of what wrote the file.
        original_sha256: of the file that was grafted.
        original_data_sha256: of that file's external data files, by name, where it has any.
        attention_table: what graft found in that file, one entry per attention block; see `fna.export.surgery`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: Plan
    preprocessing: Preprocessing = Field(default_factory=Preprocessing)
    source: str
    origin: Literal["trace", "graft"]
    precision: Precision = "fp32"
    fp32_blocks: tuple[int, ...] = ()
    quantized: QuantizedTypes | None = None
    height: int | None = None
    width: int | None = None
    patch_size: int | None = None
    token_outputs: tuple[str, ...] = ()
    map_outputs: tuple[str, ...] = ()
    tools: dict[str, str] = Field(default_factory=dict)
    original_sha256: str | None = None
    original_data_sha256: dict[str, str] | None = None
    attention_table: list[dict[str, Any]] | None = None


def write_metadata(model: ModelProto, metadata: FileMetadata) -> None:
    """Replace the `fna.*` keys of `model`; other metadata stays. Strings are written as they are, the rest as JSON."""
    kept = [written for written in model.metadata_props if not written.key.startswith(PREFIX)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in metadata.model_dump(mode="json", exclude_none=True).items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=PREFIX + key, value=text)


def has_metadata(model: ModelProto) -> bool:
    """Return whether this project wrote a file."""
    return any(written.key.startswith(PREFIX) for written in model.metadata_props)


def read_metadata(model: ModelProto, name: str) -> FileMetadata:
    """Read the `fna.*` keys; `name` says in errors which file it was.

    Raises:
        InputFileError: if the file was not written by this project, or its metadata is damaged.
    """
    raw = {
        written.key.removeprefix(PREFIX): written.value
        for written in model.metadata_props
        if written.key.startswith(PREFIX)
    }
    if not raw:
        raise InputFileError(f"{name} has no fna metadata; write it with fna export or fna graft")
    texts = {"source", "origin", "precision", "quantized", "original_sha256"}
    try:
        values = {key: text if key in texts else json.loads(text) for key, text in raw.items()}
        return FileMetadata.model_validate_json(
            json.dumps(values)
        )  # as a file: what a plan leaves out has a meaning there
    except (json.JSONDecodeError, ValidationError) as error:
        reason = describe_validation_error("metadata", error) if isinstance(error, ValidationError) else str(error)
        raise InputFileError(f"{name} has damaged fna metadata ({reason}); export it again") from None
