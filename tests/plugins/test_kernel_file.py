"""The file of kernels that a library carries at its end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fna.errors import InputFileError
from fna.plugins.table.kernel_file import (
    MAGIC,
    CompiledKernel,
    join_kernels,
    pack,
    packed_image,
    read_kernels,
    repacked,
    unpack,
    without_kernels,
)

IMAGES = {
    ("output-fp16-s64-d64", 87): b"\x7fELF" * 900,
    ("output-fp16-s64-d64", 0): b".version 8.0\0",
    ("fps", 80): b"x",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    kernels = [
        CompiledKernel(variant, sm, -1, -1, len(image), shared=sm, warps=4, symbol=f"{variant}_kernel", layout="ppif")
        for (variant, sm), image in IMAGES.items()
    ]
    path = tmp_path / "kernels.bin"
    path.write_bytes(join_kernels((kernel, pack(IMAGES[kernel.variant, kernel.sm])) for kernel in kernels))
    return path


def contents(file: Path) -> dict[tuple[str, int], bytes]:
    return {(kernel.variant, kernel.sm): unpack(packed_image(file, kernel)) for kernel in read_kernels(file)}


def test_what_was_written_reads_back(file: Path) -> None:
    assert contents(file) == IMAGES
    first = read_kernels(file)[0]
    assert (first.offset, first.size, first.shared, first.symbol) == (0, 3600, 87, "output-fp16-s64-d64_kernel")
    assert first.packed == len(pack(IMAGES["output-fp16-s64-d64", 87]))


def test_images_packed_otherwise_are_the_same_images(file: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    stored.write_bytes(repacked(file, 0))
    assert b"\x7fELF" * 900 in stored.read_bytes()
    assert contents(stored) == IMAGES
    assert repacked(stored, 6) == file.read_bytes()


@pytest.mark.parametrize("library", [b"", b"short", b"\x7fELF" + bytes(range(256))])
def test_a_library_gives_up_its_kernels_and_keeps_the_rest(file: Path, library: bytes) -> None:
    assert without_kernels(library + file.read_bytes()) == library
    assert without_kernels(library) == library


@pytest.mark.parametrize("cut", [1, 24, 60])
def test_a_cut_file_is_no_table(file: Path, cut: int) -> None:
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(InputFileError, match=r"kernels\.bin cannot be read .* fna plugin"):
        read_kernels(file)


def test_a_file_of_another_version_is_no_table(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(MAGIC, b"FNAKERN9"))
    with pytest.raises(InputFileError, match="its end is not that of a table"):
        read_kernels(file)


def test_a_file_of_before_is_no_table(tmp_path: Path) -> None:
    """It held images alone."""
    (tmp_path / "kernels.bin").write_bytes(b"images" * 10)
    with pytest.raises(InputFileError, match="its end is not that of a table"):
        read_kernels(tmp_path / "kernels.bin")
