"""The library of onnxruntime operators is compiled once, and says why where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fna.errors import BuildError, MissingCapabilityError
from fna.plugins import processor_library as module
from fna.plugins.processor_library import LIBRARY, SOURCES, build_processor_library, find_processor_library

FLAGS = {f"{machine}, {kind}": flags for machine, kinds in module._TILES.items() for kind, flags in kinds.items()}


def test_the_same_sources_are_compiled_once(tmp_path: Path) -> None:
    library = build_processor_library(tmp_path)
    assert library.name == LIBRARY
    assert [path.name for path in library.parent.iterdir()] == [LIBRARY]
    written = library.stat().st_mtime_ns
    assert build_processor_library(tmp_path).stat().st_mtime_ns == written
    other = build_processor_library(tmp_path, flags=("-DANOTHER",))
    assert other != library


def test_without_a_compiler_it_says_how_to_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingCapabilityError, match=r"no C\+\+ compiler is installed \(no-such-compiler\); apt-get"):
        build_processor_library(tmp_path)
    find_processor_library.cache_clear()
    assert find_processor_library() is None
    find_processor_library.cache_clear()


def test_the_environment_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    find_processor_library.cache_clear()
    assert find_processor_library() is not None
    find_processor_library.cache_clear()
    monkeypatch.setenv("FNA_INSTRUCTIONS", "none")
    assert find_processor_library() is None
    find_processor_library.cache_clear()


def test_on_another_processor_it_says_which_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    with pytest.raises(MissingCapabilityError, match="'riscv64'; there are for x86_64 and aarch64"):
        build_processor_library(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(MissingCapabilityError, match="cannot be kept in .*taken.*Not a directory"):
        build_processor_library(tmp_path / "taken")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="do not compile with .*error.*no-such-flag"):
        build_processor_library(tmp_path, flags=("-fno-such-flag",))
    assert not list(tmp_path.rglob(LIBRARY))


@pytest.mark.parametrize("kind", [kind for kind in FLAGS if kind.startswith("x86_64")])
def test_kinds_of_instructions_share_no_function(kind: str, tmp_path: Path) -> None:
    """The linker keeps one copy of a shared function: were it that of AVX-512, processors without would fail."""
    flags = (*module._FLAGS, *FLAGS[kind], f"-DFNA_KIND={kind.split()[-1]}")
    command = ["g++", *flags, "-c", str(SOURCES / "tiles.cpp"), "-o", str(tmp_path / "tiles.o")]
    subprocess.run(command, check=True)
    listed = subprocess.run(["nm", "-C", str(tmp_path / "tiles.o")], capture_output=True, text=True, check=True).stdout
    symbols = [(line[17], line[19:]) for line in listed.splitlines()]
    assert not [name for kind_of_symbol, name in symbols if kind_of_symbol in "WVu"]
    assert f"fna::{kind.split()[-1]}::instructions" in [name for _, name in symbols]


@pytest.mark.long
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    flags = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build_processor_library(tmp_path, flags=flags)
    # with the C++ library before Python, or the sanitizer does not find how exceptions are thrown
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "FNA_TEST_LIBRARY": str(library),
    }
    tests = Path(__file__).parents[1] / "export" / "passes" / "test_processor_kernels.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-k",
        "not 14 and not 24",
        str(tests),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
