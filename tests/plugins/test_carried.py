"""What a wheel carries of kernels and libraries, and unpacking it once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fna.errors import InputFileError, MissingCapabilityError
from fna.plugins import carried
from fna.plugins.built import LIBRARIES, MACHINES
from fna.plugins.carried import STREAM, carry, unpacked
from fna.plugins.table.kernel_file import CompiledKernel, join_kernels, pack


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A table whose kernels differ little from one another, as those of a kernel's chips do, and libraries that carry them."""
    folder = tmp_path / "table"
    code = bytes(byte % 16 for byte in os.urandom(20000))
    images = {sm: os.urandom(sm - 79) + code for sm in range(80, 90)}  # so that packed alone they differ everywhere
    kernels = [CompiledKernel("output", sm, 0, 0, len(image), 0, 4, "kernel", "p") for sm, image in images.items()]
    (folder / "aarch64").mkdir(parents=True)
    (folder / "x86_64").mkdir()
    (folder / "kernels.bin").write_bytes(join_kernels((k, pack(images[k.sm])) for k in kernels))
    (folder / "launch_constants.hpp").write_text("// numbers\n")
    for machine in MACHINES:
        plugin, register = (folder / machine / name for name in LIBRARIES)
        plugin.write_bytes(f"code for {machine}".encode() + (folder / "kernels.bin").read_bytes())
        register.write_bytes(b"registers")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_carries_the_kernels_once_and_all_chips_in_one_stream(built: Path, tmp_path: Path) -> None:
    carry(built, tmp_path / "prebuilt")
    sizes = {name: len(content) for name, content in files(tmp_path / "prebuilt").items()}
    assert sizes[STREAM] < (built / "kernels.bin").stat().st_size / 8
    assert sum(sizes.values()) - sizes[STREAM] < 200


def test_what_was_carried_is_unpacked_once_as_it_was_built(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry(built, tmp_path / "prebuilt")
    made = unpacked(tmp_path / "prebuilt", tmp_path / "cache")
    assert files(made) == files(built)
    assert list((tmp_path / "cache").iterdir()) == [made]
    monkeypatch.delattr(carried, "_unpack")
    assert unpacked(tmp_path / "prebuilt", tmp_path / "cache") == made


def test_another_release_is_unpacked_beside_it(built: Path, tmp_path: Path) -> None:
    carry(built, tmp_path / "prebuilt")
    (built / "aarch64" / "libfna_plugin_register.so").write_bytes(b"registers otherwise")
    carry(built, tmp_path / "newer")
    cache = tmp_path / "cache"
    assert unpacked(tmp_path / "newer", cache) != unpacked(tmp_path / "prebuilt", cache)


def test_a_cache_that_cannot_be_written_is_named(built: Path, tmp_path: Path) -> None:
    carry(built, tmp_path / "prebuilt")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MissingCapabilityError, match=r"cannot be unpacked to .*cache/plugin-\w+ .*set XDG_CACHE_HOME"):
        unpacked(tmp_path / "prebuilt", tmp_path / "cache")


def test_a_damaged_stream_is_named_and_leaves_nothing(built: Path, tmp_path: Path) -> None:
    carry(built, tmp_path / "prebuilt")
    stream = tmp_path / "prebuilt" / STREAM
    stream.write_bytes(stream.read_bytes()[:-9])
    with pytest.raises(InputFileError, match=r"kernels.bin.xz is damaged .*pip install --force-reinstall"):
        unpacked(tmp_path / "prebuilt", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
