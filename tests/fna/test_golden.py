"""The published code's landmarks and outputs, reproduced on inputs from real weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fna.attention import fast_nystrom_attention
from fna.samplers import select_landmarks

HERE = Path(__file__).parent.parent / "golden"
FOLDERS = [HERE, Path(os.environ.get("FNA_GOLDEN", HERE.parents[2] / "shared" / "golden"))]
FILES = [
    pytest.param(path, id=f"{path.parent.name}-{path.parents[1].name}-{path.stem}")
    for folder in FOLDERS
    for path in sorted(folder.glob("*.npz"))
]


def tensor(data: np.lib.npyio.NpzFile, key: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(data[key].astype(np.float32)).to(dtype)


def attend(data: np.lib.npyio.NpzFile, dtype: torch.dtype) -> torch.Tensor:
    heads = data["key"].shape[1]
    return fast_nystrom_attention(
        tensor(data, "query", dtype)[:, :heads],
        tensor(data, "key", dtype),
        tensor(data, "value", dtype),
        torch.from_numpy(data["landmarks"]),
        scale=float(data["scale"]),
    )


def test_golden_files_are_there() -> None:
    assert len(list(HERE.glob("*.npz"))) == 4


@pytest.mark.parametrize("path", FILES)
def test_landmarks_equal_the_published_codes(path: Path) -> None:
    data = np.load(path)
    features = (
        tensor(data, "hidden", torch.float32)
        if data["feature"] == "input"
        else tensor(data, "query", torch.float32).mean(1)
    )
    chosen = select_landmarks(
        features,
        data["landmarks"].shape[1],
        method="fps",
        guarantee=torch.from_numpy(data["guarantee"]),
        exclude=torch.from_numpy(data["exclude"]),
    )
    np.testing.assert_array_equal(chosen.numpy(), data["landmarks"])


@pytest.mark.parametrize("path", FILES)
def test_fp32_output_is_within_2e_5_of_the_published_codes(path: Path) -> None:
    data = np.load(path)
    heads = data["out_fp32"].shape[1]
    np.testing.assert_allclose(attend(data, torch.float32)[:, :heads].numpy(), data["out_fp32"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("path", FILES)
def test_fp64_output_is_within_1e_9_of_the_published_codes(path: Path) -> None:
    data = np.load(path)
    if "out_fp64" not in data:
        pytest.skip("the cut-down 1370-token file leaves out its fp64 output (it is the size of all the others)")
    expected = data["out_fp64"]
    tolerance = 1e-9 if expected.dtype == np.float64 else 1e-5
    out = attend(data, torch.float64)[:, : expected.shape[1]].numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)
