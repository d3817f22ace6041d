"""Tiny models with the same weights each time; `tiny_vit:make` is also a factory that commands are given."""

from __future__ import annotations

import torch
from torch import nn


def make() -> nn.Module:
    """Return a DINOv2 of two blocks, 16 patches of 56-pixel images."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    return Dinov2Model(config)


def make_vit() -> nn.Module:
    """Return a ViT of four blocks, 64 patches of 32-pixel images and a class token."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=4,
        )
    ).eval()


def make_for_planning() -> nn.Module:
    """Return a DINOv2 of two blocks, 64 patches of 112-pixel images, whose attention is far from even."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14,
        initializer_range=0.2, layerscale_value=0.5,
    )  # fmt: skip
    return Dinov2Model(config).eval()
