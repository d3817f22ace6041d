"""A tiny model with attention that matters, dense and as an ONNX file, and images of noise and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import Dinov2Config, Dinov2Model

from fna.export.sources.loading import LoadedModel, wrap_model
from fna.export.trace import TraceOptions, trace_model
from fna.files import save_model
from fna.plan import uniform_plan

SIDE = 112


@pytest.fixture(scope="session")
def planned_model() -> LoadedModel:
    """Three blocks of four heads, 64 patches at 112 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embeddings" not in name:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter[0].numel() ** 0.5)
    return wrap_model("tests:planned", model)


@pytest.fixture(scope="session")
def planned_file(planned_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, dense, as an ONNX file."""
    path = tmp_path_factory.mktemp("planning") / "dense.onnx"
    model, _ = trace_model(planned_model, uniform_plan(3, layers="none"), TraceOptions(SIDE, SIDE))
    save_model(model, path)
    return path


@pytest.fixture(scope="session")
def pictures() -> list[NDArray[np.float32]]:
    """Smooth images with a little noise, `[3, 112, 112]`."""
    random = np.random.default_rng(0)
    across = np.linspace(0, 1, SIDE, dtype=np.float32)
    found = []
    for _ in range(5):
        waves = [np.sin(across[:, None] * a + across[None] * b) for a, b in random.uniform(2, 20, (3, 2))]
        found.append((np.stack(waves) + 0.3 * random.standard_normal((3, SIDE, SIDE))).astype(np.float32))
    return found
