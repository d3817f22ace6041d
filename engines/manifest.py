"""The manifest beside an engine: what it was built from, for what, by what."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fna.engines.look_inside.debug_tensors import DebugTensors, Place
from fna.engines.look_inside.layers import FnaLayer
from fna.errors import InputFileError, describe_validation_error
from fna.export.passes import Lowering
from fna.export.preprocessing import Preprocessing
from fna.files import file_sha256, write_text
from fna.plan import Plan

Backend = Literal["tensorrt", "tensorrt-rtx"]


class ShapeRange(BaseModel):
    """The smallest, usual and largest shape of one input."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


class Manifest(BaseModel):
    """What an engine file is.

    Attributes:
        backend: the TensorRT flavour.
        backend_version: its version; an engine runs on this version only, unless it is version compatible.
        targets: names of the device families that it was built for.
        compute_capabilities: times ten.
        onnx_name: file name of the ONNX model.
        onnx_sha256: of that file.
        engine_sha256: of the engine file.
        engine_bytes: its size.
        lowering: which lowering of the ONNX file was built.
        not_fused: why it is not the fused one that the runtime is usually given; empty where it is, or where one was asked for.
        plan: which blocks are FNA.
        precision: of weights and activations in the ONNX file.
        preprocessing: how photographs become the input.
        profiles: shapes by input name, of the first optimisation profile.
        more_profiles: the same for further optimisation profiles, one per further resolution.
        seconds: that the build took.
        layers_with_fna: names of the FNA nodes that the builder was given.
        layers: the same with what they became.
        inspection: how `layers` was filled: read from the engine, or why it could not be.
        hardware_compatible: whether the engine also runs on other chips from Ampere on.
        version_compatible: whether it also runs on later versions of the same major version.
        tf32: whether fp32 products may be computed in TF32.
        device: name of the GPU that it was built on; None where it was built without one.
        plugin_name: file name of the plugin library that it needs; None where it needs none.
        plugin_sha256: of that file.
        debug_tensors: which tensors the engine hands out while it runs; None where it was built without.
        places: the block boundaries among them; of `unfused`, those that may be among them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    backend: Backend
    backend_version: str
    targets: tuple[str, ...]
    compute_capabilities: tuple[int, ...]
    onnx_name: str
    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    lowering: Lowering
    not_fused: str = ""
    plan: Plan
    precision: str
    preprocessing: Preprocessing
    profiles: dict[str, ShapeRange]
    seconds: float
    layers_with_fna: tuple[str, ...]
    more_profiles: tuple[dict[str, ShapeRange], ...] = ()
    layers: tuple[FnaLayer, ...] = ()
    inspection: str = ""
    hardware_compatible: bool = False
    version_compatible: bool = False
    tf32: bool = False
    device: str | None = None
    plugin_name: str | None = None
    plugin_sha256: str | None = None
    debug_tensors: DebugTensors | None = None
    places: tuple[Place, ...] = ()


def manifest_path(engine: Path) -> Path:
    """Return where an engine's manifest lies."""
    return engine.with_name(engine.name + ".json")


def write_manifest(manifest: Manifest, engine: Path) -> None:
    """Write the manifest beside its engine."""
    write_text(manifest_path(engine), manifest.model_dump_json(indent=2) + "\n")


def read_manifest(engine: Path) -> Manifest:
    """Read an engine's manifest and compare the engine file with it.

    Raises:
        InputFileError: if engine or manifest is missing or damaged, or they do not belong together.
    """
    if not engine.is_file():
        raise InputFileError(f"{engine} does not exist; build it with fna build")
    path = manifest_path(engine)
    if not path.is_file():
        raise InputFileError(
            f"{path} is missing, so nothing says what {engine.name} is; build the engine with fna build"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise InputFileError(f"{path} is not a manifest: {describe_validation_error('manifest', error)}") from None
    if file_sha256(engine) != manifest.engine_sha256:
        raise InputFileError(
            f"{engine} is not the file that {path.name} describes (its SHA-256 differs); build it again"
        )
    return manifest
