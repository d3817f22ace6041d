"""The table that predictions rest on, against the compiled kernels."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from fna.plugins.programs import (
    CtaCount,
    Multiprocessors,
    attention_programs,
    counted_programs,
    exact_programs,
    launch_cycles,
)
from fna.plugins.ptx.count import CallSize, compile_exact, count_attention, count_exact, place_attention
from fna.plugins.ptx.count_focal import FocalSize, count_focal, place_focal
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.programs import fit

ON = Multiprocessors(16)


def test_a_fit_gives_back_what_was_counted() -> None:
    def count(keys: int, core: int) -> CtaCount:
        return CtaCount(tensor=5 + 3 * keys, issue=7 + 2 * core, sectors=11)

    found = fit({"k": [({"keys": k, "core": c}, count(k, c)) for k, c in ((1, 6), (4, 6), (2, 3))]})["k"]
    assert set(found.per) == {"keys", "core"}
    assert asdict(found.of({"keys": 10, "core": 8})) == pytest.approx(asdict(count(10, 8)))


def test_the_table_says_what_is_counted_of_fna(images: PtxImages) -> None:
    size = CallSize(tokens=700, heads=3, landmarks=60, on=ON)
    call = place_attention(size)
    counted = [launch.overlapped for launch in count_attention(images, 0, size)]
    said = [launch_cycles(parts, counted_programs(), ON) for parts in attention_programs(call.plan, call.shape, 16, 6)]
    assert said == pytest.approx(counted, rel=0.03)


def test_the_table_says_what_is_counted_of_exact_attention() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    size = CallSize(tokens=700, heads=3, landmarks=1, on=ON)
    said = launch_cycles(exact_programs("fp16", 700, 3, 64), counted_programs(), ON)
    assert said == pytest.approx(count_exact(compile_exact(80), size).overlapped, rel=0.03)


@pytest.mark.parametrize("multiprocessors", [4, 40])
def test_the_table_says_what_is_counted_of_focal_attention(images: PtxImages, multiprocessors: int) -> None:
    on = Multiprocessors(multiprocessors)
    size = FocalSize((29, 28), 2, on, ((1, 0), (2, 2), (4, 6)))
    counted = [launch.overlapped for launch in count_focal(images, 0, size)]
    said = [launch_cycles(parts, counted_programs(), on) for parts in place_focal(size).programs]
    assert len(said) == (2 if multiprocessors == 4 else 4)
    # How many patches reach the threshold depends on the keys, so the selection of hot keys is met less closely.
    assert said == pytest.approx(counted, rel=0.1)
