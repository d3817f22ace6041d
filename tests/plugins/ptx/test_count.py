"""Counts against what the algorithm says must be issued."""

from __future__ import annotations

import pytest
import torch

from fna.plugins.programs import LAUNCH_CYCLES, Multiprocessors, exact_blocks
from fna.plugins.ptx import GlobalMemory
from fna.plugins.ptx.calls import bytes_of
from fna.plugins.ptx.count import CallSize, compile_exact, count_attention, count_exact
from fna.plugins.ptx.images import PtxImages
from fna.plugins.ptx.kernel import Kernel

MULTIPLY_ADDS_A_CYCLE = 1024
BLOCK_QUERIES, BLOCK_KEYS = exact_blocks("fp16", 64).queries, exact_blocks("fp16", 64).keys


@pytest.fixture(scope="module")
def exact() -> Kernel:
    """The yardstick, compiled."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    return compile_exact(80)


@pytest.mark.parametrize("tokens", [128, 201])
def test_the_yardstick_is_exact_attention(exact: Kernel, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, tokens, 64, generator=generator).half() for _ in range(3))
    memory = GlobalMemory(1 << 20)
    addresses = [memory.allocate(n, bytes_of(t), writable=False) for n, t in (("q", query), ("k", key), ("v", value))]
    out = memory.allocate("out", query.numel() * 2)
    exact.launch(memory, (-(-tokens // BLOCK_QUERIES), 2, 1), [*addresses, out, tokens, 0.125 * 1.4426950408889634])
    found = (
        torch.from_numpy(memory.bytes_at(out, query.numel() * 2).copy()).view(torch.float16).view(query.shape).double()
    )
    wanted = torch.softmax(0.125 * query.double() @ key.double().mT, -1) @ value.double()
    assert not memory.reports.faults
    assert float((found - wanted).norm() / wanted.norm()) < 5e-4


def test_exact_attentions_tensor_cycles_are_its_multiply_adds(exact: Kernel) -> None:
    size = CallSize(tokens=300, heads=2, landmarks=64, on=Multiprocessors(16))
    counted = count_exact(exact, size)
    keys = -(-size.tokens // BLOCK_KEYS) * BLOCK_KEYS
    assert counted.costliest.tensor == 2 * BLOCK_QUERIES * keys * 64 / MULTIPLY_ADDS_A_CYCLE
    assert counted.ctas == 6
    assert counted.overlapped == counted.costliest.overlapped + LAUNCH_CYCLES


def test_a_call_of_fna_counts_every_launch(images: PtxImages) -> None:
    size = CallSize(tokens=300, heads=2, landmarks=64, on=Multiprocessors(16))
    launches = count_attention(images, 0, size)
    assert [launch.name.split("-")[0] for launch in launches] == ["landmark", "finish", "output"]
    output = launches[-1].costliest
    assert output.tensor == 2 * 64 * 64 * 64 / MULTIPLY_ADDS_A_CYCLE  # one tile of queries, both products
    assert output.wavefronts >= output.ideal_wavefronts > 0
    assert output.sectors > 64 * 64 * 2 / 32  # at least its queries
    assert launches[0].classes["bar"] > 0
