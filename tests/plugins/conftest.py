"""Session fixtures of the plugin's tests: Triton's interpreter, a small kernel table, and the library built from it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
from shared_build import BUILD, KERNEL_CACHE, ROOT, locked

from fna.plugins.launch_plan import KernelVariant, all_variants
from fna.plugins.library import build_libraries
from fna.plugins.table.chips import ALL_IMAGES, FALLBACK, compiled_as

TEST_VARIANTS = (
    "landmark-fp16-s64-d64",
    "landmark_chebyshev-fp16-s64-d64",
    "finish-fp16-s64",
    "finish_chebyshev-fp16-s64",
    "output-fp16-s64-d64",
    "focal_hot-fp16-d64",
    "focal-fp16-d64",
    "fps_step-fp16-d16",
)
"""One variant of each kernel of the commonest case; `fna plugin` compiles them all."""

WHOLE_CHIPS = (80, 87, FALLBACK)
"""Chips with all of TEST_VARIANTS: the oldest, and the Jetson that emulated plugins are."""

FOR_EVERY_CHIP = ("output-fp16-s64-d64", "finish-fp16-s64")
"""Variants for the other chips as well, where every further kernel costs seconds; the kernels' release builds all."""

FOR_WGMMA = ("landmark-fp16-s64-d64",)
"""What sm_90 has beside them: with it, a whole call of attention by its own instructions."""

TEST_TABLE = {
    FOR_EVERY_CHIP: ALL_IMAGES,
    FOR_WGMMA: (*WHOLE_CHIPS, 90),
    tuple(name for name in TEST_VARIANTS if name not in (*FOR_EVERY_CHIP, *FOR_WGMMA)): WHOLE_CHIPS,
}
"""The images of the tests' table: names of variants, and the chips that they are compiled for."""


def variants_named(names: Iterable[str]) -> list[KernelVariant]:
    """The variants of these names."""
    return [variant for variant in all_variants() if variant.name in set(names)]


def needs_triton() -> None:
    """Skip, with the reason, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton's kernels run on the CPU."""
    needs_triton()
    from fna.plugins.emulate import interpreter

    with interpreter() as pool:
        yield pool


def compile_table(folder: Path, images: Mapping[Sequence[str], Sequence[int]]) -> None:
    """Write a table of variants' names and chips, as `build_table` does, but in this process: a worker's start costs seconds."""
    from fna.plugins.table.build import check_kernel
    from fna.plugins.table.compile import compile_variant
    from fna.plugins.table.write import write_table

    KERNEL_CACHE.mkdir(parents=True, exist_ok=True)
    compiled = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as own:
        patch.setenv("TRITON_DISABLE_LINE_INFO", "1")
        patch.setenv("TRITON_CACHE_DIR", own)
        for names, chips in images.items():
            alike: dict[int, list[int]] = {}
            for sm in sorted(chips):
                alike.setdefault(compiled_as(sm), []).append(sm)
            for variant, together in product(variants_named(names), alike.values()):
                compiled += compile_variant(variant, together, KERNEL_CACHE).values()
    for kernel in compiled:
        check_kernel(kernel)
    write_table(compiled, folder)


@pytest.fixture(scope="session")
def table() -> Path:
    """A folder with a kernel table of TEST_VARIANTS, compiled once and cached under build/."""
    needs_triton()
    folder = BUILD / "test-plugin"
    with locked("table"):
        compile_table(folder, TEST_TABLE)
    return folder


@dataclass(frozen=True)
class Programs:
    """A folder of built libraries and test programs."""

    folder: Path

    @property
    def library(self) -> Path:
        """libfna_plugin.so."""
        return self.folder / "libfna_plugin.so"

    def run(
        self, program: str, *arguments: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a test program on the library."""
        command = [str(self.folder / program), str(self.library), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)


def build_programs(table: Path, name: str, *options: str, targets: tuple[str, ...] = ()) -> Programs:
    """Configure and build with CMake, below the table's folder."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("CMake and a C++ compiler are needed: apt-get install cmake g++")
    folder = table / name
    configure = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), f"-DFNA_TABLE_DIR={table}", *options]
    configure += [f"-DFNA_PYTHON={sys.executable}", f"-DFNA_HEADER_CACHE={BUILD / 'headers'}"]
    build = ["cmake", "--build", str(folder), "--parallel", "2", *(["--target", *targets] if targets else [])]
    with locked("cmake"):
        for command in (configure, build):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Programs(folder)


@pytest.fixture(scope="session")
def programs(table: Path) -> Programs:
    """The library as it ships, and the test programs."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("CMake and a C++ compiler are needed: apt-get install cmake g++")
    with locked("cmake"):
        build_libraries(table, platform.machine(), header_cache=BUILD / "headers", checks=True)
    return Programs(table / platform.machine())


@pytest.fixture(scope="session")
def sanitized(table: Path) -> Programs:
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer."""
    targets = ("fna_plugin", "walk", "fuzz_fields")
    return build_programs(
        table, "sanitized", "-DFNA_BUILD_TESTS=ON", "-DFNA_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug", targets=targets
    )
