"""The library of onnxruntime operators for a processor: compiled once by this machine's own compiler, and kept.

`plugins/processor` is its source. It takes a C++ compiler alone: no headers of onnxruntime, whose packages for Python carry none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from fna.errors import BuildError, FnaError, MissingCapabilityError
from fna.plugins.built import cache_folder

SOURCES = Path(__file__).resolve().parent / "processor"
LIBRARY = "libfna_processor.so"

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=fast")
_TILES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "wide": ("-mavx512f", "-mavx512dq", "-mfma", "-DFNA_LANES=16", "-DFNA_REGISTERS=32"),
        "middle": ("-mavx2", "-mfma", "-DFNA_LANES=8", "-DFNA_REGISTERS=16"),
        "narrow": ("-DFNA_LANES=4", "-DFNA_REGISTERS=16"),
    },
    "aarch64": {"narrow": ("-DFNA_LANES=4", "-DFNA_REGISTERS=32")},
}
"""Flags of each kind of instructions that `tiles.cpp` is compiled for, by kind of machine; the processor chooses when it runs."""


@cache
def find_processor_library() -> Path | None:
    """Return the library, compiled if it has to be; None where this machine cannot have it (`fna doctor` says why).

    The environment's FNA_INSTRUCTIONS is the best kind of instructions to be used: `wide`, `middle`, `narrow`, or `none` for no
    library.
    """
    try:
        return build_processor_library()
    except FnaError:
        return None


def build_processor_library(folder: Path | None = None, *, flags: tuple[str, ...] = ()) -> Path:
    """Return the library, compiled (in seconds) unless these sources were compiled by this compiler before.

    Args:
        folder: where it is kept; None is this project's cache.
        flags: further ones for the compiler, as for its sanitizers.

    Raises:
        MissingCapabilityError: for another kind of processor, without a C++ compiler, where the folder cannot be written to, or where
            the environment asks for none.
        BuildError: if the compiler fails; with what it said first.
    """
    if os.environ.get("FNA_INSTRUCTIONS") == "none":
        raise MissingCapabilityError("FNA_INSTRUCTIONS is none")
    machine = platform.machine()
    if machine not in _TILES:
        raise MissingCapabilityError(
            f"there are no kernels for a processor of kind {machine!r}; there are for {' and '.join(_TILES)}"
        )
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise MissingCapabilityError(
            f"no C++ compiler is installed ({compiler or 'c++, g++, clang++'}); apt-get install g++"
        )
    sources = sorted(SOURCES.glob("*.?pp"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [
        version,
        machine,
        *_FLAGS,
        *flags,
        repr(_TILES),
        *(source.read_text(encoding="utf-8") for source in sources),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = (folder or cache_folder() / "processor") / digest / LIBRARY
    if not library.is_file():
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            # others may be compiling the same: each in a folder of its own, and the last one stays
            with tempfile.TemporaryDirectory(dir=library.parent) as place:
                _compile(compiler, (*_FLAGS, *flags), _TILES[machine], Path(place) / LIBRARY).replace(library)
        except OSError as error:
            raise MissingCapabilityError(
                f"the kernels for this processor cannot be kept in {library.parent} ({error.strerror}); make it writable"
            ) from error
    return library


def _compile(compiler: str, flags: tuple[str, ...], tiles: dict[str, tuple[str, ...]], library: Path) -> Path:
    objects = {name: ("tiles.cpp", (f"-DFNA_KIND={name}", *own)) for name, own in tiles.items()}
    objects |= {name: (f"{name}.cpp", ()) for name in ("focal_attention", "nystrom_attention", "operators")}
    commands = [
        [compiler, *flags, *own, "-c", str(SOURCES / source), "-o", str(library.with_name(f"{name}.o"))]
        for name, (source, own) in objects.items()
    ]
    commands.append([compiler, *flags, "-shared", *(command[-1] for command in commands), "-o", str(library)])
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands[:-1]
    ]
    said = [process.communicate()[1] for process in running]
    failed = any(process.returncode for process in running)
    if not failed:
        done = subprocess.run(commands[-1], capture_output=True, text=True, check=False)
        said, failed = [*said, done.stderr], bool(done.returncode)
    if failed:
        first = next((line for text in said for line in text.splitlines() if "rror" in line), "it gave no reason")
        raise BuildError(f"the kernels for this processor do not compile with {compiler}: {first.strip()}")
    return library
