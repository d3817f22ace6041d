"""The GPU benchmark where there is no GPU: what it refuses, what it compares, and the parts that are plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from fna.attention import nystrom_attention_reference
from fna.validate.bench.kernels import AttentionRow, main, plain_fna

ROW = AttentionRow(
    batch=1, heads=12, tokens=16384, landmarks=64, plugin=10.0, exact=150.0, exact_backend="flash", plain=50.0, floor=5.0
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("arguments", [[], ["--model"]])
def test_without_a_gpu_it_says_so_and_ends_with_3(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 3
    assert capsys.readouterr().err == "error: timing needs a CUDA device, and this machine has none\n"


def test_the_plain_pytorch_it_compares_with_is_fna() -> None:
    query, key, value = (torch.randn(1, 2, 60, 16) for _ in range(3))
    landmarks = torch.arange(0, 60, 6)[None]
    wanted = nystrom_attention_reference(query, key, value, landmarks, None, 0.25, 6, False)
    assert torch.allclose(plain_fna(query, key, value, landmarks, 0.25), wanted, atol=1e-5)


def test_a_row_on_target_misses_nothing() -> None:
    assert ROW.missed() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exact": 149.0}, "14.90 times as fast as exact attention (target 15.0)"),
        ({"plain": 49.0}, "4.90 times as fast as plain FNA (target 5.0)"),
        ({"floor": 4.9}, "2.04 times the floor (target 2.0)"),
    ],
)
def test_a_missed_target_is_named_with_its_number(change: dict, message: str) -> None:
    from dataclasses import replace

    assert replace(ROW, **change).missed() == [f"B=1 H=12 N=16384 S=64: {message}"]
