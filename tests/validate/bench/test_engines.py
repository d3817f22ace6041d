"""Timing engines where there is no GPU."""

from __future__ import annotations

import pytest

from fna.engines.device import find_gpu
from fna.validate.bench.engines import main


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resolution", "518"]) == 3
    assert "--backend tensorrt-rtx needs an NVIDIA GPU, but" in capsys.readouterr().err
