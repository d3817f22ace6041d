"""The kernels and libraries that an installed wheel carries, and unpacking them once. Needs the standard library only.

A wheel has the kernels once, all in one stream of LZMA, where the machine code of one chip shortens that of the next. The libraries
lie beside it without theirs. What the commands use is made of both in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import tempfile
from pathlib import Path

from fna.errors import InputFileError, MissingCapabilityError
from fna.plugins.built import CONSTANTS, KERNEL_FILE, LIBRARIES, LIBRARY, MACHINES
from fna.plugins.table.kernel_file import LEVEL, repacked, without_kernels

STREAM = f"{KERNEL_FILE}.xz"
_DIGEST = "DIGEST"


def carry(table: Path, folder: Path) -> None:
    """Write what a wheel carries into a new folder, from a table with the libraries of every machine."""
    folder.mkdir()
    # preset 9's dictionary holds all kernels of all chips
    (folder / STREAM).write_bytes(lzma.compress(repacked(table / KERNEL_FILE, 0), preset=9))
    shutil.copyfile(table / CONSTANTS, folder / CONSTANTS)
    for machine in MACHINES:
        (folder / machine).mkdir()
        for name in LIBRARIES:
            (folder / machine / name).write_bytes(without_kernels((table / machine / name).read_bytes()))
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    (folder / _DIGEST).write_text(digest.hexdigest()[:16])


def unpacked(folder: Path, cache: Path) -> Path:
    """Return the folder of the table and libraries that a wheel carries, in `cache`; made the first time, whole or not at all.

    Raises:
        MissingCapabilityError: if it cannot be written; says what to set.
        InputFileError: if what the wheel carries is damaged.
    """
    output = cache / f"plugin-{(folder / _DIGEST).read_text()}"
    if output.is_dir():
        return output
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{output.name}-") as name:
            made = Path(name) / output.name
            _unpack(folder, made)
            made.rename(output)
    except lzma.LZMAError as error:
        raise InputFileError(
            f"{folder / STREAM} is damaged ({error}); install the package anew: pip install --force-reinstall fna"
        ) from error
    except OSError as error:
        if not output.is_dir():  # else another process was first
            raise MissingCapabilityError(
                f"the kernels that this package carries cannot be unpacked to {output} ({error.strerror}); set XDG_CACHE_HOME to a "
                "folder that can be written"
            ) from error
    return output


def _unpack(folder: Path, output: Path) -> None:
    output.mkdir()
    stored = output / f"{KERNEL_FILE}.stored"
    stored.write_bytes(lzma.decompress((folder / STREAM).read_bytes()))
    kernels = repacked(stored, LEVEL)
    stored.unlink()
    (output / KERNEL_FILE).write_bytes(kernels)
    shutil.copyfile(folder / CONSTANTS, output / CONSTANTS)
    for library in sorted(folder.glob("*/*.so")):
        (output / library.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(library, output / library.parent.name / library.name)
    for library in output.glob(f"*/{LIBRARY}"):
        with library.open("ab") as file:
            file.write(kernels)
