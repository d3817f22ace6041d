"""The C++ runner, compiled as a device compiles it: what it says without a GPU, and the parts that need none."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .conftest import ROOT, Headers, compile_cpp

RUNNER = ROOT / "engines" / "runner"


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
    # The runner's own functions that this does not call are no fault of theirs.
    compile_cpp(
        *headers.flags, f"-I{RUNNER}", "-Wno-unused-function", Path(__file__).parent / "runner_parts.cpp", "-o", program,
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
        "--plugin-layers",
        "--graph",
        "--json",
        "--check-plugin",
    ):
        assert option in done.stdout
