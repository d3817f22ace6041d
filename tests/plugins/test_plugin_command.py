"""`fna plugin`: what it compiles, what it lists, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared_build import KERNEL_CACHE

from fna.cli import main
from fna.plugins import built, library

from .conftest import Programs


def test_one_kernel_for_one_chip(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the cache of the tests' table."""
    (tmp_path / "cache").symlink_to(KERNEL_CACHE)
    arguments = [
        "plugin",
        "-o",
        str(tmp_path),
        "--sm",
        "87,0",
        "--only",
        "^fps_step-fp16-d16$",
        "--machine",
        "none",
        "--jobs",
        "1",
    ]
    assert main(arguments) == 0
    assert "2 kernels" in capsys.readouterr().out
    assert main(["plugin", "--list", "-o", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "sm_87: 1 kernels, fps_step" in said
    assert "sm_80 PTX: 1 kernels" in said


def test_the_list_says_which_c_library_the_libraries_need(
    programs: Programs, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "--list", "-o", str(table)]) == 0
    assert f"{programs.folder.name}/libfna_plugin.so: needs glibc 2." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--sm", "75"], 2, "sm_75 is not a target; choose from 80, 86"),
        (["--sm", "orin"], 2, "--sm 'orin' cannot be read"),
        (["--only", "nothing"], 2, "--only 'nothing' fits no kernel"),
        (["--list"], 3, "has no kernels; compile them: fna plugin"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugin", "-o", str(tmp_path), *arguments]) == code
    assert said in capsys.readouterr().err


def test_an_unknown_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(library.InvalidArgumentError, match="machine 'sparc' is not known; choose from aarch64, x86_64"):
        library.build_libraries(tmp_path, "sparc", header_cache=tmp_path)


def test_without_a_checkout_things_lie_in_the_cache_or_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "fna" / "plugins"
    (package / "prebuilt").mkdir(parents=True)
    monkeypatch.setattr(built, "_CHECKOUT", None)
    monkeypatch.setattr(built, "_HERE", package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "fna" / "plugin"
    assert built.build_folder() == cache
    (package / "prebuilt" / "DIGEST").write_text("0123")
    (tmp_path / "cache" / "fna" / "plugin-0123").mkdir(parents=True)
    assert built.table_folder() == tmp_path / "cache" / "fna" / "plugin-0123"
    cache.mkdir()
    (cache / "kernels.bin").touch()
    assert built.table_folder() == cache
