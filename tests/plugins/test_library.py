"""The C++ library, without a GPU: what it exports, how it behaves as TensorRT calls it, and what it would launch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from fna.chebyshev import ChebyshevSteps
from fna.plugins.built import LIBRARIES
from fna.plugins.focal_plan import FocalShape, focal_plan, focal_workspace_bound
from fna.plugins.launch_plan import (
    DTYPES,
    AttentionShape,
    Launch,
    LaunchPlan,
    all_variants,
    attention_plan,
    workspace_bound,
)
from fna.plugins.library import NEWEST_GLIBC, build_libraries, glibc_of
from fna.plugins.sampling_plan import sampling_plan
from fna.plugins.table.compile import Compiled
from fna.plugins.table.kernel_file import read_kernels, without_kernels
from fna.plugins.table.read import load_table
from fna.plugins.table.write import write_table

from .conftest import BUILD, ROOT, Programs, build_programs, locked, needs_triton

TENSORRT_TYPE = {"fp32": 0, "fp16": 1, "bf16": 7}
"""nvinfer1::DataType: kFLOAT, kHALF, kBF16."""

EXPORTED = {"getCreators", "setLoggerFinder", "fnaCountKernels"}

INPUTS = ("query", "key", "value", "landmarks", "bias")


def exported(library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def needed(library: Path) -> str:
    return subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout


def test_the_library_exports_exactly_its_symbols(programs: Programs) -> None:
    assert exported(programs.library) == EXPORTED


def test_the_library_links_neither_tensorrt_nor_cuda(programs: Programs) -> None:
    for name in LIBRARIES:
        assert not re.search(r"NEEDED.*(nvinfer|cuda|cudart)", needed(programs.folder / name))


def test_the_libraries_run_on_the_c_library_of_jetpack_6(programs: Programs) -> None:
    """Ubuntu 22.04: glibc 2.35, GLIBCXX 3.4.30."""
    for name in LIBRARIES:
        library = programs.folder / name
        text = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
        glibc, glibcxx = (
            max((tuple(map(int, v.split("."))) for v in re.findall(rf"{symbols}_([0-9.]+)", text)), default=(0,))
            for symbols in ("GLIBC", "GLIBCXX")
        )
        assert glibc_of(library) == glibc <= NEWEST_GLIBC
        assert glibcxx <= (3, 4, 30)


def test_the_libraries_read_no_number_with_the_c_library() -> None:
    """From glibc 2.38 on those functions are symbols that no older one has; this machine may be too old to show it."""
    for source in sorted((ROOT / "plugins" / "src").rglob("*.?pp")):
        assert not re.search(r"\b(ato[ilf]|strto\w+|sscanf|fscanf|stoi|stol|stoul)\(", source.read_text()), source


def test_tensorrts_calls_in_its_order(sanitized: Programs) -> None:
    """Under AddressSanitizer and UndefinedBehaviorSanitizer; see plugins/tests/walk.cpp."""
    done = sanitized.run("walk")
    assert (done.returncode, done.stdout) == (0, "walked\n"), done.stderr


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_fields_never_crash(sanitized: Programs, seed: int) -> None:
    done = sanitized.run("fuzz_fields", seed, 20000)
    assert (done.returncode, done.stdout) == (0, "fuzzed\n"), done.stderr


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_kernels_are_unpacked_exactly(programs: Programs, level: int) -> None:
    data = bytes(range(256)) * 40 + os.urandom(70000) + b"\0" * 3000
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    packed = packer.compress(data) + packer.flush()
    program = str(programs.folder / "inflate_check")
    assert subprocess.run([program, str(len(data))], input=packed, capture_output=True, check=False).stdout == data
    for damaged in (packed[:-9], b"\xff" + packed[1:], b""):
        assert (
            subprocess.run([program, str(len(data))], input=damaged, capture_output=True, check=False).returncode == 1
        )


class FakeDriver:
    """Runs `enqueue` with the driver's stand-in, which records what would be launched."""

    def __init__(self, programs: Programs, table: Path, folder: Path) -> None:
        self.programs, self.log = programs, folder / "cuda.jsonl"
        layouts = {kernel.symbol: kernel.layout for kernel in load_table(table).kernels.values()}
        self.env = {
            **os.environ,
            "LD_LIBRARY_PATH": str(programs.folder / "fake"),
            "FNA_FAKE_CUDA_LOG": str(self.log),
            "FNA_FAKE_CUDA_LAYOUTS": ";".join(f"{symbol}={layout}" for symbol, layout in layouts.items()),
        }

    def run(self, *arguments: object, **env: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
        self.log.unlink(missing_ok=True)
        done = self.programs.run("enqueue", *arguments, env={**self.env, **env})
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return done, [json.loads(line) for line in lines]


@pytest.fixture
def driver(programs: Programs, table: Path, tmp_path: Path) -> FakeDriver:
    return FakeDriver(programs, table, tmp_path)


def expected_launches(plan: LaunchPlan, inputs: tuple[str, ...], output: str) -> list[dict]:
    """What the stand-in driver has to see: see plugins/tests/enqueue.cpp for the addresses."""
    addresses = {"key_mask": 0} | {name: (i + 1) << 32 for i, name in enumerate(inputs)} | {output: 100 << 32}
    addresses |= {name: (200 << 32) + buffer.offset for name, buffer in plan.buffers.items()}

    def describe(launch: Launch) -> dict:
        arguments = [addresses[a] if isinstance(a, str) else a for a in launch.arguments]
        return {"grid": list(launch.grid), "arguments": arguments, "tail": [0, 0]}

    return [describe(launch) for launch in plan.launches]


def workspace_of(done: subprocess.CompletedProcess[str]) -> int:
    return int(re.search(r"workspace (\d+)", done.stdout)[1])


@pytest.fixture(scope="session")
def all_variants_driver(tmp_path_factory: pytest.TempPathFactory) -> FakeDriver:
    """A library whose table names every variant, with images that only the stand-in driver takes: nothing to compile."""
    needs_triton()
    from fna.plugins.kernels import registry

    folder = BUILD / "test-plugin-stubs"
    folder.mkdir(parents=True, exist_ok=True)
    image = folder / "stub.cubin"
    image.write_bytes(b"\x7fELF".ljust(18, b"\0") + (190).to_bytes(2, "little"))  # EM_CUDA
    entries = [
        Compiled(
            variant=variant.name, sm=87, symbol=f"{variant.kernel}_kernel", shared=64 * 1024, static_shared=0, warps=4,
            registers=0, stack=0, layout=registry.parameter_layout(variant), image=str(image),
        )
        for variant in all_variants()
    ]  # fmt: skip
    with locked("stubs"):
        write_table(entries, folder)
    built = build_programs(folder, "native", "-DFNA_BUILD_TESTS=ON", targets=("fna_plugin", "enqueue", "fake_cuda"))
    return FakeDriver(built, folder, tmp_path_factory.mktemp("stubs"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 64, 65, 128, 129, 256])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "head_size", "iterations", "multiprocessors"),
    [(1, 12, 1370, 64, 6, 16), (3, 5, 257, 80, 1, 132), (8, 16, 16384, 128, 2, 84)],
)
def test_the_library_plans_every_variant_as_python_does(
    all_variants_driver, dtype, count, batch, heads, tokens, head_size, iterations, multiprocessors
) -> None:
    shape = AttentionShape(dtype, batch, heads, tokens, head_size, count, shared_landmarks=True, shared_bias=batch == 1)
    plan = attention_plan(shape, scale=0.125, iterations=iterations, exact_rows=True, multiprocessors=multiprocessors)
    done, calls = all_variants_driver.run(
        "attention", TENSORRT_TYPE[dtype], batch, heads, tokens, head_size, count, 1, batch, 0.125, iterations, 1,
        FNA_FAKE_CUDA_SM="87", FNA_FAKE_CUDA_MULTIPROCESSORS=str(multiprocessors),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert workspace_of(done) == workspace_bound(shape)
    launches = [call for call in calls if call["call"] == "launch"]
    assert [call["symbol"] for call in launches] == [f"{each.variant.kernel}_kernel" for each in plan.launches] * 2
    found = [{name: call[name] for name in ("grid", "arguments", "tail")} for call in launches]
    assert found == expected_launches(plan, INPUTS, "out") * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "count"),
    [(2, 200, 96, 33), (2, 200, 100, 33), (1, 16384, 768, 256), (3, 1025, 7, 9)],
)
def test_the_library_plans_sampling_as_python_does(all_variants_driver, dtype, batch, tokens, channels, count) -> None:
    plan = sampling_plan(dtype, batch, tokens, channels, count)
    done, calls = all_variants_driver.run("sampling", TENSORRT_TYPE[dtype], batch, tokens, channels, count)
    assert done.returncode == 0, done.stdout
    found = [{n: call[n] for n in ("grid", "arguments", "tail")} for call in calls if call["call"] == "launch"]
    assert found == expected_launches(plan, ("features",), "landmarks") * 2


@pytest.mark.parametrize("multiprocessors", [8, 132])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "head_size", "count", "rows", "bias_rows", "iterations", "exact"),
    [
        pytest.param(1, 6, 1370, 64, 64, 1, 1, 6, 1, id="DINOv2 small"),
        pytest.param(8, 12, 577, 64, 33, 8, 1, 6, 0, id="landmarks for each image"),
        pytest.param(2, 3, 16384, 32, 1, 1, 2, 1, 1, id="one landmark, one iteration"),
        pytest.param(1, 1, 64, 48, 64, 1, 1, 3, 0, id="as many landmarks as tokens"),
    ],
)
def test_the_library_launches_what_the_plan_says(
    driver, batch, heads, tokens, head_size, count, rows, bias_rows, iterations, exact, multiprocessors
) -> None:
    """The C++ launch plan and the Python one, compared launch by launch, argument by argument."""
    shape = AttentionShape(
        "fp16", batch, heads, tokens, head_size, count, shared_landmarks=rows == 1, shared_bias=bias_rows == 1
    )
    plan = attention_plan(
        shape, scale=0.125, iterations=iterations, exact_rows=bool(exact), multiprocessors=multiprocessors
    )
    done, calls = driver.run(
        "attention", 1, batch, heads, tokens, head_size, count, rows, bias_rows, 0.125, iterations, exact,
        FNA_FAKE_CUDA_SM="87", FNA_FAKE_CUDA_MULTIPROCESSORS=str(multiprocessors),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert workspace_of(done) == workspace_bound(shape)
    assert [call for call in calls if call["call"] == "load"] == [{"call": "load", "kind": "cubin"}] * len(
        plan.launches
    )
    launches = [call for call in calls if call["call"] == "launch"]
    found = [{name: call[name] for name in ("grid", "arguments", "tail")} for call in launches]
    assert found == expected_launches(plan, INPUTS, "out") * 2  # enqueued twice, loaded once
    table = load_table(driver.programs.folder.parent)
    for call, launch in zip(launches, plan.launches * 2, strict=True):
        kernel = table.kernels[launch.variant.name, 87]
        assert (call["symbol"], call["threads"], call["shared"]) == (kernel.symbol, 32 * kernel.warps, kernel.shared)


@pytest.mark.parametrize(
    ("mask_rows", "sink"), [(1, 0), (3, 1), (0, 1)], ids=["one mask", "a mask and sinks for each image", "none"]
)
@pytest.mark.parametrize("count", [33, 200])
def test_version_2_launches_what_the_plan_with_a_mask_says(all_variants_driver, count, mask_rows, sink) -> None:
    shape = AttentionShape("bf16", 3, 6, 300, 64, count, True, True, masked=mask_rows > 0, shared_mask=mask_rows == 1)
    plan = attention_plan(shape, scale=0.125, iterations=6, exact_rows=True, multiprocessors=16, sink=bool(sink))
    done, calls = all_variants_driver.run(
        "attention", TENSORRT_TYPE["bf16"], 3, 6, 300, 64, count, 1, 1, 0.125, 6, 1, mask_rows, sink,
        FNA_FAKE_CUDA_SM="87", FNA_FAKE_CUDA_MULTIPROCESSORS="16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert workspace_of(done) == workspace_bound(shape)
    found = [{n: call[n] for n in ("grid", "arguments", "tail")} for call in calls if call["call"] == "launch"]
    inputs = (*INPUTS, "key_mask") if mask_rows else INPUTS
    assert found == expected_launches(plan, inputs, "out") * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [33, 96, 128, 200])
@pytest.mark.parametrize(("steps", "low", "mask_rows"), [(8, 0.05, 0), (10, 0.03, 1), (1, 0.3, 3)])
def test_version_3_launches_what_the_plan_with_chebyshev_steps_says(
    all_variants_driver, dtype, count, steps, low, mask_rows
) -> None:
    shape = AttentionShape(dtype, 3, 6, 300, 80, count, True, True, masked=mask_rows > 0, shared_mask=mask_rows == 1)
    plan = attention_plan(
        shape, scale=0.125, iterations=6, exact_rows=True, multiprocessors=16, chebyshev=ChebyshevSteps(steps, low)
    )
    done, calls = all_variants_driver.run(
        "attention", TENSORRT_TYPE[dtype], 3, 6, 300, 80, count, 1, 1, 0.125, 6, 1, mask_rows, 0, steps, low,
        FNA_FAKE_CUDA_SM="87", FNA_FAKE_CUDA_MULTIPROCESSORS="16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert workspace_of(done) == workspace_bound(shape, chebyshev=True)
    expected = expected_launches(plan, (*INPUTS, "key_mask") if mask_rows else INPUTS, "out") * 2
    launches = [call for call in calls if call["call"] == "launch"]
    assert [call["grid"] for call in launches] == [launch["grid"] for launch in expected]
    for call, launch in zip(launches, expected, strict=True):  # the stand-in writes an fp32 in nine digits
        assert np.float32(call["arguments"]).tolist() == np.float32(launch["arguments"]).tolist()
        assert [int(a) for a in call["arguments"]] == [int(a) for a in launch["arguments"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", [16, 108])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "head_size", "tiles", "tile_rows", "list_length", "prefix", "hot", "mask_rows"),
    [
        pytest.param(1, 6, 1370, 64, 25, 64, 317, 1, 16, 0, id="DINOv2 small"),
        pytest.param(3, 2, 581, 80, 9, 81, 200, 5, 64, 3, id="tiles of two programs, a mask for each image"),
        pytest.param(2, 12, 577, 128, 36, 16, 577, 0, 0, 1, id="no prefix, no hot keys, one mask"),
        pytest.param(1, 1, 65, 16, 1, 64, 65, 1, 0, 0, id="nothing to prepare"),
    ],
)
def test_the_library_plans_focal_attention_as_python_does(
    all_variants_driver, dtype, batch, heads, tokens, head_size, tiles, tile_rows, list_length, prefix, hot, mask_rows,
    multiprocessors,
) -> None:  # fmt: skip
    shape = FocalShape(
        dtype, batch, heads, tokens, head_size, tiles, tile_rows, list_length,
        masked=mask_rows > 0, shared_mask=mask_rows == 1,
    )  # fmt: skip
    plan = focal_plan(shape, prefix_tokens=prefix, hot=hot, scale=0.125, multiprocessors=multiprocessors)
    done, calls = all_variants_driver.run(
        "focal", TENSORRT_TYPE[dtype], batch, heads, tokens, head_size, tiles, tile_rows, list_length, prefix, hot, 0.125,
        mask_rows, FNA_FAKE_CUDA_SM="87", FNA_FAKE_CUDA_MULTIPROCESSORS=str(multiprocessors),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert plan.workspace_bytes <= workspace_of(done) == focal_workspace_bound(shape)
    launches = [call for call in calls if call["call"] == "launch"]
    assert [call["symbol"] for call in launches] == [f"{each.variant.kernel}_kernel" for each in plan.launches] * 2
    found = [{name: call[name] for name in ("grid", "arguments", "tail")} for call in launches]
    inputs = ("query", "key", "value", "tile_queries", "tile_keys", "tile_bias", "places", "key_mask")
    assert found == expected_launches(plan, inputs[: 8 if mask_rows else 7], "out") * 2


def test_the_library_launches_sampling_as_planned(driver: FakeDriver) -> None:
    plan = sampling_plan("fp16", 2, 1370, 384, 64)
    done, calls = driver.run("sampling", 1, 2, 1370, 384, 64)
    assert done.returncode == 0, done.stdout
    found = [{n: call[n] for n in ("grid", "arguments", "tail")} for call in calls if call["call"] == "launch"]
    assert found == expected_launches(plan, ("features",), "landmarks") * 2
    assert plan.workspace_bytes <= workspace_of(done)


SMALL = ("attention", 1, 1, 6, 1370, 64, 64, 1, 1, 0.125, 6, 1)


@pytest.mark.parametrize("sm", ["88", "101", "130"])
def test_a_chip_that_the_table_lacks_gets_the_ptx(driver: FakeDriver, sm: str) -> None:
    done, calls = driver.run(*SMALL, FNA_FAKE_CUDA_SM=sm)
    assert done.returncode == 0, done.stdout
    assert {call["kind"] for call in calls if call["call"] == "load"} == {"ptx"}


def test_a_driver_that_refuses_the_cubin_gets_the_ptx(driver: FakeDriver) -> None:
    done, calls = driver.run(*SMALL, FNA_FAKE_CUDA_REFUSE_CUBIN="1")
    assert done.returncode == 0, done.stdout
    assert {call["kind"] for call in calls if call["call"] == "load"} == {"ptx"}
    assert "does not load" in done.stdout


@pytest.mark.parametrize("refused", [False, True])
def test_the_library_tells_how_many_kernels_the_driver_compiled_from_ptx(driver: FakeDriver, refused: bool) -> None:
    done, _ = driver.run(*SMALL, **({"FNA_FAKE_CUDA_REFUSE_CUBIN": "1"} if refused else {}))
    assert f"kernels: {'0 compiled, 3 from PTX' if refused else '3 compiled, 0 from PTX'}\n" in done.stdout


def test_a_thread_without_a_context_takes_that_of_the_stream(driver: FakeDriver) -> None:
    done, calls = driver.run(*SMALL, FNA_FAKE_CUDA_NO_CONTEXT="1")
    assert done.returncode == 0, done.stdout
    assert calls == driver.run(*SMALL)[1]


def test_turing_is_refused_and_told_the_way_out(driver: FakeDriver) -> None:
    done, calls = driver.run(*SMALL, FNA_FAKE_CUDA_SM="75")
    assert done.returncode == 1
    assert "compute capability 7.5" in done.stdout
    assert "portable lowering" in done.stdout
    assert not calls


def test_a_variant_that_was_not_compiled_is_named(driver: FakeDriver) -> None:
    done, _ = driver.run("attention", 0, 1, 6, 1370, 64, 64, 1, 1, 0.125, 6, 1)
    assert done.returncode == 1
    assert "no kernel landmark-fp32-s64-d64 for compute capability 8.7" in done.stdout


def test_a_library_that_lost_its_kernels_says_so(programs: Programs, table: Path, tmp_path: Path) -> None:
    """As `strip` leaves it."""
    for name in ("enqueue", "fake"):
        (tmp_path / name).symlink_to(programs.folder / name)
    bare = Programs(tmp_path)
    bare.library.write_bytes(without_kernels(programs.library.read_bytes()))
    done, _ = FakeDriver(bare, table, tmp_path).run(*SMALL)
    assert done.returncode == 1
    assert (
        "libfna_plugin.so carries no kernels: it was not joined with kernels.bin, or was stripped since" in done.stdout
    )


def test_a_damaged_index_of_kernels_is_told_from_none(programs: Programs, table: Path, tmp_path: Path) -> None:
    """The last image is said to lie behind all of them."""
    for name in ("enqueue", "fake"):
        (tmp_path / name).symlink_to(programs.folder / name)
    last, damaged = read_kernels(table / "kernels.bin")[-1], Programs(tmp_path)
    row, wrong = (f"{last.variant} {last.sm} {place}".encode() for place in (last.offset, "9" * len(str(last.offset))))
    damaged.library.write_bytes(programs.library.read_bytes().replace(row, wrong))
    done, _ = FakeDriver(damaged, table, tmp_path).run(*SMALL)
    assert done.returncode == 1
    assert "libfna_plugin.so has a damaged index of kernels; build it anew: fna plugin" in done.stdout


def test_the_library_cross_compiles_for_aarch64(table: Path) -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None:
        pytest.skip("the cross compiler is not installed: apt-get install g++-aarch64-linux-gnu")
    with locked("cmake"):
        libraries = build_libraries(table, "aarch64", header_cache=BUILD / "headers")
    assert libraries[0].read_bytes()[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64
    assert exported(libraries[0]) == EXPORTED
    for library in libraries:
        assert glibc_of(library) <= NEWEST_GLIBC
