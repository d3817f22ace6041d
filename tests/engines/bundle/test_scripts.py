"""build_engine.sh and check.sh as a person on the device runs them, with stand-ins for trtexec, the runner and TensorRT's library.

The stand-ins (tests/engines/stand_in) record what they are called with; the scripts, the compiler and the plugin's sources are real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fna.engines.builder.options import BatchRange
from fna.engines.serving.model_repository import write_model_repository

from ..conftest import ROOT, STAND_IN, Headers, compile_cpp, make_bundle
from .device import Device, make_device

SCRIPTS = ROOT / "engines" / "bundle" / "scripts"
ENGINE = "build/model-fp32-plugin-tensorrt.engine"


def test_shellcheck_has_nothing_to_say(bundle: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    files = [
        SCRIPTS / "build_engine.sh",
        SCRIPTS / "check.sh",
        SCRIPTS / "serve.sh",
        STAND_IN / "trtexec",
        STAND_IN / "runner",
        bundle / "settings.sh",
    ]
    done = subprocess.run(["shellcheck", "--shell=bash", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


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


def test_an_engine_of_another_file_is_not_put_into_a_repository(device: Device, tiny: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    write_model_repository(tiny, repository, batch=BatchRange(1, 2, 4))
    plan = repository / "tiny_tensorrt" / "1" / "model.plan"
    assert device.run("build_engine.sh", "--output", str(plan)).returncode == 0
    plan.unlink()
    (repository / "tiny_tensorrt" / "source.sha256").write_text("0" * 64 + "\n")
    done = device.run("build_engine.sh", "--output", str(plan))
    assert done.returncode == 2
    assert "is in a repository of another file than this bundle's" in done.stderr
    assert not plan.exists()


@pytest.fixture
def server(device: Device) -> Device:
    """A device in Triton's image."""
    shutil.copy(STAND_IN / "tritonserver", device.bin)
    return device


def test_a_server_starts_with_the_engine_in_its_repository_and_the_plugin(
    server: Device, tiny: Path, tmp_path: Path
) -> None:
    repository = tmp_path / "models"
    write_model_repository(tiny, repository, batch=BatchRange(1, 2, 4))
    done = server.run("serve.sh", str(repository), "--batch", "1:2:4", "--", "--exit-timeout-secs=30")
    assert done.returncode == 0, done.stderr
    assert (repository / "tiny_tensorrt" / "1" / "model.plan").read_bytes() == (server.root / ENGINE).read_bytes()
    register = server.root / "plugin/prebuilt" / os.uname().machine / "libfna_plugin_register.so"
    assert server.calls("tritonserver") == [
        [f"--model-repository={repository}", f"--backend-config=tensorrt,plugins={register}", "--exit-timeout-secs=30"]
    ]
    assert "--maxShapes=pixel_values:4x3x56x56" in server.calls()[0]
    server.run("serve.sh", str(repository), "--batch", "1:2:4")
    assert len(server.calls()) == 1  # the engine is there


@pytest.mark.parametrize("case", ["another file", "no folder", "not Triton's image", "no library that registers"])
def test_what_cannot_be_served_is_refused_by_name(server: Device, tiny: Path, tmp_path: Path, case: str) -> None:
    repository = tmp_path / "models"
    write_model_repository(tiny, repository, batch=BatchRange(1, 2, 4))
    settings = {}
    if case == "another file":
        (repository / "tiny_tensorrt" / "source.sha256").write_text("0" * 64 + "\n")
    elif case == "not Triton's image":
        (server.bin / "tritonserver").unlink()
    elif case == "no library that registers":
        settings = {"STAND_IN_VERSION": "120000", "CXX": "no-such-compiler"}
    done = server.run("serve.sh", "/nowhere" if case == "no folder" else str(repository), **settings)
    code, said = {
        "another file": (2, "has no model of the file that this bundle is of"),
        "no folder": (2, "/nowhere is no folder"),
        "not Triton's image": (3, "tritonserver is not on this machine"),
        "no library that registers": (3, "no library that registers it in this TensorRT"),
    }[case]
    assert done.returncode == code
    assert said in done.stderr
    assert not server.calls("tritonserver")


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


def test_the_prebuilt_libraries_are_named_for_triton_where_they_fit(device: Device) -> None:
    done = device.run("build_engine.sh")
    register = device.root / "plugin/prebuilt" / os.uname().machine / "libfna_plugin_register.so"
    assert f"for Triton: tritonserver --backend-config=tensorrt,plugins={register}" in done.stdout
    assert register.is_file()
    assert "compiling" not in done.stdout


def seal(root: Path) -> None:
    """Write a bundle's checksums anew."""
    names = [line.split("  ")[1] for line in (root / "SHA256SUMS").read_text().splitlines()]
    done = subprocess.run(["sha256sum", *names], capture_output=True, text=True, check=True, cwd=root)
    (root / "SHA256SUMS").write_text(done.stdout)


@pytest.fixture
def device_11(device: Device, headers: Headers, tmp_path: Path) -> Device:
    """A device with TensorRT 11 and its headers, for which the prebuilt plugin loads."""
    include = shutil.copytree(headers.tensorrt, tmp_path / "tensorrt-11" / "include")
    version = include / "NvInferVersion.h"
    text = re.sub(r"(define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR)) 10\b", r"\1 11", version.read_text())
    version.write_text(text)
    library = device.root / "plugin/prebuilt" / os.uname().machine / "libfna_plugin.so"
    source = tmp_path / "stub.cpp"
    source.write_text('extern "C" void* const* getCreators(int& count) { count = 0; return nullptr; }\n')
    compile_cpp("-shared", "-fPIC", source, "-Wl,-soname,libfna_plugin.so", "-o", library)
    seal(device.root)
    device.env |= {"STAND_IN_VERSION": "110401", "TENSORRT_ROOT": str(include.parent), "CUDA_ROOT": str(headers.cuda)}
    return device


def test_under_another_tensorrt_the_library_for_triton_is_compiled_beside_the_plugin(device_11: Device) -> None:
    """The plugin itself loads under any version; what registers it calls the registry of one."""
    done = device_11.run("build_engine.sh")
    assert done.returncode == 0, done.stderr
    folder = device_11.root / "build" / "plugin"
    assert f"--backend-config=tensorrt,plugins={folder}/libfna_plugin_register.so" in done.stdout
    assert b"libnvinfer.so.11" in (folder / "libfna_plugin_register.so").read_bytes()
    assert (folder / "libfna_plugin.so").is_file()
    assert "--dynamicPlugins=build/plugin/libfna_plugin.so" in device_11.calls()[0]
    assert "compiling" not in device_11.run("build_engine.sh").stdout


def test_headers_of_another_tensorrt_than_the_one_that_runs_are_named(device_11: Device) -> None:
    done = device_11.run("build_engine.sh", STAND_IN_VERSION="120000")
    assert done.returncode == 0, done.stderr
    assert "Triton cannot use this bundle's plugin: the headers in" in done.stdout
    assert "--backend-config" not in done.stdout


@pytest.mark.parametrize("missing", [{"CXX": "no-such-compiler"}, {"TENSORRT_ROOT": "/nowhere"}])
def test_without_compiler_or_headers_the_engine_is_built_but_not_checked(
    device: Device, missing: dict[str, str]
) -> None:
    del device.env["FNA_RUNNER"]
    done = device.run("build_engine.sh", **missing)
    assert done.returncode == 0, done.stderr
    assert "without the runner, which cannot be compiled here: " in done.stdout
    assert (device.root / ENGINE).is_file()
    done = device.run("check.sh", **missing)
    assert done.returncode == 3
    assert "the runner cannot be compiled here: " in done.stderr


@pytest.fixture(scope="module")
def ada(tiny: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for a GPU that TensorRT for RTX knows."""
    return make_bundle(tiny, tmp_path_factory.mktemp("ada") / "ada", table, target="rtx-ada")


@pytest.fixture
def rtx(ada: Path, tmp_path: Path) -> Device:
    root = shutil.copytree(ada, tmp_path / "bundle")
    return make_device(root, tmp_path / "bin", "tensorrt_rtx", "runner")


def test_tensorrt_rtx_gets_the_fused_model(rtx: Device) -> None:
    assert rtx.run("build_engine.sh").returncode == 0
    (call,) = rtx.calls()
    assert call[0] == "--onnx=model.fused.onnx"
    assert not any(word.startswith("--dynamicPlugins") for word in call)
    assert rtx.run("build_engine.sh", "--lowering", "plugin").returncode == 2


def test_where_the_fused_model_is_refused_the_portable_one_is_built(rtx: Device) -> None:
    """Once it has been refused it is not tried again; a form that was asked for is not replaced."""
    refuses = {"STAND_IN_FAIL": "no attention", "STAND_IN_FAILS_ON": "model.fused.onnx"}
    done = rtx.run("build_engine.sh", "--workspace", "64", **refuses)
    assert done.returncode == 0, done.stderr
    assert "refuses the fused form" in done.stdout
    assert [call[0] for call in rtx.calls()] == ["--onnx=model.fused.onnx", "--onnx=model.portable.onnx"]
    assert "LOWERING=portable" in (rtx.root / "build/last.sh").read_text()
    assert "refused the fused form before" in rtx.run("build_engine.sh", "--workspace", "64", **refuses).stdout
    assert len(rtx.calls()) == 2
    assert rtx.run("build_engine.sh", "--lowering", "fused", **refuses).returncode == 2


@pytest.mark.parametrize(("version", "form"), [("100300", "decomposed"), ("101400", "fused"), ("110100", "fused")])
def test_without_kernels_the_form_follows_the_version_of_tensorrt(
    turing: Path, tmp_path: Path, version: str, form: str
) -> None:
    device = make_device(shutil.copytree(turing, tmp_path / "bundle"), tmp_path / "bin", "trtexec", "runner")
    assert device.run("build_engine.sh", STAND_IN_VERSION=version).returncode == 0
    assert device.calls()[0][0] == f"--onnx=model.{form}.onnx"


@pytest.fixture(scope="module")
def turing(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for a GPU that the plugin has no kernels for."""
    folder = tmp_path_factory.mktemp("turing")
    return make_bundle(tiny, folder / "t4", folder / "no-table", target="t4")


def test_check_runs_the_recorded_photographs_against_the_recorded_outputs(device: Device) -> None:
    done = device.run("check.sh", "--precision", "fp16", "--runs", "50", "--graph")
    assert done.returncode == 0, done.stderr
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


def test_tolerances_of_tasks_reach_the_runner(device: Device) -> None:
    settings = device.root / "settings.sh"
    settings.write_text(
        settings.read_text().replace("TASK_TOLERANCES=()", "TASK_TOLERANCES=(a=row_cosine:0.9 b=regret:0)")
    )
    seal(device.root)
    done = device.run("check.sh")
    assert done.returncode == 0, done.stderr
    call = device.calls("runner")[-1]
    assert [call[i + 1] for i, word in enumerate(call) if word == "--task-tolerance"] == [
        "a=row_cosine:0.9",
        "b=regret:0",
    ]
    assert "cosine 0.99999; a=row_cosine:0.9 b=regret:0" in done.stdout


NVPMODEL = """#!/bin/sh
[ "$2" = --verbose ] && echo 'NVPM VERB: PARAM GPU_POWER: ARG MAX_FREQ: REAL_VAL: 1020000000 CONF_VAL: 1020000000'
echo NV Power Mode: MAXN_SUPER
echo 2
"""
TEGRASTATS = """#!/bin/sh
# Two lines of an Orin Nano, then as tegrastats does: until it is stopped.
echo 'RAM 3345/7620MB (lfb 4x4MB) CPU [1%@729,off] GR3D_FREQ 0%@[305] cpu@45.3C gpu@43.2C VDD_IN 4612mW/4612mW VDD_SOC 1444mW/1444mW'
echo 'RAM 3345/7620MB (lfb 4x4MB) CPU [9%@729,off] GR3D_FREQ 9%@[918] cpu@46C gpu@51.5C VDD_IN 9000mW/6806mW VDD_SOC 1446mW/1445mW'
exec sleep 60
"""


def test_power_mode_clocks_and_what_tegrastats_saw_stand_beside_the_latency(device: Device) -> None:
    """MAXN is mode 0 on some modules and 2 on others, so that no number is assumed."""
    for name, text in (("nvpmodel", NVPMODEL), ("tegrastats", TEGRASTATS)):
        (device.bin / name).write_text(text)
        (device.bin / name).chmod(0o755)
    done = device.run("check.sh", STAND_IN_RUNNER_SECONDS="0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NVPM VERB: PARAM GPU_POWER") == 2
    numbers = json.loads((device.root / "build" / "check.json").read_text())
    assert numbers["median_ms"] == 5
    assert numbers["power_mode"] == "NV Power Mode: MAXN_SUPER 2"
    assert "REAL_VAL: 1020000000" in numbers["power_before"]
    assert "REAL_VAL: 1020000000" in numbers["power_after"]
    assert numbers["tegrastats"] == {
        "samples": 2,
        "power_mw": {"VDD_IN": {"mean": 6806, "largest": 9000}, "VDD_SOC": {"mean": 1445, "largest": 1446}},
        "largest_celsius": {"cpu": 46, "gpu": 51.5},
    }


def test_streams_reach_the_runner(device: Device) -> None:
    assert device.run("check.sh", "--streams", "4").returncode == 0
    call = device.calls("runner")[-1]
    assert call[call.index("--streams") + 1] == "4"
    assert device.run("check.sh", "--streams", "many").returncode == 2


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
