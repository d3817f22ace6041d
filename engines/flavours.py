"""What differs between the two TensorRT flavours, `tensorrt` and `tensorrt-rtx`; all else of their Python API is one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fna.engines.device import Gpu, find_gpu
from fna.engines.targets import TARGETS, Flavour, Target, capability_text
from fna.errors import InvalidArgumentError, MissingCapabilityError
from fna.machine import read_lines
from fna.plugins.built import LIBRARY, library_folder


@dataclass(frozen=True)
class FlavourInfo:
    """How a flavour is called and imported, and the extra of this project that has it."""

    name: Flavour
    title: str
    module: str
    extra: str


FLAVOURS: dict[str, FlavourInfo] = {
    "tensorrt": FlavourInfo("tensorrt", "TensorRT", "tensorrt", "tensorrt"),
    "tensorrt-rtx": FlavourInfo("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "rtx"),
}

_FIRST_WITH_NEW_PYTHON = 38
"""Release of Jetson Linux from which on (JetPack 7) its Python, 3.12, is new enough; that of JetPack 6 is R36 with 3.10."""


def how_to_install(name: str) -> str:
    """Return what to do on this machine where a flavour cannot be imported."""
    release = jetson_linux() if name == "tensorrt" else None
    if release is None:
        return f"install it with: pip install 'fna[{FLAVOURS[name].extra}]'"
    if release < _FIRST_WITH_NEW_PYTHON:
        return (
            f"JetPack's module (Jetson Linux R{release}) is for its own Python 3.10, and fna needs 3.11: make a bundle with "
            "fna bundle, elsewhere, and build from it here; it needs no Python"
        )
    return "JetPack has it for its own Python: apt-get install python3-libnvinfer, and python3 -m venv --system-site-packages"


def jetson_linux() -> int | None:
    """Return the release of Jetson Linux that this machine runs, 36 for R36; None on other machines."""
    found = re.search(r"\bR(\d+)\b", " ".join(read_lines("/etc/nv_tegra_release")))
    return None if found is None else int(found[1])


def import_flavour(name: Flavour) -> Any:
    """Return the Python module of a flavour.

    Raises:
        MissingCapabilityError: if it is not installed, or its libraries do not load.
    """
    info = FLAVOURS[name]
    try:
        return import_module(info.module)
    except (ImportError, OSError) as error:
        raise MissingCapabilityError(f"{info.title} cannot be imported ({error}); {how_to_install(name)}") from None


def make_logger(trt: Any, messages: list[str]) -> Any:
    """Return a TensorRT logger that collects errors and drops the rest."""

    class CollectingLogger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    return CollectingLogger()


def choose_targets(name: Flavour, targets: Sequence[Target]) -> tuple[Target, ...]:
    """Return the targets to build for: those given, or all that TensorRT-RTX takes, or the device that TensorRT runs on.

    Raises:
        InvalidArgumentError: if a target does not take this flavour, or TensorRT is to build for another device than this.
        MissingCapabilityError: if TensorRT is to build on a machine without a GPU.
    """
    title = FLAVOURS[name].title
    for target in targets:
        if name not in target.flavours:
            reason = f" ({target.limits})" if target.limits else ""
            usable = ", ".join(other.name for other in TARGETS if name in other.flavours)
            instead = f"; fna bundle --target {target.name} makes what builds there" if target.flavours else ""
            raise InvalidArgumentError(
                f"{title} does not build for {target.name}{reason}; it builds for {usable}{instead}"
            )
    if name == "tensorrt-rtx":
        return tuple(targets) or tuple(target for target in TARGETS if name in target.flavours)
    gpu = find_gpu()
    if gpu is None:
        raise MissingCapabilityError(
            "TensorRT times kernels on the GPU that it builds for, but this machine has none (or no driver); make a bundle "
            "with fna bundle and build on the device, or build for an RTX GPU with --backend tensorrt-rtx"
        )
    if not targets:
        return (_target_of(gpu),)
    for target in targets:
        if gpu.capability not in target.capabilities:
            raise InvalidArgumentError(
                f"TensorRT builds for the GPU it runs on, {gpu.name} (compute capability {capability_text(gpu.capability)}), not for "
                f"{target.name} ({capability_text(*target.capabilities)}); make a bundle with fna bundle and build there"
            )
    return tuple(targets)


def set_devices(trt: Any, config: Any, name: Flavour, targets: Sequence[Target]) -> None:
    """Name the devices in a builder configuration; TensorRT takes the one it runs on and is told nothing."""
    if name != "tensorrt-rtx":
        return
    capabilities = capabilities_of(targets)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)


def capabilities_of(targets: Sequence[Target]) -> tuple[int, ...]:
    """Return all compute capabilities, ascending, times ten."""
    return tuple(sorted({capability for target in targets for capability in target.capabilities}))


def default_plugin() -> Path:
    """Return where `fna plugin` puts the library for this machine."""
    return library_folder() / LIBRARY


def load_plugins(trt: Any, library: Path, operators: Sequence[tuple[str, str]]) -> None:
    """Load the plugin library into TensorRT's registry, once: a second load would fail on names that are taken.

    Args:
        trt: the flavour's module.
        library: libfna_plugin.so, built for this machine.
        operators: (operator, version) that must be there afterwards.

    Raises:
        MissingCapabilityError: if the library is missing, does not load, or lacks an operator.
    """
    registry = trt.get_plugin_registry()
    if _missing_creators(registry, operators):
        if not library.is_file():
            raise MissingCapabilityError(f"the plugin {library} does not exist; build it: fna plugin")
        registry.load_library(str(library.resolve()))
    missing = _missing_creators(registry, operators)
    if missing:
        raise MissingCapabilityError(
            f"the plugin {library} did not bring {', '.join(f'{name} version {version}' for name, version in missing)}; "
            "build it again on this machine: fna plugin"
        )


def _missing_creators(registry: Any, operators: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    there = {
        (creator.name, creator.plugin_version) for creator in registry.all_creators if creator.plugin_namespace == ""
    }
    return [operator for operator in operators if operator not in there]


def timing_cache_name(name: Flavour, version: str, gpu: Gpu) -> str:
    """Return the file name of a device's timing cache: timings are of one GPU and one version only."""
    device = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return f"{name}-{version}-sm{gpu.capability}-{device}.timing"


def _target_of(gpu: Gpu) -> Target:
    """Return the target that a GPU is: of one capability, the one whose memory is nearest."""
    matching = [target for target in TARGETS if gpu.capability in target.capabilities and "tensorrt" in target.flavours]
    if not matching:
        raise MissingCapabilityError(
            f"{gpu.name} has compute capability {capability_text(gpu.capability)}, which is none of the targets'; "
            f"those are {', '.join(target.name for target in TARGETS)}"
        )
    return min(matching, key=lambda target: abs(target.memory_gib * 2**30 - gpu.memory_bytes))
