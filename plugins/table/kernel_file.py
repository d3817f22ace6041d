"""The file of compiled kernels, which the plugin's library carries at its own end. Needs the standard library only.

Images as raw deflate streams, one after the other; an index, a line of text for each image with the fields of `CompiledKernel` in
their order; a footer: `MAGIC`, bytes of all images and bytes of the index, both as 64-bit numbers, lowest byte first. Read from its
end, a library and its kernels are one file, and neither depends on the other's compilation (`plugins/src/common/kernel_table.cpp`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fna.errors import InputFileError

MAGIC = b"FNAKERN1"
LEVEL = 6
"""Of zlib. Its 9 takes seven times as long on machine code for 1.7 % less (99 of the release's 1133 images, 2026-11-28)."""

_FOOTER = struct.Struct("<8sQQ")


@dataclass(frozen=True)
class CompiledKernel:
    """One compiled kernel: where its image lies in the file, and how to launch it. `sm` 0 is PTX."""

    variant: str
    sm: int
    offset: int
    packed: int
    size: int
    shared: int
    warps: int
    symbol: str
    layout: str


def join_kernels(packed: Iterable[tuple[CompiledKernel, bytes]]) -> bytes:
    """Return the file's bytes for kernels with their packed images; `offset` and `packed` are set anew."""
    images, index = bytearray(), bytearray()
    for kernel, image in packed:
        placed = replace(kernel, offset=len(images), packed=len(image))
        index += f"{' '.join(map(str, astuple(placed)))}\n".encode()
        images += image
    return bytes(images + index + _FOOTER.pack(MAGIC, len(images), len(index)))


def read_kernels(file: Path) -> list[CompiledKernel]:
    """Read the index.

    Raises:
        InputFileError: if the file is missing, damaged, or of another version.
    """
    names = [field.name for field in fields(CompiledKernel)]
    numbers = {field.name for field in fields(CompiledKernel) if field.type == "int"}

    def read_row(line: str) -> CompiledKernel:
        words: dict[str, Any] = dict(zip(names, line.split(" "), strict=True))
        return CompiledKernel(**words | {name: int(words[name]) for name in numbers})

    try:
        with file.open("rb") as data:
            data.seek(-_FOOTER.size, 2)
            magic, images, index = _FOOTER.unpack(data.read())
            if magic != MAGIC or images + index + _FOOTER.size != file.stat().st_size:
                raise ValueError("its end is not that of a table")
            data.seek(images)
            return [read_row(line) for line in data.read(index).decode().splitlines()]
    except (OSError, ValueError) as error:
        raise InputFileError(f"{file} cannot be read ({error}); build it anew: fna plugin") from error


def packed_image(file: Path, kernel: CompiledKernel) -> bytes:
    """Return an image as it lies in the file."""
    with file.open("rb") as data:
        data.seek(kernel.offset)
        return data.read(kernel.packed)


def pack(image: bytes, level: int = LEVEL) -> bytes:
    """Pack an image."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(image) + packer.flush()


def unpack(packed: bytes) -> bytes:
    """Unpack an image."""
    return zlib.decompress(packed, -15)


def repacked(file: Path, level: int) -> bytes:
    """Return the file's bytes with every image packed at another level; 0 leaves them as they are, for another packer."""
    return join_kernels((k, pack(unpack(packed_image(file, k)), level)) for k in read_kernels(file))


def without_kernels(library: bytes) -> bytes:
    """Return a library without the kernels that it carries, if it does."""
    magic, images, index = _FOOTER.unpack(library[-_FOOTER.size :].rjust(_FOOTER.size, b"\0"))
    return library[: -(images + index + _FOOTER.size)] if magic == MAGIC else library
