"""Where the kernel table and the plugin's libraries lie. Importing it needs nothing but the standard library."""

from __future__ import annotations

import os
import platform
from pathlib import Path

LIBRARY = "libfna_plugin.so"
LIBRARIES = (LIBRARY, "libfna_plugin_register.so")
"""What TensorRT loads by name, and what registers itself in a host that only opens it. They lie in a folder of the table for each kind
of machine."""

MACHINES = ("aarch64", "x86_64")

KERNEL_FILE = "kernels.bin"
CONSTANTS = "launch_constants.hpp"
"""The table: every chip's kernels, and the numbers of the launch plan for C++."""

_HERE = Path(__file__).resolve().parent
_CHECKOUT = _HERE.parent if (_HERE.parent / "pyproject.toml").is_file() else None


def cache_folder() -> Path:
    """Return where what is built or fetched lies: `build` of the checkout, else this user's cache."""
    if _CHECKOUT is not None:
        return _CHECKOUT / "build"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fna"


def build_folder() -> Path:
    """Return where `fna plugin` writes unless told."""
    return cache_folder() / "plugin"


def table_folder() -> Path:
    """Return the folder of the kernel table: what `fna plugin` built, else what the installed package carries, unpacked."""
    built, carried = build_folder(), _HERE / "prebuilt"
    if (built / KERNEL_FILE).is_file() or not carried.is_dir():
        return built
    from fna.plugins.carried import unpacked

    return unpacked(carried, cache_folder())


def library_folder() -> Path:
    """Return the folder of the libraries for this machine."""
    return table_folder() / platform.machine()
