"""Session fixtures of the bundle's tests: a traced tiny model, a kernel table of stubs, a bundle, and compilers' headers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from shared_build import BUILD, ROOT, locked

STAND_IN = Path(__file__).parent / "stand_in"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A traced file with FNA in both blocks; the batch size is open."""
    from fna.export.sources.loading import load_model
    from fna.export.trace import TraceOptions, export_onnx
    from fna.plan import uniform_plan

    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    export_onnx(load_model("tiny_vit:make"), uniform_plan(2, layers="all", landmarks=6), TraceOptions(56, 56), path)
    return path


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `fna plugin` leaves it, for sm_87, sm_89 and PTX; its kernels and libraries are stubs, each with its own bytes."""
    from fna.plugins.table.compile import Compiled
    from fna.plugins.table.write import write_table

    folder = tmp_path_factory.mktemp("table")
    entries = []
    for variant in ("landmark-fp16-s64-d64", "fps_step-fp16-d16"):
        for chip in (87, 89, 0):
            image = folder / f"{variant}-{chip}.image"
            image.write_bytes(f"{variant} {chip}".encode() * 100)
            entries.append(
                Compiled(
                    variant=variant, sm=chip, symbol="kernel", shared=1024, static_shared=0, warps=4, registers=0, stack=0,
                    layout="ppi", image=str(image),
                )
            )  # fmt: skip
    write_table(entries, folder)
    for machine in ("aarch64", "x86_64"):
        (folder / machine).mkdir()
        for name in ("libfna_plugin.so", "libfna_plugin_register.so"):
            (folder / machine / name).write_bytes(f"stub of {name} for {machine}, opens libnvinfer.so.10\0".encode())
        with (folder / machine / "libfna_plugin.so").open("ab") as library:
            library.write((folder / "kernels.bin").read_bytes())
    return folder


def make_bundle(tiny: Path, output: Path, table: Path, target: str = "jetson-agx-orin", **settings: object) -> Path:
    """Write a bundle of the tiny model with one photograph."""
    from fna.engines.builder.options import BatchRange
    from fna.engines.bundle.write import BundleOptions, write_bundle
    from fna.engines.targets import find_target
    from fna.export.preprocessing import bundled_photographs

    chosen = {"images": bundled_photographs()[:1], "batch": BatchRange(1, 2, 4), "table": table, **settings}
    write_bundle(tiny, output, BundleOptions(target=find_target(target), **chosen))
    return output


@pytest.fixture(scope="session")
def bundle(tiny: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for an AGX Orin, fp32 and fp16. Tests copy it before they change anything."""
    return make_bundle(tiny, tmp_path_factory.mktemp("bundle") / "orin", table, precisions=("fp32", "fp16"))


@dataclass(frozen=True)
class Headers:
    """Folders of the headers that CMake finds, or fetches."""

    tensorrt: Path
    cuda: Path

    @property
    def flags(self) -> list[str]:
        """For g++."""
        return ["-isystem", str(self.tensorrt), "-isystem", str(self.cuda)]


@pytest.fixture(scope="session")
def headers(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Headers:
    """TensorRT's and CUDA's headers, from where plugins/CMakeLists.txt takes them."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("CMake and a C++ compiler are needed: apt-get install cmake g++")
    folder = tmp_path_factory.mktemp("headers")
    configure = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), f"-DFNA_TABLE_DIR={table}"]
    configure += [f"-DFNA_PYTHON={sys.executable}", f"-DFNA_HEADER_CACHE={BUILD / 'headers'}"]
    with locked("cmake"):
        done = subprocess.run(configure, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"(TENSORRT|CUDA)_INCLUDE:PATH=(.*)", (folder / "CMakeCache.txt").read_text()))
    return Headers(Path(found["TENSORRT"]), Path(found["CUDA"]))


def compile_cpp(*arguments: object) -> None:
    """Run g++ with warnings as errors, unoptimised: the tests' compilations are on everyone's clock."""
    command = ["g++", "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def write_stubs(header: Path, output: Path) -> None:
    """Write a class for each of the runtime's interfaces in which every function ends the process; tests override some."""
    text = " ".join(re.sub(r"//.*", "", header.read_text()).split())
    lines = ["#include <NvInferRuntime.h>", "#include <cstdlib>", '#pragma GCC diagnostic ignored "-Wunused-parameter"']
    for name in ("VRuntime", "VCudaEngine", "VExecutionContext", "VEngineInspector"):
        body = re.search(rf"class {name} : public VRoot {{(.*?)}};", text)
        assert body is not None
        functions = re.findall(r"virtual ([^;]*?) = 0;", body[1])
        stubs = [f"    {function} {{ std::abort(); }}" for function in functions]
        lines += ["namespace nvinfer1 {", f"struct {name}Stub : apiv::{name} {{", *stubs, "};", "}"]
    output.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def tensorrt_root(headers: Headers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TENSORRT_ROOT with the real headers and a stand-in library; see stand_in/nvinfer.cpp."""
    root = tmp_path_factory.mktemp("tensorrt")
    (root / "lib").mkdir()
    (root / "include").symlink_to(headers.tensorrt)
    major = re.search(
        r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", (headers.tensorrt / "NvInferVersion.h").read_text()
    )
    assert major is not None
    library = root / "lib" / f"libnvinfer.so.{major[1]}"
    write_stubs(headers.tensorrt / "NvInferImpl.h", root / "stubs.hpp")
    compile_cpp(
        "-shared", "-fPIC", *headers.flags, f"-I{root}", "-Wno-deprecated-declarations", "-Wno-overloaded-virtual",
        STAND_IN / "nvinfer.cpp", f"-Wl,-soname,{library.name}", "-o", library, "-ldl",
    )  # fmt: skip
    (root / "lib" / "libnvinfer.so").symlink_to(library.name)
    return root
