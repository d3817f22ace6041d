"""The C++ runner, compiled as a device compiles it: what it says without a GPU, and the parts that need none."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fna.engines.bundle.tolerances import measure

from ..conftest import ROOT, STAND_IN, Headers, compile_cpp

RUNNER = ROOT / "engines" / "bundle" / "runner"


@pytest.fixture(scope="module")
def runner(tensorrt_root: Path, headers: Headers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linked with the stand-in library, which has the version of the headers."""
    program = tmp_path_factory.mktemp("runner") / "fna_runner"
    library = tensorrt_root / "lib"
    compile_cpp(
        *headers.flags,
        RUNNER / "fna_runner.cpp",
        "-o",
        program,
        f"-L{library}",
        f"-Wl,-rpath,{library}",
        "-lnvinfer",
        "-ldl",
    )
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def has_driver() -> bool:
    return (
        subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout.count("libcuda.so.1") > 0
    )


def test_without_a_gpu_it_says_so_and_exits_with_3(runner: Path, tmp_path: Path) -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA driver, so the runner goes on")
    (tmp_path / "x.engine").write_bytes(b"engine")
    done = run(runner, tmp_path / "x.engine", "--input", "x.npy")
    assert done.returncode == 3
    assert done.stderr == (
        "fna_runner: this machine has no NVIDIA driver (libcuda.so.1 is not found); run this on the device with the GPU\n"
    )


def test_it_links_with_tensorrt_rtx_and_refuses_headers_of_another_version(
    headers: Headers, table: Path, tmp_path: Path
) -> None:
    """By its CMakeLists. The wheel of TensorRT-RTX carries no headers, so it is TensorRT's that are compiled against here."""
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    if package is None or not package.submodule_search_locations:
        pytest.skip("TensorRT-RTX is not installed: pip install 'fna[rtx]'")
    root = tmp_path / "rtx"
    root.mkdir()
    (root / "include").symlink_to(headers.tensorrt)
    (root / "lib").symlink_to(package.submodule_search_locations[0])
    configure = [
        "cmake",
        "-S",
        RUNNER,
        "-B",
        tmp_path / "out",
        f"-DTENSORRT_ROOT={root}",
        "-DFNA_RTX=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    for command in ([*configure, f"-DCUDA_ROOT={headers.cuda}"], ["cmake", "--build", tmp_path / "out"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    program = tmp_path / "out" / "fna_runner"
    library = shutil.copy(table / "x86_64" / "libfna_plugin.so", tmp_path)
    assert "the plugin library does not load" in run(program, "--check-plugin", library).stderr
    compile_cpp("-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", library)
    done = run(program, "--check-plugin", library)
    assert done.returncode == 3
    assert "was compiled with the headers of TensorRT 10." in done.stderr
    if not has_driver():
        (tmp_path / "x.engine").write_bytes(b"engine")
        assert run(program, tmp_path / "x.engine").returncode == 3


def test_number_formats_items_and_layers(headers: Headers, tensorrt_root: Path, tmp_path: Path) -> None:
    program, library = tmp_path / "parts", tensorrt_root / "lib"
    compile_cpp(
        *headers.flags, f"-I{RUNNER}", Path(__file__).parent / "runner_parts.cpp", "-o", program,
        f"-L{library}", f"-Wl,-rpath,{library}", "-lnvinfer", "-ldl",
    )  # fmt: skip
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 17, 5)).astype(np.float32)
    broken = exact.copy()
    broken[1, 2, 3] = np.nan
    contents = {
        "exact": exact,
        "near": exact + np.float32(1e-5),
        "half": exact.astype(np.float16),
        "far": exact + np.float32(1e-2),
        "turned": -exact,
        "nan": broken,
        "shape": exact[:2],
        "double": exact.astype(np.float64),
        "fortran": np.asfortranarray(exact),
    }
    for name, array in contents.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "exact.npy").read_bytes()[:-4])
    (tmp_path / "text.npy").write_text("no numbers at all")
    return {path.stem: path for path in tmp_path.glob("*.npy")}


def compare(runner: Path, arrays: dict[str, Path], actual: str, *more: object) -> subprocess.CompletedProcess[str]:
    return run(runner, "--compare", f"tokens={arrays[actual]}", "--expect", f"tokens={arrays['exact']}", *more)


def test_errors_are_those_that_numpy_gives(runner: Path, arrays: dict[str, Path], tmp_path: Path) -> None:
    record = tmp_path / "errors.json"
    assert compare(runner, arrays, "far", "--relative-l2", "0.1", "--json", record).returncode == 0
    found = json.loads(record.read_text())["outputs"]["tokens"]
    exact, far = (np.load(arrays[name]).astype(np.float64) for name in ("exact", "far"))
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(far - exact) / np.linalg.norm(exact), rel=1e-6)
    assert found["cosine"] == pytest.approx((far * exact).sum() / np.linalg.norm(far) / np.linalg.norm(exact), rel=1e-6)
    assert found["max_abs"] == pytest.approx(np.abs(far - exact).max(), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 17, 5), (2, 9), (2, 1, 6, 4), (1, 1)])
def test_measures_of_tasks_are_those_of_python(runner: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal(shape).astype(np.float32) + 1
    actual = expected + 0.3 * rng.standard_normal(shape).astype(np.float32)
    actual.reshape(-1, shape[-1])[0] = 0
    for name, array in (("expected", expected), ("actual", actual)):
        np.save(tmp_path / f"{name}.npy", array)
    record = tmp_path / "errors.json"
    run(
        runner,
        "--compare",
        f"x={tmp_path / 'actual.npy'}",
        "--expect",
        f"x={tmp_path / 'expected.npy'}",
        "--json",
        record,
    )
    found = json.loads(record.read_text())["outputs"]["x"]
    for name, value in measure(expected, actual).items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize(
    ("actual", "limits", "code", "said"),
    [
        ("far", ["row_cosine:0.9999", "row_cosine_p5:0.999"], 0, ""),
        ("far", ["row_cosine:0.9999", "row_cosine_p5:0.99999"], 1, r"has row cosine p5 0.999\d+ \(tolerance 0.99999\)"),
        ("turned", ["correlation:0.9"], 1, r"output tokens has correlation -1 \(tolerance 0.9\)"),
        ("turned", ["regret:0.5"], 1, r"output tokens has regret 3.\d+ \(tolerance 0.5\)"),
        ("far", ["speed:1"], 2, "--task-tolerance tokens=speed:1 cannot be read; write NAME=MEASURE:NUMBER"),
    ],
)
def test_an_output_is_held_to_its_task_alone_where_that_is_known(
    runner: Path, arrays: dict[str, Path], actual: str, limits: list[str], code: int, said: str
) -> None:
    """`far` is out of the usual relative L2."""
    options = [word for limit in limits for word in ("--task-tolerance", f"tokens={limit}")]
    done = compare(runner, arrays, actual, *options)
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("actual", "options", "code", "said"),
    [
        ("near", [], 0, ""),
        ("half", [], 0, ""),
        ("far", [], 1, r"output tokens has relative L2 error 9.88e-03 \(tolerance 1e-03\)"),
        ("turned", ["--relative-l2", "3"], 1, r"output tokens has cosine -1.000000 \(tolerance 0.999\)"),
        ("nan", ["--relative-l2", "1e9"], 1, "output tokens holds 1 NaN or infinite values"),
        ("shape", [], 2, "output tokens has shape 2x17x5, but 3x17x5 was recorded"),
        ("double", [], 2, "neither fp32 nor fp16"),
        ("fortran", [], 2, "Fortran order"),
        ("cut", [], 2, "not as long as its shape says"),
        ("text", [], 2, "does not begin like one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts_name_the_output_and_the_tolerance(
    runner: Path, arrays: dict[str, Path], actual: str, options: list[str], code: int, said: str
) -> None:
    done = compare(runner, arrays, actual, *options)
    assert done.returncode == code, done.stdout + done.stderr
    assert re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.engine"], "none.engine cannot be read"),
        (["--runs"], "--runs needs a value"),
        (["x", "--runs", "many"], "--runs many cannot be used"),
        (["x", "--batch", "0"], "--batch 0 cannot be used; give a number of at least 1"),
        (["x", "y"], "two engines were given"),
        (["x", "--fast"], "unknown option --fast"),
        (["--runs", "3"], "no engine was given"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(runner: Path, arguments: list[str], said: str) -> None:
    done = run(runner, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_tells_every_option(runner: Path) -> None:
    done = run(runner, "--help")
    assert done.returncode == 0
    for option in (
        "--plugin",
        "--input",
        "--expect",
        "--relative-l2",
        "--task-tolerance",
        "--plugin-layers",
        "--graph",
        "--streams",
        "--json",
        "--check-plugin",
    ):
        assert option in done.stdout


class StandInDevice:
    """The runner with a stand-in driver, on an "engine" that doubles [batch, 4]; see stand_in/runtime.hpp and stand_in/cuda.cpp."""

    def __init__(self, runner: Path, driver: Path, folder: Path) -> None:
        self.runner, self.driver, self.folder = runner, driver, folder
        self.items = np.arange(20, dtype=np.float32).reshape(5, 4) - 7
        np.save(folder / "x.npy", self.items)
        np.save(folder / "doubled.npy", self.items * 2)
        (folder / "x.raw").write_bytes(self.items.tobytes())
        (folder / "engine").write_text("doubles")
        (folder / "layers.txt").write_text("/blocks.0/fna\tfp16\n")

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.runner), *map(str, arguments)]
        settings = {**os.environ, "LD_LIBRARY_PATH": str(self.driver), **env}
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, env=settings)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    compile_cpp("-shared", "-fPIC", STAND_IN / "cuda.cpp", "-o", folder / "libcuda.so.1")
    return folder


@pytest.fixture
def device(runner: Path, driver: Path, tmp_path: Path) -> StandInDevice:
    return StandInDevice(runner, driver, tmp_path)


def test_all_items_run_in_batches_and_outputs_are_compared_and_written(device: StandInDevice) -> None:
    """Five items in batches of two: the last batch wraps around, and its second output is dropped."""
    done = device.run("engine", "--input", "x=x.npy", "--expect", "doubled=doubled.npy", "--output", ".", "--runs", 0)
    assert done.returncode == 0, done.stderr
    assert "device: Stand-in GPU, compute capability 8.7, driver for CUDA 12.6" in done.stdout
    assert re.search(r"doubled +0.00e\+00 +1.000000 +0.00e\+00 +ok", done.stdout)
    assert "stand-in context: batch 2" in done.stdout
    (device.folder / "doubled.npy").rename(device.folder / "written.npy")
    assert np.array_equal(np.load(device.folder / "written.npy"), device.items * 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_of_the_profile_gives_the_same_outputs(device: StandInDevice, batch: int) -> None:
    (device.folder / "out").mkdir()
    done = device.run("engine", "--input", "x.raw", "--batch", batch, "--output", "out", "--runs", 0)
    assert done.returncode == 0, done.stderr
    assert f"stand-in context: batch {batch}" in done.stdout
    assert np.array_equal(np.load(device.folder / "out" / "doubled.npy"), device.items * 2)


def test_timing_is_the_events_median_and_99th_percentile(device: StandInDevice) -> None:
    record = device.folder / "check.json"
    done = device.run("engine", "--input", "x.npy", "--runs", 100, "--warm-up", 3, "--json", record)
    assert done.returncode == 0, done.stderr
    assert "latency: batch 2, median 50.500 ms, p99 99.000 ms" in done.stdout
    numbers = json.loads(record.read_text())
    assert (numbers["median_ms"], numbers["p99_ms"], numbers["batch"], numbers["runs"]) == (50.5, 99, 2, 100)
    assert (numbers["device"], numbers["cuda_graph"]) == ("Stand-in GPU", False)


def test_a_cuda_graph_is_timed_where_the_engine_can_be_captured(device: StandInDevice) -> None:
    assert "CUDA graph" in device.run("engine", "--input", "x.npy", "--runs", 2, "--graph").stdout
    done = device.run("engine", "--input", "x.npy", "--runs", 2, "--graph", STAND_IN_NO_CAPTURE="1")
    assert done.returncode == 0
    assert "cannot be captured as a CUDA graph" in done.stderr
    assert "CUDA graph" not in done.stdout


def test_several_streams_are_timed_together(device: StandInDevice) -> None:
    done = device.run(
        "engine", "--input", "x.npy", "--runs", 10, "--warm-up", 0, "--streams", 3, "--json", "check.json"
    )
    assert done.returncode == 0, done.stderr
    assert "10 runs on each of 3 streams" in done.stdout
    numbers = json.loads((device.folder / "check.json").read_text())
    assert (numbers["streams"], numbers["runs"]) == (3, 10)
    assert done.stdout.count("stand-in context: made") == 3


PLUGIN = """
#include <NvInferRuntime.h>
#define OUT extern "C" __attribute__((visibility("default")))
OUT void* const* getCreators(int& count) { static void* creators[1]; count = 1; return creators; }
OUT void fnaCountKernels(int* compiled, int* fromPtx) { *compiled = 2; *fromPtx = 1; }
"""


def test_kernels_that_the_driver_compiled_from_ptx_are_told(device: StandInDevice, headers: Headers) -> None:
    (device.folder / "plugin.cpp").write_text(PLUGIN)
    compile_cpp("-shared", "-fPIC", *headers.flags, device.folder / "plugin.cpp", "-o", device.folder / "plugin.so")
    arguments = ["engine", "--input", "x.npy", "--runs", 0, "--json", "check.json"]
    done = device.run(*arguments, "--plugin", "./plugin.so")
    assert "kernels: 2 compiled for this chip, 1 by the driver from PTX: make the bundle again" in done.stdout, (
        done.stderr
    )
    assert json.loads((device.folder / "check.json").read_text())["kernels"] == {"compiled": 2, "from_ptx": 1}
    assert device.run(*arguments).returncode == 0
    assert "kernels" not in json.loads((device.folder / "check.json").read_text())


def test_wrong_outputs_exit_with_1_and_name_the_output(device: StandInDevice) -> None:
    (device.folder / "engine").write_text("halves")
    done = device.run("engine", "--input", "x.npy", "--expect", "doubled.npy", "--runs", 0, "--json", "check.json")
    assert done.returncode == 1
    assert "fna_runner: output doubled has relative L2 error 7.50e-01 (tolerance 1e-03)" in done.stderr
    assert json.loads((device.folder / "check.json").read_text())["failures"]


def test_plugin_layers_are_judged_by_name_and_type(device: StandInDevice) -> None:
    def judge(lines: str) -> subprocess.CompletedProcess[str]:
        (device.folder / "layers.txt").write_text(lines)
        return device.run("engine", "--input", "x.npy", "--runs", 0, "--plugin-layers", "layers.txt")

    done = judge("/blocks.0/fna\tfp16\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "plugin layers: 1 of 1; 1 in fp16" in done.stdout
    done = judge("/blocks.0/fna\tfp32\n/blocks.1/fna\t?\n")
    assert done.returncode == 1
    assert "layer /blocks.0/fna runs in fp16, but fp32 was asked for" in done.stderr
    assert "layer /blocks.1/fna is not in the engine as a plugin layer" in done.stderr


def test_host_code_of_an_engine_runs_only_where_it_is_allowed(device: StandInDevice) -> None:
    (device.folder / "engine").write_text("compatible")
    run = ["engine", "--input", "x.npy", "--expect", "doubled.npy", "--runs", 0]
    assert device.run(*run, "--allow-host-code").returncode == 0
    done = device.run(*run)
    assert done.returncode == 3
    assert "host code, which is not allowed" in done.stderr


def test_a_type_that_the_engine_does_not_report_is_said(device: StandInDevice) -> None:
    layers = ["--plugin-layers", "layers.txt", "--runs", 0, "--json", "check.json"]
    for env, kind in (({}, "fp16"), ({"STAND_IN_MUTE": "1"}, "type not reported")):
        done = device.run("engine", "--input", "x.npy", *layers, **env)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"plugin layers: 1 of 1; 1 in {kind}" in done.stdout
        assert json.loads((device.folder / "check.json").read_text())["plugin_layers"] == {"/blocks.0/fna": kind}


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        (["engine", "--input", "x.npy"], {"STAND_IN_GPUS": "0"}, 3, "no NVIDIA GPU that can be used"),
        (["layers.txt", "--input", "x.npy"], {}, 3, "cannot be loaded here (stand-in runtime: this is no engine)"),
        (["engine", "--input", "x.npy", "--plugin", "./none.so"], {}, 3, "./none.so does not load"),
        (["engine"], {}, 2, "input x is missing"),
        (["engine", "--input", "y=x.npy"], {}, 2, "the engine has no input 'y'; its first is 'x'"),
        (["engine", "--input", "x.npy", "--batch", "4"], {}, 2, "--batch 4 was asked for, but the engine takes 1 to 3"),
        (["engine", "--input", "layers.txt"], {}, 2, "is no raw fp32 file"),
        (["engine", "--input", "x.npy", "--expect", "tripled=x.npy"], {}, 2, "output tripled is expected"),
    ],
)
def test_what_cannot_run_is_one_line(
    device: StandInDevice, arguments: list[str], env: dict[str, str], code: int, said: str
) -> None:
    done = device.run(*arguments, **env)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("header", sorted(path.name for path in RUNNER.glob("*.hpp")))
def test_every_header_names_what_it_needs(header: str, headers: Headers, tmp_path: Path) -> None:
    (tmp_path / "alone.cpp").write_text(f'#include "{header}"\n#include "{header}"\n')
    compile_cpp(*headers.flags, f"-I{RUNNER}", "-fsyntax-only", tmp_path / "alone.cpp")
