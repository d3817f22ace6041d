"""The ahead-of-time build: every chip compiles, the gates close, the cache holds, the table reads back."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from shared_build import KERNEL_CACHE

from fna.errors import CheckFailedError, InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.plugins.launch_plan import DTYPES, AttentionShape, KernelVariant, attention_plan
from fna.plugins.ptx.check import body_digest
from fna.plugins.ptx.images import load_images
from fna.plugins.sampling_plan import norm_grid_plan, sampling_plan
from fna.plugins.table import chips
from fna.plugins.table.build import MAX_SPILL_BYTES, build_table, check_kernel
from fna.plugins.table.chips import ALL_IMAGES, FALLBACK, FALLBACK_TARGET, compiled_as
from fna.plugins.table.compile import Compiled, compile_variant, toolkit_of
from fna.plugins.table.read import find_table, load_table

from .conftest import TEST_TABLE, TEST_VARIANTS, needs_triton, variants_named

FINE = Compiled(
    variant="output-fp16-s64-d64", sm=86, symbol="output_kernel", shared=99 * 1024, static_shared=0, warps=8,
    registers=255, stack=MAX_SPILL_BYTES, layout="pif", image="", toolkit="12.9",
)  # fmt: skip


def test_every_chip_compiles_within_the_gates(table: Path) -> None:
    found = {(kernel.variant, kernel.sm) for kernel in load_table(table).kernels.values()}
    assert found == {(variant, sm) for names, chips in TEST_TABLE.items() for variant in names for sm in chips}
    assert {sm for _, sm in found} == set(ALL_IMAGES)


def test_images_are_cubins_and_the_fallback_is_ptx_for_old_drivers(table: Path) -> None:
    loaded = load_table(table)
    for kernel in loaded.kernels.values():
        image = loaded.image(kernel)
        assert len(image) == kernel.size
        if kernel.sm == FALLBACK:
            assert b".version 8.0" in image
            assert b".target sm_80" in image
            assert image.endswith(b"\0")
        else:
            assert image.startswith(b"\x7fELF")


def test_the_ptx_of_every_image_is_kept_beside_the_table(table: Path) -> None:
    loaded, images = load_table(table), load_images(table)
    assert set(images.by_name) == set(loaded.kernels)
    for key, kernel in loaded.kernels.items():
        image = images.by_name[key]
        assert image.image_sha256 == hashlib.sha256(loaded.image(kernel)).hexdigest()
        assert (image.symbol, image.shared, image.warps, image.layout) == (
            kernel.symbol, kernel.shared, kernel.warps, kernel.layout,
        )  # fmt: skip
        written_for = FALLBACK_TARGET if compiled_as(kernel.sm) == FALLBACK_TARGET else kernel.sm
        assert f".target sm_{written_for}" in image.text()
        assert f".entry {kernel.symbol}(" in image.text()
        assert images.of_image(image.image_sha256).path == image.path


def test_a_second_build_takes_everything_from_the_cache(table: Path, tmp_path: Path, monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in KERNEL_CACHE.glob("*.cubin")}
    build_table(tmp_path, chips=(80, 87), variants=variants_named(TEST_VARIANTS), jobs=1, cache=KERNEL_CACHE)
    assert before
    assert {path: path.stat().st_mtime_ns for path in KERNEL_CACHE.glob("*.cubin")} == before


def test_a_kernel_that_spills_fails_the_build_by_name() -> None:
    check_kernel(FINE)
    with pytest.raises(CheckFailedError, match=r"output-fp16-s64-d64 on sm_86 spills 65 bytes"):
        check_kernel(replace(FINE, stack=MAX_SPILL_BYTES + 1))


def test_a_kernel_with_too_much_shared_memory_fails_the_build_by_name() -> None:
    check_kernel(replace(FINE, sm=90, shared=227 * 1024))
    with pytest.raises(CheckFailedError, match=r"output-fp16-s64-d64 on sm_86 needs 101377 bytes of shared memory"):
        check_kernel(replace(FINE, static_shared=1))
    with pytest.raises(CheckFailedError, match="on sm_80 PTX needs"):
        check_kernel(replace(FINE, sm=FALLBACK, shared=163 * 1024))


def test_images_are_by_the_oldest_assembler_that_knows_their_chip(table: Path) -> None:
    """Drivers before CUDA 13 refuse its images, and only Thor needs it."""
    loaded = load_table(table)
    releases = {
        kernel.sm: toolkit_of(loaded.image(kernel)).split(".")[0]
        for kernel in loaded.kernels.values()
        if kernel.sm != FALLBACK
    }
    assert releases == {sm: "13" if sm == 110 else "12" for sm in chips.CHIPS}


def test_an_image_that_older_drivers_refuse_fails_the_build_by_name() -> None:
    check_kernel(replace(FINE, sm=110, toolkit="13.4"))
    with pytest.raises(CheckFailedError, match=r"output-fp16-s64-d64 on sm_86 was assembled by CUDA 13\.4"):
        check_kernel(replace(FINE, toolkit="13.4"))


def test_the_gate_is_wired_into_the_build(table: Path, tmp_path: Path, monkeypatch) -> None:
    """A limit below what the kernels use stops a real build, before any table is written."""
    monkeypatch.setitem(chips.SHARED_KIB, 87, 1)
    chosen = variants_named(["output-fp16-s64-d64"])
    with pytest.raises(CheckFailedError, match="output-fp16-s64-d64 on sm_87"):
        build_table(tmp_path, chips=(87,), variants=chosen, jobs=1, cache=KERNEL_CACHE)
    assert not (tmp_path / "kernels.bin").exists()


def test_an_unknown_chip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="sm_75 is not a target"):
        build_table(tmp_path, chips=(75,))


def test_pytorch_finds_the_table_that_the_environment_names(table: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FNA_KERNEL_TABLE", str(table))
    found = find_table()
    assert found is not None
    assert [kernel.sm for kernel in found.find("output-fp16-s64-d64", 87)] == [87, 0]
    assert [kernel.sm for kernel in found.find("output-fp16-s64-d64", 88)] == [0]
    monkeypatch.setenv("FNA_KERNEL_TABLE", str(tmp_path))
    with pytest.raises(InputFileError, match="FNA_KERNEL_TABLE"):
        find_table()


def test_a_damaged_table_is_named(table: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.bin").write_bytes((table / "kernels.bin").read_bytes()[:-1])
    with pytest.raises(InputFileError, match=r"kernels\.bin cannot be read .*build it anew: fna plugin"):
        load_table(tmp_path)
    with pytest.raises(InputFileError, match=r"nowhere/kernels\.bin cannot be read"):
        load_table(tmp_path / "nowhere")


PLANS = [
    attention_plan(
        AttentionShape(dtype, 1, 6, 1370, 64, count), scale=0.125, iterations=6, exact_rows=True, multiprocessors=16
    )
    for dtype in DTYPES
    for count in (64, 128, 256)
]
PLANS += [
    attention_plan(
        AttentionShape("fp16", 2, 6, 1370, 64, 64, masked=True), scale=1.0, iterations=6, exact_rows=True,
        multiprocessors=16, sink=True,
    )
]  # fmt: skip
PLANS += [sampling_plan("fp16", 1, tokens, 64, 33) for tokens in (200, 1370)]
PLANS += [norm_grid_plan("fp16", 1, 1370, 384, 64, prefix=1, by_norm=5)]


def test_layouts_are_the_arguments_of_the_plans() -> None:
    """One letter an argument: addresses, int32 and float32 in the plan's order."""
    needs_triton()
    from fna.plugins.kernels.registry import parameter_layout

    letters = {str: "p", int: "i", float: "f"}
    for launch in (launch for plan in PLANS for launch in plan.launches):
        assert parameter_layout(launch.variant) == "".join(letters[type(a)] for a in launch.arguments), launch.variant


def test_layouts_are_the_parameters_of_the_compiled_kernels(table: Path) -> None:
    """As the PTX declares them; after a kernel's own come Triton's two addresses of scratch."""
    loaded = load_table(table)
    kinds = {"p": "u64", "i": "u32", "f": "f32"}
    for kernel in loaded.kernels.values():
        if kernel.sm == FALLBACK:
            text = loaded.image(kernel).decode()
            declared = text[text.index(f".entry {kernel.symbol}(") : text.index(".reqntid")]
            assert re.findall(r"\.param \.(\w+)", declared) == [kinds[letter] for letter in kernel.layout + "pp"]
            assert f".reqntid {32 * kernel.warps}" in text


@pytest.mark.parametrize("sm", [sm for sm, source in chips.COMPILED_AS.items() if source != FALLBACK_TARGET])
def test_a_chip_that_takes_the_ptx_of_another_would_get_the_same(table: Path, sm: int, monkeypatch, tmp_path) -> None:
    """PTX from sm_90 on is for exactly one chip; that of sm_80 is for all after it."""
    (variant,) = variants_named(["finish-fp16-s64"])
    shared = load_images(table).image(variant.name, sm).text()
    monkeypatch.delitem(chips.COMPILED_AS, sm)
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    own = compile_variant(variant, (sm,), tmp_path)[sm]
    assert body_digest(Path(own.ptx).read_text().rstrip("\0")) == body_digest(shared)


def test_a_triton_without_all_of_gluon_has_the_plain_kernel_and_makes_no_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needs_triton()
    import triton

    from fna.plugins.kernels import attention, focal, focal_tiles, landmark_tiles, registry

    variant = KernelVariant("focal", "fp16", 0, 64)
    landmark = KernelVariant("landmark", "fp16", 64, 64)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert registry.kernel_of(variant) is focal_tiles.focal_kernel
    assert registry.kernel_of(landmark) is landmark_tiles.landmark_kernel
    monkeypatch.setattr(triton, "__version__", "3.6.0+git")
    assert registry.kernel_of(variant) is focal.focal_kernel
    assert registry.kernel_of(landmark) is attention.landmark_kernel
    with pytest.raises(
        MissingCapabilityError, match=r"compiled with Triton 3\.9 or later, and 3\.6\.0\+git is installed"
    ):
        compile_variant(variant, [0], tmp_path)


def test_the_landmark_launch_is_in_gluon_where_two_warps_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_triton()
    import triton

    from fna.plugins.kernels import attention, landmark_tiles, registry

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    small = KernelVariant("landmark", "bf16", 64, 64)
    assert registry.kernel_of(small, 87) is landmark_tiles.landmark_kernel
    elsewhere = [
        (small, 90),
        (KernelVariant("landmark", "fp32", 64, 64), 87),
        (KernelVariant("landmark", "bf16", 128, 64), 87),
        (KernelVariant("landmark", "bf16", 64, 128), 87),
        (KernelVariant("landmark_chebyshev", "bf16", 64, 64), 87),
    ]
    for variant, sm in elsewhere:
        assert registry.kernel_of(variant, sm) is attention.landmark_kernel
