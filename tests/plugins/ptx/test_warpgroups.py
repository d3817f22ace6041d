"""wgmma: descriptors against layouts written down element by element, and a kernel that Triton compiled for sm_90."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fna.plugins.ptx.calls import Chip
from fna.plugins.ptx.cases import AttentionCase, judge
from fna.plugins.ptx.images import load_images
from fna.plugins.ptx.mutations import synchronisations, without
from fna.plugins.ptx.warpgroups import Descriptors, factor_of_chunks, factor_of_registers, multiply

SWIZZLE_MODES = {16: 0, 128: 1, 64: 2, 32: 3}


def descriptor(start: int, leading: int, stride: int, width: int) -> np.ndarray:
    bits = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLE_MODES[width] << 62
    return np.full(128, bits, np.uint64)


def test_128_byte_rows_are_swizzled_by_their_number() -> None:
    """Rows of 64 halves, eight to a kilobyte, start aligned to it: row r's chunk c lies at r * 128 + (c ^ r % 8) * 16."""
    memory = np.zeros(16384, np.uint8)
    matrix = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float16)
    for row in range(64):
        for chunk in range(2):
            at = 1024 + row * 128 + (chunk ^ row % 8) * 16
            memory[at : at + 16] = matrix[row, 8 * chunk : 8 * chunk + 8].view(np.uint8)
    read = Descriptors.read(descriptor(1024, 0, 1024, 128)).chunks(64, transposed=False)
    found = factor_of_chunks(memory[read[..., None] + np.arange(16)], 64, "f16", transposed=False)
    assert np.array_equal(found[0], matrix)


def test_a_transposed_factor_lies_depth_by_depth() -> None:
    """64 halves of one depth in 128 bytes, eight depths to a kilobyte."""
    memory = np.zeros(16384, np.uint8)
    matrix = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float16)
    for depth in range(16):
        for chunk in range(8):
            at = depth * 128 + (chunk ^ depth % 8) * 16
            memory[at : at + 16] = matrix[8 * chunk : 8 * chunk + 8, depth].copy().view(np.uint8)
    read = Descriptors.read(descriptor(0, 8192, 1024, 128)).chunks(64, transposed=True)
    found = factor_of_chunks(memory[read[..., None] + np.arange(16)], 64, "f16", transposed=True)
    assert np.array_equal(found[0], matrix)


def test_registers_are_four_warps_of_sixteen_rows() -> None:
    left = np.arange(64 * 16, dtype=np.float16).reshape(64, 16) / 16
    registers = []
    for i in range(4):
        row = np.array([t // 32 * 16 + t % 32 // 4 + 8 * (i & 1) for t in range(128)])
        column = np.array([t % 4 * 2 + 8 * (i >> 1) for t in range(128)])
        registers.append(np.stack([left[row, column], left[row, column + 1]], 1).view(np.uint32).reshape(-1))
    assert np.array_equal(factor_of_registers(registers, "f16")[0], left)
    product = multiply(left[None].astype(float), np.eye(16)[None, :8], None, truncate=False)
    assert product[0].view(np.float32)[5] == left[1, 2]  # thread 5 holds row 1, column 2
    assert product[3].view(np.float32)[37] == left[16 + 1 + 8, 3]


@pytest.fixture(scope="module")
def hopper(table: Path) -> Chip:
    return Chip(load_images(table), 90)


def test_a_call_compiled_for_sm_90_is_right_and_without_a_fault(hopper: Chip) -> None:
    case = AttentionCase("fp16", 64, 64, 131)
    text = hopper.images.image(case.variants[0], 90).text()
    assert "wgmma.mma_async" in text
    outcome = judge(case, hopper)
    assert (outcome.faults, outcome.complete) == ([], True)
    assert outcome.error <= outcome.tolerance


def test_a_barrier_before_wgmma_is_missed(hopper: Chip) -> None:
    """The output kernel's second barrier orders the stores of keys and values before the products that read them."""
    image = hopper.images.image("output-fp16-s64-d64", 90)
    second = synchronisations(image)[1:2]
    call = AttentionCase("fp16", 64, 64, 131).run(Chip(hopper.images.with_kernel(image, without(image, second)), 90))
    assert any("wgmma" in report.instruction for report in call.memory.reports.faults)
