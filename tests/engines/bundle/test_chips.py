"""What `make bundle` asks `make plugin` for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fna.engines.bundle.chips import main, missing_libraries
from fna.engines.targets import find_target

from ..conftest import ROOT


def missing(target: str, table: Path, *machines: str) -> list[tuple[str, str]]:
    return list(missing_libraries(find_target(target), table, machines or ("aarch64", "x86_64")))


def test_nothing_where_the_table_and_the_libraries_are_there(table: Path) -> None:
    assert missing("jetson-agx-orin", table) == []


def test_chips_that_are_there_stay(table: Path) -> None:
    assert missing("jetson-thor", table, "aarch64") == [("aarch64", "87,89,110,0")]


def test_all_where_nothing_is_there(tmp_path: Path) -> None:
    assert missing("jetson-agx-orin", tmp_path) == [("aarch64", "87,0"), ("x86_64", "87,0")]


def test_a_target_without_a_plugin_needs_nothing(tmp_path: Path) -> None:
    assert missing("t4", tmp_path) == []


def test_a_library_older_than_the_kernels_is_built_again(table: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(table, tmp_path / "table")
    os.utime(copy / "x86_64" / "libfna_plugin.so", (1, 1))
    assert missing("jetson-agx-orin", copy) == [("x86_64", "87,89,0")]


def test_the_program_prints_what_the_makefile_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jetson-agx-orin", "--table", str(tmp_path), "--machines", "aarch64"]) == 0
    assert capsys.readouterr().out == "aarch64 87,0\n"
    assert main(["voodoo", "--table", str(tmp_path), "--machines", "aarch64"]) == 2
    assert "voodoo" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "batch"), [(["BATCH=1:4:8"], " --batch 1:4:8"), ([], "")])
def test_make_bundle_takes_the_batch_sizes_of_a_triton_repository(tmp_path: Path, given: list[str], batch: str) -> None:
    command = ["make", "-n", "bundle", "TARGET=t4", f"BUILD={tmp_path}", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if "fna bundle" in line)
    assert line.rstrip().endswith(f"--target t4 --precision fp16,fp32{batch}")
