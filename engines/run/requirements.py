"""What an engine needs of the machine that is to run it, checked before anything is deserialised."""

from __future__ import annotations

from pathlib import Path

from fna.engines.device import find_gpu
from fna.engines.flavours import FLAVOURS, default_plugin, import_flavour
from fna.engines.manifest import Manifest, read_manifest
from fna.engines.targets import capability_text
from fna.errors import MissingCapabilityError
from fna.files import file_sha256


def check_engine_can_run(path: Path, plugin: Path | None = None) -> Manifest:
    """Refuse an engine that this machine cannot run, before anything is deserialised.

    Args:
        path: the engine; its manifest lies beside it.
        plugin: the plugin library, for engines that need one; None is where `fna plugin` puts it.

    Raises:
        InputFileError: if engine and manifest are not there or do not belong together.
        MissingCapabilityError: if there is no GPU, no such TensorRT flavour, another version of it, another compute capability, or no
            plugin, or another one than the engine was built with.
    """
    manifest = read_manifest(path)
    title = FLAVOURS[manifest.backend].title
    gpu = find_gpu()
    if gpu is None:
        raise MissingCapabilityError(
            f"{path.name} needs an NVIDIA GPU of compute capability {capability_text(*manifest.compute_capabilities)}, "
            "but this machine has none (or no driver); copy it to such a machine, or run the ONNX file here"
        )
    portable = manifest.hardware_compatible and gpu.capability >= 80
    if gpu.capability not in manifest.compute_capabilities and not portable:
        raise MissingCapabilityError(
            f"{path.name} was built for compute capability {capability_text(*manifest.compute_capabilities)}, but this GPU has "
            f"{capability_text(gpu.capability)}; build it again with a matching --target"
        )
    installed = str(import_flavour(manifest.backend).__version__)
    if not _version_fits(manifest, installed):
        raise MissingCapabilityError(
            f"{path.name} was built by {title} {manifest.backend_version}, but {installed} is installed; "
            "engines run on their own version only: build it again here"
        )
    if manifest.plugin_sha256 is not None:
        library = plugin or default_plugin()
        if not library.is_file():
            raise MissingCapabilityError(
                f"{path.name} needs the plugin {library}, which does not exist; build it: fna plugin"
            )
        if file_sha256(library) != manifest.plugin_sha256:
            raise MissingCapabilityError(
                f"{path.name} was built with another {manifest.plugin_name} than {library} (its SHA-256 differs); build the engine "
                "again with this one"
            )
    return manifest


def _version_fits(manifest: Manifest, installed: str) -> bool:
    if installed == manifest.backend_version:
        return True
    built, here = ([int(part) for part in text.split(".")[:3]] for text in (manifest.backend_version, installed))
    return manifest.version_compatible and here[0] == built[0] and here >= built
