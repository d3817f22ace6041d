"""Prefix tokens: class, distillation and register tokens are counted from the parameters that hold them."""

from __future__ import annotations

import pytest
import torch
from model_families import FAMILIES, Family, build_tiny, sample_pixels
from torch import nn

from fna.patching import find_attention_blocks
from fna.special_tokens import detect_prefix_tokens


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_prefix_tokens_of_each_family(family: Family) -> None:
    tower = find_attention_blocks(build_tiny(family))[0].tower
    assert detect_prefix_tokens(tower) == family.prefix_tokens


@pytest.mark.parametrize("name", ["ViT", "DeiT, distilled", "DINOv2 with registers", "DINOv3", "SigLIP vision"])
def test_prefix_tokens_are_what_the_model_puts_before_its_patches(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = build_tiny(family)
    with torch.inference_mode():
        tokens = model(sample_pixels()).last_hidden_state.shape[1]
    assert detect_prefix_tokens(model) == tokens - 64


@pytest.mark.parametrize(("rows", "expected"), [(0, 0), (1, 1), (4, 4), (7, 7)])
def test_every_register_row_counts(rows: int, expected: int) -> None:
    module = nn.Module()
    module.register_tokens = nn.Parameter(torch.zeros(1, rows, 8))
    assert detect_prefix_tokens(module) == expected


def test_mask_and_position_parameters_are_not_tokens() -> None:
    module = nn.Module()
    module.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
    module.position_embeddings = nn.Parameter(torch.zeros(1, 65, 8))
    assert detect_prefix_tokens(module) == 0
