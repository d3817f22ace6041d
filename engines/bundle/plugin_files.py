"""The plugin in a bundle: its sources, the kernels of the device's chips, and the libraries that were built."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import fna.plugins
from fna.engines.bundle.format import PluginLayer
from fna.engines.targets import Target
from fna.errors import MissingCapabilityError
from fna.plugins.table import FALLBACK_SM, Kernel, load_table

PREBUILT_MACHINES = ("aarch64", "x86_64")
PREBUILT_LIBRARIES = ("libfna_plugin.so", "libfna_plugin_register.so")
REGISTER_SOURCE = "register.cpp"
"""The source that is not part of libfna_plugin.so, but of the self-registering library."""

_PLUGIN_SOURCES = Path(fna.plugins.__file__).resolve().parent
DEFAULT_TABLE = _PLUGIN_SOURCES.parent / "build" / "plugin"
"""Where `make plugin` puts the kernel table, and the libraries in a folder for each kind of machine."""


def choose_kernels(target: Target, folder: Path, has_layers: bool) -> list[Kernel] | None:
    """Return the compiled kernels for the target's chips and the PTX; None where the target or the file needs none.

    Args:
        target: the device.
        folder: that `make plugin` wrote.
        has_layers: whether the file has nodes that the plugin implements.

    Raises:
        MissingCapabilityError: if kernels are missing; says how to compile them.
    """
    if target.lowering != "plugin" or not has_layers:
        return None
    chips = ",".join(map(str, (*target.capabilities, FALLBACK_SM)))
    how = f"compile the kernels first: make plugin SM={chips}"
    if not (folder / "kernels.json").is_file():
        raise MissingCapabilityError(f"{target.name} is built with the plugin, but {folder} has no kernels; {how}")
    table = load_table(folder)
    chosen = [kernel for kernel in table.kernels.values() if kernel.sm in (*target.capabilities, FALLBACK_SM)]
    for chip in (*target.capabilities, FALLBACK_SM):
        if not any(kernel.sm == chip for kernel in chosen):
            chip_name = f"sm_{chip}" if chip else "the PTX fallback"
            raise MissingCapabilityError(f"{folder} has no kernels for {chip_name} of {target.name}; {how}")
    return sorted(chosen, key=lambda kernel: (kernel.variant, kernel.sm))


def write_plugin(folder: Path, table: Path, kernels: Sequence[Kernel]) -> tuple[str, ...]:
    """Copy the plugin: sources, the kernels chosen, and the libraries that were built. Returns the machines of those."""
    (folder / "src").mkdir(parents=True)
    for source in sorted((_PLUGIN_SOURCES / "src").iterdir()):
        shutil.copyfile(source, folder / "src" / source.name)
    shutil.copyfile(_PLUGIN_SOURCES / "CMakeLists.txt", folder / "CMakeLists.txt")
    _write_kernels(folder / "kernels", table, kernels)
    prebuilt = []
    for machine in PREBUILT_MACHINES:
        libraries = [table / machine / library for library in PREBUILT_LIBRARIES]
        if all(library.is_file() for library in libraries):
            place = folder / "prebuilt" / machine
            place.mkdir(parents=True)
            for library in libraries:
                shutil.copyfile(library, place / library.name)
            prebuilt.append(machine)
    return tuple(prebuilt)


def write_plugin_layers(root: Path, layers: Sequence[PluginLayer], precisions: Sequence[str]) -> None:
    """Write, for each precision, the layers that the engine has to have: a name, a tab, and the type."""
    for precision in precisions:
        lines = [f"{layer.name}\t{layer.precision[precision].replace('unknown', '?')}\n" for layer in layers]
        (root / "check" / f"plugin_layers.{precision}.txt").write_text("".join(lines), encoding="utf-8")


def _write_kernels(folder: Path, table: Path, kernels: Sequence[Kernel]) -> None:
    """Write kernels.bin and kernel_table.inc with the chosen kernels only; fields as `fna.plugins.aot.write_table` has them."""
    folder.mkdir()
    rows, offset = [], 0
    with (table / "kernels.bin").open("rb") as data, (folder / "kernels.bin").open("wb") as output:
        for kernel in kernels:
            data.seek(kernel.offset)
            output.write(data.read(kernel.packed))
            numbers = f"{kernel.sm}, {offset}, {kernel.packed}, {kernel.size}, {kernel.shared}, {kernel.warps}"
            rows.append(f'{{"{kernel.variant}", {numbers}, "{kernel.symbol}", "{kernel.layout}"}},\n')
            offset += kernel.packed
    (folder / "kernel_table.inc").write_text("".join(rows), encoding="utf-8")
