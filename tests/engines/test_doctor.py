"""`fna doctor` prints whatever happens, and says of each target whether it can be built here."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fna import machine
from fna.cli import main
from fna.engines import device, doctor, flavours
from fna.engines.targets import TARGETS
from fna.plugins import built, carried, processor_library
from fna.plugins.table import kernel_file


def test_every_target_gets_a_verdict_for_both_flavours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["targets"]) == {target.name for target in TARGETS}
    for verdicts in report["targets"].values():
        assert set(verdicts) == {"tensorrt", "tensorrt-rtx"}
        assert all(reason for reason in verdicts.values())
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))


def test_probes_that_fail_say_so_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise RuntimeError("on fire")

    for name in ("read_lines", "command_output", "read_gpu", "default_plugin"):
        monkeypatch.setattr(doctor, name, fail)
    monkeypatch.setattr(doctor.subprocess, "run", fail)
    report = doctor.diagnose()
    text = doctor.format_report(report)
    assert "could not be found out (RuntimeError: on fire)" in report["gpu"]
    assert "packages:" in text
    assert "jetson-agx-orin" in text


GPU = {"name": "Orin", "capability": 8.7, "memory": "61 GiB", "multiprocessors": 16, "CUDA": "12.6"}


@pytest.mark.parametrize(
    ("gpu", "plugin", "verdict"),
    [
        (GPU, True, "yes"),
        (GPU, False, "the plugin is not built; fna plugin builds it"),
        (
            GPU | {"name": "Thor", "capability": 11.0},
            True,
            "builds on the device itself, and this machine's GPU is Thor (11.0)",
        ),
        ("none: no driver", True, "builds on the device itself, and this machine has no GPU"),
    ],
    ids=["all there", "no plugin", "another GPU", "no GPU"],
)
def test_what_tensorrt_needs_to_build_for_an_orin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpu: object, plugin: bool, verdict: str
) -> None:
    library = tmp_path / "libfna_plugin.so"
    if plugin:
        library.touch()
    monkeypatch.setattr(doctor, "default_plugin", lambda: library)
    report = {"tensorrt": "10.3.0", "gpu": gpu, "plugin": "not built; fna plugin builds it"}
    orin = next(target for target in TARGETS if target.name == "jetson-agx-orin")
    assert doctor._verdict("tensorrt", orin, report).endswith(verdict)


@pytest.mark.parametrize(
    ("release", "advice"),
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", "R36.*Python 3.10.*fna bundle"),
        ("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic", "apt-get install python3-libnvinfer"),
        ("", r"pip install 'fna\[tensorrt\]'"),
    ],
    ids=["JetPack 6", "JetPack 7", "no Jetson"],
)
def test_what_to_install_is_what_this_machine_can_use(
    monkeypatch: pytest.MonkeyPatch, release: str, advice: str
) -> None:
    """JetPack 6 has TensorRT's module for Python 3.10 alone, which fna does not run on."""
    monkeypatch.setattr(flavours, "read_lines", lambda _path: [release])
    orin = next(target for target in TARGETS if target.name == "jetson-agx-orin")
    verdict = doctor._verdict("tensorrt", orin, {"tensorrt": "cannot be imported", "gpu": GPU})
    assert re.search(advice, verdict)
    assert ("libnvinfer" in verdict) == ("R38" in release)


def test_it_imports_the_standard_library_alone() -> None:
    """In an interpreter that has no site-packages at all."""
    folder = Path(doctor.__file__).parent
    files = [folder / f"{name}.py" for name in ("doctor", "device", "flavours", "targets")]
    for path in (
        *files,
        *(Path(module.__file__) for module in (machine, built, carried, kernel_file, processor_library)),
    ):
        tree = ast.parse(path.read_text())
        tree.body = [
            node for node in tree.body if not isinstance(node, ast.FunctionDef) or node.name != "describe_machine"
        ]
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        outside = {module for module in modules if module.split(".")[0] not in {*sys.stdlib_module_names, "fna"}}
        assert outside == set()
        ours = {module for module in modules if module.split(".")[0] == "fna"}
        assert ours <= {
            "fna",
            "fna.errors",
            "fna.machine",
            "fna.plugins.built",
            "fna.plugins.carried",
            "fna.plugins.processor_library",
            "fna.plugins.table.kernel_file",
            "fna.engines.device",
            "fna.engines.flavours",
            "fna.engines.targets",
        }


def test_it_runs_as_a_module_without_click(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('no click')")
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy')")
    done = subprocess.run(
        [sys.executable, "-m", "fna.engines.doctor"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "what can be built here:" in done.stdout


def test_without_a_driver_the_gpu_is_none_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(device.ctypes, "CDLL", absent)
    assert device.find_gpu() is None
    with pytest.raises(device.NoGpuError, match=r"libcuda\.so\.1"):
        device.read_gpu()
