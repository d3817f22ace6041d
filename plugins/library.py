"""Compile the plugin's libraries, with CMake, for this machine or another kind; and what C library they need."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from fna.errors import BuildError, InvalidArgumentError, MissingCapabilityError
from fna.plugins.built import LIBRARIES, MACHINES

SOURCES = Path(__file__).resolve().parent

NEWEST_GLIBC = (2, 35)
"""That of Ubuntu 22.04, which JetPack 6 is: a library that needs a newer one does not load there."""


def build_libraries(table: Path, machine: str, *, header_cache: Path, checks: bool = False) -> tuple[Path, ...]:
    """Compile the libraries from a table of kernels into the table's folder of that machine.

    Args:
        table: folder that `fna.plugins.table` wrote.
        machine: kind of processor, `x86_64` or `aarch64`; another than this one's is compiled for with its cross compiler.
        header_cache: folder for TensorRT's headers where they are not installed and have to be fetched.
        checks: whether to build the test host and the stand-in for the CUDA driver too.

    Raises:
        InvalidArgumentError: for another machine.
        MissingCapabilityError: if CMake or the compiler is not installed; says how to have it.
        BuildError: if CMake or the compiler fails; ends with what it said last.
    """
    if machine not in MACHINES:
        raise InvalidArgumentError(f"machine {machine!r} is not known; choose from {', '.join(MACHINES)}")
    cross = machine != platform.machine()
    compiler, package = (
        (f"{machine}-linux-gnu-g++", f"g++-{machine.replace('_', '-')}-linux-gnu") if cross else ("c++", "g++")
    )
    for program, install in (("cmake", "cmake"), (compiler, package)):
        if shutil.which(program) is None:
            raise MissingCapabilityError(
                f"{program} is not installed, and it is needed to compile the plugin for {machine}; apt-get install {install}"
            )
    folder = table / machine
    configure = [
        *(
            "cmake",
            "-S",
            str(SOURCES),
            "-B",
            str(folder),
            f"-DFNA_TABLE_DIR={table.resolve()}",
            f"-DFNA_PYTHON={sys.executable}",
        ),
        *(f"-DFNA_HEADER_CACHE={header_cache.resolve()}", f"-DFNA_BUILD_TESTS={'ON' if checks else 'OFF'}"),
        *([f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'cmake' / f'{machine}.cmake'}"] if cross else []),
    ]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
            raise BuildError(f"the plugin does not compile for {machine}: {' '.join(' '.join(lines[:2]).split())}")
    return tuple(folder / name for name in LIBRARIES)


def glibc_of(library: Path) -> tuple[int, int]:
    """Return the newest version of the GNU C library whose symbols a library needs."""
    versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    return max(((int(major), int(minor)) for major, minor in versions), default=(0, 0))
