"""What a deployment bundle is, and opening one: every file is checked before any is used.

A bundle is a folder, or the same folder packed as `.tar.zst`. Its checksums show damage and mix-ups; they are no signature:
whoever can change a file can change them too. Compare `Bundle.digest` where that matters.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fna.engines.bundle.tolerances import TaskTolerance, Tolerance
from fna.engines.manifest import ShapeRange
from fna.engines.targets import Flavour
from fna.errors import InputFileError, describe_validation_error
from fna.export.metadata import FileMetadata
from fna.export.passes import Lowering
from fna.files import file_sha256

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
BUILD_FOLDER = "build"
"""What the bundle's scripts make on the device lands in this folder of the bundle; it is not part of it."""

FORMAT: Literal[1] = 1
ARCHIVE_SUFFIX = ".tar.zst"

_LARGEST_MANIFEST = 16 * 2**20
_LARGEST_ARCHIVE = 256 * 2**30  # bytes unpacked; reading ends there, whatever a damaged or hostile archive claims


class BundledModel(BaseModel):
    """One ONNX file of the bundle.

    Attributes:
        path: inside the bundle.
        weights: the file that holds its tensors; all forms of a precision share it.
        lowering: the form, as in `fna.engines.lowerings`.
        precision: of weights and activations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    weights: str | None
    lowering: Lowering
    precision: str


class PluginLayer(BaseModel):
    """A node that a TensorRT plugin implements.

    Attributes:
        name: of the node; TensorRT keeps it in the layer's name.
        op_type: of the node.
        precision: the type it has to run in, by precision of the file; `unknown` where type inference does not say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    op_type: str
    precision: dict[str, str]


class BundledPlugin(BaseModel):
    """The plugin as it travels.

    Attributes:
        chips: that the kernel table holds compiled kernels for, 87 for sm_87; 0 is PTX for any from sm_80 on.
        prebuilt: machines that a compiled library is there for, `aarch64` or `x86_64`.
        layers: the nodes that it has to run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chips: tuple[int, ...]
    prebuilt: tuple[str, ...]
    layers: tuple[PluginLayer, ...]


class Check(BaseModel):
    """The recorded inputs and outputs.

    Attributes:
        images: names of the photographs.
        inputs: file of each graph input.
        outputs: file of each graph output.
        reference: what computed the outputs: FNA in PyTorch fp32, or, for grafted files, onnxruntime on the file itself.
        tolerances: by precision, of outputs that are not among `tasks`.
        tasks: of outputs in 8 bits whose task is known, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: tuple[str, ...]
    inputs: dict[str, str]
    outputs: dict[str, str]
    reference: Literal["pytorch", "onnxruntime"]
    tolerances: dict[str, Tolerance]
    tasks: dict[str, TaskTolerance] = Field(default_factory=dict)


class BundledFile(BaseModel):
    """Size and SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class BundleManifest(BaseModel):
    """What a bundle holds, and what it was made from.

    Attributes:
        version: of this format.
        name: of the bundle, and of the folder that its archive unpacks to.
        tools: versions of what wrote it.
        target: name of the device family.
        capabilities: its compute capabilities times ten.
        flavours: which TensorRT exists there, with the lowest version that does.
        lowering: the form that the device's first runtime is given in its lowest version; the scripts choose by the version there.
        precision: the default of `build_engine.sh`.
        profiles: shapes by input name.
        dynamic: whether any of those inputs has an open dimension.
        onnx_name: file that the bundle was made from.
        onnx_sha256: of that file.
        metadata: what that file says about itself: plan, preprocessing, source.
        models: the ONNX files.
        plugin: None where the target has none.
        check: the recorded inputs and outputs.
        files: every file but the manifest and SHA256SUMS, by path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = FORMAT
    name: str
    tools: dict[str, str]
    target: str
    capabilities: tuple[int, ...]
    flavours: dict[Flavour, str]
    lowering: Lowering
    precision: str
    profiles: dict[str, ShapeRange]
    dynamic: bool
    onnx_name: str
    onnx_sha256: str
    metadata: FileMetadata
    models: tuple[BundledModel, ...]
    plugin: BundledPlugin | None
    check: Check
    files: dict[str, BundledFile]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file was there and had its SHA-256 when it was opened.

    An archive is unpacked to a temporary folder, which goes when the bundle is closed (as a context manager) or collected.

    Attributes:
        root: the folder that it lies in.
        manifest: what it holds.
        digest: SHA-256 of SHA256SUMS, which covers every other file: two bundles with equal digests are equal.
    """

    root: Path
    manifest: BundleManifest
    digest: str
    _temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that it holds models in, the default first."""
        return tuple(dict.fromkeys((self.manifest.precision, *(model.precision for model in self.manifest.models))))

    def model(self, lowering: Lowering, precision: str | None = None) -> Path:
        """Return one of its ONNX files; the default precision if None.

        Raises:
            InputFileError: if it holds no such model.
        """
        wanted = precision or self.manifest.precision
        for model in self.manifest.models:
            if (model.lowering, model.precision) == (lowering, wanted):
                return self.root / model.path
        raise InputFileError(
            f"bundle {self.manifest.name} holds no {lowering} model in {wanted}; it has {', '.join(self.precisions)}"
        )

    def recorded_inputs(self) -> dict[str, NDArray[Any]]:  # each [images, ...], fp32
        """Return the recorded inputs by name."""
        return {name: self._array(path) for name, path in self.manifest.check.inputs.items()}

    def recorded_outputs(self) -> dict[str, NDArray[Any]]:  # each [images, ...], fp32
        """Return the recorded outputs by name."""
        return {name: self._array(path) for name, path in self.manifest.check.outputs.items()}

    def _array(self, path: str) -> NDArray[Any]:
        return np.load(self.root / path, allow_pickle=False)


def is_bundle(path: Path) -> bool:
    """Whether a path looks like a bundle: a folder with a manifest, or a file named `.tar.zst`."""
    return path.name.endswith(ARCHIVE_SUFFIX) or (path / MANIFEST).is_file()


def open_bundle(path: Path) -> Bundle:
    """Check a bundle, whole, and open it. A folder is used where it is; an archive is unpacked to a temporary folder.

    Args:
        path: a folder that `fna bundle` wrote, or a `.tar.zst` file.

    Raises:
        InputFileError: if it is no bundle, of another format version, or a file in it is missing, changed, truncated,
            unlisted, or not a plain file with a path inside the bundle. The message names the file.
    """
    if path.is_dir():
        return _checked(path, path)
    if not path.is_file():
        raise InputFileError(f"{path} does not exist; give a bundle: a folder or {ARCHIVE_SUFFIX} file from fna bundle")
    if not path.name.endswith(ARCHIVE_SUFFIX):
        raise InputFileError(f"{path} is no bundle; give a folder or {ARCHIVE_SUFFIX} file from fna bundle")
    temporary = tempfile.TemporaryDirectory(prefix="fna-bundle-")
    try:
        root = unpack_bundle(path, Path(temporary.name))
        return _checked(root, path, temporary)
    except BaseException:
        temporary.cleanup()
        raise


def unpack_bundle(archive: Path, folder: Path) -> Path:
    """Unpack an archive into `folder` and return the bundle's folder in it.

    Only what the archive's own manifest lists is written, as plain files at paths inside the bundle, each at most as long as
    listed.

    Raises:
        InputFileError: if the archive is damaged, or holds anything else; the message names the member.
    """
    manifest, top = _read_archived_manifest(archive)
    sizes = {name: file.bytes for name, file in manifest.files.items()}
    sizes |= {MANIFEST: _LARGEST_MANIFEST, CHECKSUMS: _LARGEST_MANIFEST}
    written: set[str] = set()
    with _damage_said(archive), _open_archive(archive) as tar:
        for member in tar:
            name = _inner_path(archive, member, top)
            if name is not None:
                _unpack_member(archive, tar, member, folder / top, name, sizes, written)
    return folder / top


def checksum_lines(files: dict[str, BundledFile], manifest_text: str) -> str:
    """Return the text of SHA256SUMS, as `sha256sum -c` reads it: every file, and the manifest."""
    sums = {name: file.sha256 for name, file in files.items()}
    sums[MANIFEST] = hashlib.sha256(manifest_text.encode()).hexdigest()
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def list_files(root: Path) -> list[str]:
    """Return the paths of a bundle folder's files, sorted, without what was built in it.

    Raises:
        InputFileError: if there is anything but plain files and folders in it, such as a link.
    """
    names = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name.split("/")[0] == BUILD_FOLDER:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputFileError(f"{root}: {name} is a link or special file, which no bundle holds; make it again")
        if path.is_file():
            names.append(name)
    return names


def safe_name(name: str) -> str:
    """Return a name that is good as a file name everywhere: letters, digits and ._+- only."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", name).strip(".") or "model"


def _checked(root: Path, shown: Path, temporary: tempfile.TemporaryDirectory[str] | None = None) -> Bundle:
    try:
        text = (root / MANIFEST).read_text(encoding="utf-8")
        sums = (root / CHECKSUMS).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise InputFileError(
            f"{shown} has no {missing}, so it is no bundle or not a whole one; make it again"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{shown} cannot be read: {error}") from None
    manifest = _parse_manifest(text, str(shown))
    present = set(list_files(root)) - {MANIFEST, CHECKSUMS}
    for name in sorted(present - set(manifest.files)):
        raise InputFileError(f"{shown}: {name} is not listed in its {MANIFEST}; remove it or make the bundle again")
    for name, file in sorted(manifest.files.items()):
        _check_name(shown, name)
        if name not in present:
            raise InputFileError(f"{shown}: {name} is missing; copy the bundle again")
        size = (root / name).stat().st_size
        if size != file.bytes:
            raise InputFileError(
                f"{shown}: {name} has {size} bytes, but {file.bytes} are listed; copy the bundle again"
            )
        if file_sha256(root / name) != file.sha256:
            raise InputFileError(f"{shown}: {name} was changed (its SHA-256 differs); copy the bundle again")
    if sums != checksum_lines(manifest.files, text):
        raise InputFileError(f"{shown}: {CHECKSUMS} does not agree with {MANIFEST}; copy the bundle again")
    return Bundle(root, manifest, hashlib.sha256(sums.encode()).hexdigest(), temporary)


def _parse_manifest(text: str, shown: str) -> BundleManifest:
    try:
        return BundleManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("version",):
            raise InputFileError(
                f"{shown} has bundle format {first['input']}, but this version of fna reads {FORMAT}; "
                "make the bundle again with this version"
            ) from None
        raise InputFileError(f"{shown}: {describe_validation_error(MANIFEST, error)}") from None


def _check_name(shown: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or not name.isprintable():
        raise InputFileError(f"{shown}: {name!r} is not a path inside the bundle; this is no bundle of fna's")


def _read_archived_manifest(archive: Path) -> tuple[BundleManifest, str]:
    with _damage_said(archive), _open_archive(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            content = tar.extractfile(member) if member.isfile() and len(parts) == 2 and parts[1] == MANIFEST else None
            if content is not None:
                _check_name(archive, member.name)
                text = content.read(_LARGEST_MANIFEST).decode("utf-8", errors="replace")
                return _parse_manifest(text, str(archive)), parts[0]
    raise InputFileError(f"{archive} has no {MANIFEST}, so it is no bundle; make it with fna bundle")


def _unpack_member(
    archive: Path,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    folder: Path,
    name: str,
    sizes: dict[str, int],
    written: set[str],
) -> None:
    if name not in sizes:
        raise InputFileError(f"{archive}: {name} is not listed in its {MANIFEST}; make the bundle again")
    if name in written:
        raise InputFileError(f"{archive}: {name} is in it twice; make the bundle again")
    if member.size > sizes[name]:
        raise InputFileError(
            f"{archive}: {name} has {member.size} bytes, but its {MANIFEST} says {sizes[name]}; make the bundle again"
        )
    written.add(name)
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    content = tar.extractfile(member)
    if content is not None:
        with place.open("wb") as output:
            shutil.copyfileobj(content, output)
        place.chmod(0o755 if member.mode & 0o100 else 0o644)


def _inner_path(archive: Path, member: tarfile.TarInfo, top: str) -> str | None:
    """Return a member's path inside the bundle, None for a folder; refuse everything else."""
    _check_name(archive, member.name)
    if not (member.isfile() or member.isdir()):
        raise InputFileError(f"{archive}: {member.name} is a link or special file, which no bundle holds")
    parts = PurePosixPath(member.name).parts
    if parts[0] != top:
        raise InputFileError(f"{archive}: {member.name} is outside its folder {top}; this is no bundle of fna's")
    return None if member.isdir() else "/".join(parts[1:])


@contextmanager
def _open_archive(archive: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive as a stream, so that nothing of it is believed before it is read."""
    import zstandard

    with (
        archive.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as unpacked,
        tarfile.open(fileobj=_Limited(unpacked), mode="r|") as tar,
    ):
        yield tar


@contextmanager
def _damage_said(archive: Path) -> Iterator[None]:
    """Say in one line what is wrong with an archive that cannot be read."""
    import zstandard

    try:
        yield
    except (tarfile.TarError, zstandard.ZstdError, EOFError, OSError, ValueError) as error:
        raise InputFileError(f"{archive} is damaged or truncated: {error}; copy the bundle again") from None


class _Limited(io.RawIOBase):
    """A stream that ends with an error rather than unpack without end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._left = _LARGEST_ARCHIVE

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it unpacks to more than {_LARGEST_ARCHIVE} bytes")
        return data
