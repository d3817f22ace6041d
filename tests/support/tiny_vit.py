"""A model factory that tests name as `tiny_vit:make`: two blocks, 16 patches of 56-pixel images, the same weights each time."""

from __future__ import annotations

import torch
from torch import nn


def make() -> nn.Module:
    """Return the model."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    return Dinov2Model(config)
