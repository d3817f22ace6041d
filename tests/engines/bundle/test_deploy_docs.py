"""docs/deploy.md and docs/serving.md: every command is run by a test, or marked as needing the device."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from fna.engines import load_test
from fna.engines.builder.options import BatchRange
from fna.engines.serving.model_repository import write_model_repository

from ..conftest import ROOT
from .test_scripts import make_device

TEXT = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("deploy.md", "serving.md"))
LOAD_TEST = ".venv/bin/python -m fna.engines.load_test "
BLOCKS = re.findall(r"```([a-z ]+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = {
    *re.findall(r"`(\./(?:check|build_engine)\.sh[^`]*)`", TEXT),
    *re.findall(r"^\./(?:check|build_engine|serve)\.sh.*$", TEXT, re.MULTILINE),
} - {"./check.sh --flavour tensorrt-rtx"}  # test_tensorrt_rtx_gets_the_fused_model builds such a bundle


def test_every_block_is_run_or_marked_as_the_devices() -> None:
    assert len(BLOCKS) == TEXT.count("```") / 2
    assert len(COMMANDS) >= 8
    for kind, block in BLOCKS:
        assert kind in ("sh", "sh device")
        for line in block.strip().splitlines():
            # tests/test_repository.py dry-runs the first and runs the second
            assert kind == "sh device" or line.startswith(("make ", ".venv/bin/fna ", LOAD_TEST)), line


def test_the_load_test_is_run_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the servers; test_triton_server.py holds clients against a real one."""
    (line,) = (line for line in TEXT.splitlines() if line.startswith(LOAD_TEST))
    held = []

    def stand_in(file: Path, clients: int, seconds: float, *_: object, batching: bool, threads: int) -> load_test.Tally:
        held.append((str(file), clients, seconds, batching, threads))
        return load_test.Tally([0.1], told=clients, elapsed=1)

    monkeypatch.setattr(load_test, "load_cpu_server", stand_in)
    assert load_test.main(shlex.split(line.removeprefix(LOAD_TEST))) == 0
    assert [each[3] for each in held] == [True, False]
    assert "no batching: {" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_devices_commands_run_with_stand_ins(bundle: Path, tiny: Path, tmp_path: Path, command: str) -> None:
    device = make_device(
        shutil.copytree(bundle, tmp_path / "bundle"), tmp_path / "bin", "trtexec", "runner", "tritonserver"
    )
    if "MODELS" in command:
        write_model_repository(tiny, tmp_path / "models", batch=BatchRange(1, 4, 8))
    script, *arguments = shlex.split(
        command.replace("MODELS", str(tmp_path / "models")).replace("model_tensorrt", "tiny_tensorrt")
    )
    done = device.run(script.removeprefix("./"), *arguments)
    assert done.returncode == 0, done.stderr
