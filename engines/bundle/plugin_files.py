"""The plugin in a bundle: its sources, the kernels of the device's chips, and the libraries that were built."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import fna.plugins
from fna.engines.bundle.format import PluginLayer
from fna.engines.targets import Target
from fna.errors import MissingCapabilityError
from fna.plugins.built import KERNEL_FILE, LIBRARIES, LIBRARY, MACHINES
from fna.plugins.table.chips import FALLBACK, chip_name
from fna.plugins.table.kernel_file import CompiledKernel, join_kernels, packed_image, without_kernels
from fna.plugins.table.read import load_table
from fna.plugins.table.write import write_library_files

REGISTER_SOURCE = "register.cpp"
"""The source that is not part of libfna_plugin.so, but of the self-registering library."""

_PLUGIN_SOURCES = Path(fna.plugins.__file__).resolve().parent


def choose_kernels(target: Target, folder: Path, has_layers: bool) -> list[CompiledKernel] | None:
    """Return the compiled kernels for the target's chips and the PTX; None where the target or the file needs none.

    Args:
        target: the device.
        folder: that `fna plugin` wrote.
        has_layers: whether the file has nodes that the plugin implements.

    Raises:
        MissingCapabilityError: if kernels are missing; says how to compile them.
    """
    if target.lowering != "plugin" or not has_layers:
        return None
    chips = ",".join(map(str, (*target.capabilities, FALLBACK)))
    how = f"compile the kernels first: fna plugin --sm {chips}"
    if not (folder / KERNEL_FILE).is_file():
        raise MissingCapabilityError(f"{target.name} is built with the plugin, but {folder} has no kernels; {how}")
    table = load_table(folder)
    chosen = [kernel for kernel in table.kernels.values() if kernel.sm in (*target.capabilities, FALLBACK)]
    for chip in (*target.capabilities, FALLBACK):
        if not any(kernel.sm == chip for kernel in chosen):
            raise MissingCapabilityError(f"{folder} has no kernels for {chip_name(chip)} of {target.name}; {how}")
    return sorted(chosen, key=lambda kernel: (kernel.variant, kernel.sm))


def write_plugin(folder: Path, table: Path, kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    """Copy the plugin: sources, the kernels chosen, and the libraries that were built, which carry those kernels instead of all.

    Returns the machines of the libraries.
    """
    shutil.copytree(_PLUGIN_SOURCES / "src", folder / "src")
    shutil.copyfile(_PLUGIN_SOURCES / "CMakeLists.txt", folder / "CMakeLists.txt")
    (folder / "kernels").mkdir()
    chosen = join_kernels((kernel, packed_image(table / KERNEL_FILE, kernel)) for kernel in kernels)
    write_library_files(chosen, folder / "kernels")
    prebuilt = []
    for machine in MACHINES:
        libraries = [table / machine / library for library in LIBRARIES]
        if all(library.is_file() for library in libraries):
            place = folder / "prebuilt" / machine
            place.mkdir(parents=True)
            for library in libraries:
                carried = chosen if library.name == LIBRARY else b""
                (place / library.name).write_bytes(without_kernels(library.read_bytes()) + carried)
            prebuilt.append(machine)
    return tuple(prebuilt)


def write_plugin_layers(root: Path, layers: Sequence[PluginLayer], precisions: Sequence[str]) -> None:
    """Write, for each precision, the layers that the engine has to have: a name, a tab, and the type."""
    for precision in precisions:
        lines = [f"{layer.name}\t{layer.precision[precision].replace('unknown', '?')}\n" for layer in layers]
        (root / "check" / f"plugin_layers.{precision}.txt").write_text("".join(lines), encoding="utf-8")
