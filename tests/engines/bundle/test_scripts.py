"""build_engine.sh and check.sh as a person on the device runs them, with stand-ins for trtexec, the runner and TensorRT's library.

The stand-ins (tests/engines/stand_in) record what they are called with; the scripts, the compiler and the plugin's sources are real.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ..conftest import ROOT, STAND_IN, Headers, make_bundle

SCRIPTS = ROOT / "engines" / "bundle" / "scripts"
ENGINE = "build/model-fp32-plugin-tensorrt.engine"


def test_shellcheck_has_nothing_to_say(bundle: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    files = [
        SCRIPTS / "build_engine.sh",
        SCRIPTS / "check.sh",
        STAND_IN / "trtexec",
        STAND_IN / "runner",
        bundle / "settings.sh",
    ]
    done = subprocess.run(["shellcheck", "--shell=bash", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@dataclass
class Device:
    """A bundle on a device: its folder, and what is on the PATH there."""

    root: Path
    bin: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a script of the bundle, from another folder."""
        command = [str(self.root / script), *arguments]
        settings = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": "/nowhere", **self.env, **env}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.bin, env=settings, timeout=300
        )

    def calls(self, of: str = "trtexec") -> list[list[str]]:
        """The arguments of every call of a stand-in, `--help` left out."""
        log = self.bin / f"{of}.log"
        return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def make_device(root: Path, folder: Path, *tools: str) -> Device:
    folder.mkdir()
    for tool in tools:
        shutil.copy(STAND_IN / ("trtexec" if "trt" in tool or "rtx" in tool else tool), folder / tool)
    env = {"STAND_IN_LOG": str(folder / "trtexec.log"), "STAND_IN_RUNNER_LOG": str(folder / "runner.log")}
    return Device(root, folder, {**env, "FNA_RUNNER": str(folder / "runner")})


@pytest.fixture
def device(bundle: Path, tmp_path: Path) -> Device:
    """A device whose prebuilt plugin loads, as far as the stand-in runner can tell."""
    root = shutil.copytree(bundle, tmp_path / "orin")
    return make_device(root, tmp_path / "bin", "trtexec", "runner")


def test_the_engine_is_built_strongly_typed_with_the_plugin_and_the_profile(device: Device) -> None:
    done = device.run("build_engine.sh")
    assert done.returncode == 0, done.stderr
    (call,) = device.calls()
    assert call == [
        "--onnx=model.plugin.onnx",
        "--skipInference",
        "--minShapes=pixel_values:1x3x56x56",
        "--optShapes=pixel_values:2x3x56x56",
        "--maxShapes=pixel_values:4x3x56x56",
        "--stronglyTyped",
        "--noTF32",
        "--timingCacheFile=build/timing-tensorrt-10.3.0.cache",
        "--profilingVerbosity=detailed",
        f"--dynamicPlugins=plugin/prebuilt/{os.uname().machine}/libfna_plugin.so",
        f"--saveEngine={ENGINE}.part",
    ]
    assert (device.root / ENGINE).read_text().startswith("stand-in engine")
    assert not (device.root / f"{ENGINE}.part").exists()


def test_a_second_call_does_nothing_until_something_changes(device: Device) -> None:
    device.run("build_engine.sh")
    assert "is up to date" in device.run("build_engine.sh").stdout
    assert len(device.calls()) == 1
    device.run("build_engine.sh", "--batch", "1:8")
    assert len(device.calls()) == 2
    (device.root / ENGINE).write_text("cut off")
    device.run("build_engine.sh", "--batch", "1:8")
    assert len(device.calls()) == 3
    device.run("build_engine.sh", "--batch", "1:8", "--rebuild")
    assert len(device.calls()) == 4
    device.run("build_engine.sh", "--batch", "1:8", STAND_IN_VERSION="101302")
    assert len(device.calls()) == 5
    with (device.bin / "trtexec").open("a") as tool:
        tool.write("# another build of it\n")
    device.run("build_engine.sh", "--batch", "1:8", STAND_IN_VERSION="101302")
    assert len(device.calls()) == 6


def test_options_reach_trtexec(device: Device) -> None:
    arguments = ["--precision", "fp16", "--batch", "1:4:8", "--workspace", "2048", "--lowering", "portable"]
    assert device.run("build_engine.sh", *arguments, "--", "--verbose", "--avgTiming=16").returncode == 0
    (call,) = device.calls()
    assert call[0] == "--onnx=model.fp16.portable.onnx"
    assert {"--optShapes=pixel_values:4x3x56x56", "--maxShapes=pixel_values:8x3x56x56"} <= set(call)
    assert {"--memPoolSize=workspace:2048", "--verbose", "--avgTiming=16"} <= set(call)
    assert not any(word.startswith("--dynamicPlugins") for word in call)
    assert (device.root / "build/model-fp16-portable-tensorrt.engine").is_file()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tf32_is_off_at_every_precision_unless_it_is_asked_for(device: Device, precision: str) -> None:
    """FNA's insides are fp32 products in a file of any precision."""
    for options in ([], ["--tf32"]):
        assert device.run("build_engine.sh", "--precision", precision, *options).returncode == 0
    assert ["--noTF32" in call for call in device.calls()] == [True, False]


def test_a_version_compatible_engine_is_run_with_its_host_code_allowed(device: Device) -> None:
    done = device.run("check.sh", "--lowering", "portable", "--", "--versionCompatible")
    assert done.returncode == 0, done.stderr
    assert "--allow-host-code" in device.calls("runner")[-1]
    assert device.run("check.sh", "--lowering", "portable").returncode == 0
    assert "--allow-host-code" not in device.calls("runner")[-1]


@pytest.mark.parametrize("option", ["--versionCompatible", "--vc"])
def test_a_version_compatible_engine_with_the_plugin_is_refused_by_name(device: Device, option: str) -> None:
    done = device.run("build_engine.sh", "--", option)
    assert done.returncode == 2
    assert f"{option} has not been proven with a plugin inside the engine; add --lowering portable" in done.stderr
    assert device.calls() == []


def test_a_copy_of_the_engine_goes_where_it_is_asked_for(device: Device) -> None:
    assert device.run("build_engine.sh", "--output", "model.plan").returncode == 0
    assert (device.bin / "model.plan").read_bytes() == (device.root / ENGINE).read_bytes()


def test_a_dry_run_prints_the_command_and_builds_nothing(device: Device) -> None:
    done = device.run("build_engine.sh", "--dry-run")
    assert "trtexec --onnx=model.plugin.onnx" in done.stdout
    assert device.calls() == []
    assert not (device.root / ENGINE).exists()


def test_tensorrt_11_is_strongly_typed_without_being_told(device: Device) -> None:
    known = "onnx saveEngine skipInference minShapes optShapes maxShapes memPoolSize dynamicPlugins"
    done = device.run("build_engine.sh", STAND_IN_OPTIONS=known, STAND_IN_DEPRECATED="1", STAND_IN_VERSION="110401")
    assert done.returncode == 0, done.stderr
    assert "TensorRT 11.4.1" in done.stdout
    (call,) = device.calls()
    assert not any(word.startswith(("--stronglyTyped", "--noTF32", "--timingCacheFile")) for word in call)


NO_PLUGINS = "onnx saveEngine skipInference minShapes optShapes maxShapes"
REFUSED = {
    "old TensorRT": ([], {"STAND_IN_VERSION": "8601"}, 3, "is TensorRT 8.6.1, but this bundle needs 10.3 or later"),
    "no plugin option": ([], {"STAND_IN_OPTIONS": NO_PLUGINS}, 3, "does not know --dynamicPlugins"),
    "the model": ([], {"STAND_IN_FAIL": "it has no kernel"}, 2, r"node /blocks.0: it has no kernel"),
    "precision": (["--precision", "int8"], {}, 2, "--precision int8 is not in this bundle; choose one of: fp32 fp16"),
    "batch": (["--batch", "4:1"], {}, 2, "does not ascend"),
    "batch text": (["--batch", "many"], {}, 2, "--batch many cannot be read"),
    "workspace": (["--workspace", "2G"], {}, 2, "--workspace 2G cannot be read"),
    "flavour": (["--trtexec", "tensorrt_rtx"], {}, 2, "--trtexec .*tensorrt_rtx is no program"),
    "option": (["--fast"], {}, 2, "unknown option --fast"),
    "no value": (["--batch"], {}, 2, "--batch needs a value"),
    "output": (["--output", "no/such/folder/x.plan"], {}, 2, "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_and_leaves_no_engine(device: Device, case: str) -> None:
    arguments, env, code, said = REFUSED[case]
    done = device.run("build_engine.sh", *arguments, **env)
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert not list(device.root.glob("build/*.engine*"))


@pytest.mark.parametrize(
    "name", ["model.weights", "settings.sh", "runner/fna_runner.cpp", "plugin/kernels/kernels.bin"]
)
@pytest.mark.parametrize("script", ["build_engine.sh", "check.sh"])
def test_a_damaged_bundle_is_refused_before_anything_of_it_is_used(device: Device, name: str, script: str) -> None:
    path = device.root / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    done = device.run(script)
    assert done.returncode == 2
    assert f"damaged bundle: {name} is missing or changed" in done.stderr
    path.unlink()
    assert f"damaged bundle: {name}" in device.run(script).stderr
    assert device.calls() == []


def test_without_trtexec_the_device_is_told_what_to_install(bundle: Path, tmp_path: Path) -> None:
    device = make_device(shutil.copytree(bundle, tmp_path / "orin"), tmp_path / "bin", "runner")
    done = device.run("build_engine.sh")
    assert done.returncode == 3
    assert "no trtexec on this device" in done.stderr
    assert "apt-get install libnvinfer-bin" in done.stderr


def test_tensorrt_rtx_gets_the_portable_model(tiny: Path, table: Path, tmp_path: Path) -> None:
    root = make_bundle(tiny, tmp_path / "ada", table, target="rtx-ada")
    device = make_device(root, tmp_path / "bin", "tensorrt_rtx", "runner")
    assert device.run("build_engine.sh").returncode == 0
    (call,) = device.calls()
    assert call[0] == "--onnx=model.portable.onnx"
    assert not any(word.startswith("--dynamicPlugins") for word in call)
    assert device.run("build_engine.sh", "--lowering", "plugin").returncode == 2


def test_check_runs_the_recorded_photographs_against_the_recorded_outputs(device: Device) -> None:
    (device.bin / "nvpmodel").write_text("#!/bin/sh\necho NV Power Mode: MAXN\necho 0\n")
    (device.bin / "nvpmodel").chmod(0o755)
    done = device.run("check.sh", "--precision", "fp16", "--runs", "50", "--graph")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("power mode: NV Power Mode: MAXN 0") == 2
    assert "tolerance at fp16: relative L2 0.02, cosine 0.999" in done.stdout
    assert "check passed" in done.stdout
    probe, call = device.calls("runner")
    library = f"plugin/prebuilt/{os.uname().machine}/libfna_plugin.so"
    assert probe == ["--check-plugin", library]
    assert call == [
        *(
            "build/model-fp16-plugin-tensorrt.engine",
            "--graph",
            "--relative-l2",
            "0.02",
            "--cosine",
            "0.999",
            "--runs",
            "50",
        ),
        *("--json", "build/check.json", "--input", "pixel_values=check/input.npy"),
        *("--expect", "last_hidden_state=check/expected.last_hidden_state.npy"),
        *("--expect", "pooler_output=check/expected.pooler_output.npy"),
        *("--plugin", library, "--plugin-layers", "check/plugin_layers.fp16.txt"),
    ]
    for option in ("--input", "--expect", "--plugin-layers"):
        name = call[call.index(option) + 1]
        assert (device.root / name.rsplit("=", 1)[-1]).is_file()


@pytest.mark.parametrize("code", [1, 2, 3])
def test_check_exits_with_what_the_runner_found(device: Device, code: int) -> None:
    done = device.run("check.sh", STAND_IN_RUNNER_CODE=str(code))
    assert done.returncode == code
    assert "check passed" not in done.stdout
    assert ("check FAILED" in done.stderr) == (code == 1)


def test_check_stops_where_the_engine_cannot_be_built(device: Device) -> None:
    done = device.run("check.sh", STAND_IN_FAIL="no")
    assert done.returncode == 2
    assert not any(call[0].endswith(".engine") for call in device.calls("runner"))


def test_runner_and_plugin_are_compiled_on_the_device_where_the_prebuilt_plugin_does_not_load(
    bundle: Path, tensorrt_root: Path, headers: Headers, tmp_path: Path
) -> None:
    """With the real sources and compiler; the library that they are linked with and loaded into is the stand-in."""
    root = shutil.copytree(bundle, tmp_path / "orin")
    device = make_device(root, tmp_path / "bin", "trtexec")
    # -O0, since the time of this test is everyone's
    (device.bin / "cxx").write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    (device.bin / "cxx").chmod(0o755)
    del device.env["FNA_RUNNER"]
    device.env |= {"CXX": "cxx", "TENSORRT_ROOT": str(tensorrt_root), "CUDA_ROOT": str(headers.cuda)}
    done = device.run("check.sh")
    assert "the prebuilt plugin does not load here (fna_runner: the plugin library does not load" in done.stdout
    assert "compiling the plugin" in done.stdout
    assert done.returncode == 3, done.stdout + done.stderr
    assert "fna_runner: this machine has no NVIDIA driver" in done.stderr
    (call,) = device.calls()
    assert "--dynamicPlugins=build/plugin/libfna_plugin.so" in call
    register = root / "build/plugin/libfna_plugin_register.so"
    assert "compiling" not in device.run("build_engine.sh").stdout

    for opened in (
        f"import ctypes; ctypes.CDLL({str(tensorrt_root / 'lib/libnvinfer.so')!r}); ctypes.CDLL({str(register)!r})",
        f"import ctypes; ctypes.CDLL({str(register)!r})",
    ):  # as Triton's plugins= does it (libnvinfer is held locally), and as LD_PRELOAD does (libnvinfer comes later)
        env = {**os.environ, "LD_LIBRARY_PATH": str(tensorrt_root / "lib")}
        said = subprocess.run(
            [shutil.which("python3"), "-c", opened], capture_output=True, text=True, check=True, env=env
        )
        assert "registered FastNystromAttention" in said.stdout, said.stderr
