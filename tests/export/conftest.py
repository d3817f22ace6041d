"""Models that the export tests share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fna.export.sources import LoadedModel, load_model


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter, biases and norms included, a random value, so that a lost one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def make_tiny_dinov2() -> nn.Module:
    """A DINOv2 of four blocks with 4x4 patches at its own 56 pixels; a factory for `tests...:make_tiny_dinov2`."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    return randomise(Dinov2Model(config))


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """The tiny DINOv2 as a model source."""
    from fna.export.sources import wrap_model

    return wrap_model("tests:tiny_dinov2", make_tiny_dinov2())


@pytest.fixture(scope="session")
def saliency_model() -> LoadedModel:
    """The built-in model with its real weights."""
    return load_model("dinov2-small-saliency")
