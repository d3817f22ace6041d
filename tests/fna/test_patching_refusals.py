"""What patching refuses, by name: models, blocks, calls, plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from model_families import IMAGE, REFUSED, SIZES, Refused, build_tiny, sample_pixels, siglip2_inputs
from patch_plans import BY_NAME, make_plan, snapshot

import fna
import fna.patching.attention
from fna.errors import InvalidLandmarksError, InvalidPlanError, UnsupportedAttentionError
from fna.patching import find_attention_blocks
from fna.plan import uniform_plan


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_a_model_that_cannot_be_fna_is_refused_by_name(refused: Refused) -> None:
    model = refused.build()
    state = snapshot(model)
    with pytest.raises(UnsupportedAttentionError, match=refused.reason) as caught:
        fna.patch(model, uniform_plan(2, layers="all", landmarks=4))
    message = str(caught.value)
    assert "\n" not in message
    if refused.reason != "no attention modules":
        assert "block 0 (" in message
        named = message.split("block 0 (")[1].split(")")[0]
        assert model.get_submodule(named) is not None
    assert snapshot(model) == state


def test_a_refused_block_may_stay_exact() -> None:
    model = REFUSED[0].build().eval()
    with torch.no_grad():
        before = model(sample_pixels()).last_hidden_state
        fna.patch(model, uniform_plan(2, layers="none"))
        assert torch.equal(model(sample_pixels()).last_hidden_state, before)


def test_grouped_heads_are_refused() -> None:
    model = build_tiny(BY_NAME["ViT"])
    find_attention_blocks(model)[1].attention.num_key_value_groups = 2
    with pytest.raises(UnsupportedAttentionError, match=r"block 1 \(layers\.1\.attention\).*heads are grouped"):
        fna.patch(model, make_plan(model))


def test_causal_attention_in_a_vision_tower_is_refused() -> None:
    model = build_tiny(BY_NAME["ViT"])
    find_attention_blocks(model)[2].attention.is_causal = True
    with pytest.raises(UnsupportedAttentionError, match=r"block 2 \(layers\.2\.attention\).*causal.*plan's layers"):
        fna.patch(model, make_plan(model))
    fna.patch(model, make_plan(model, layers="0-1"))


def test_a_sliding_window_is_refused() -> None:
    model = build_tiny(BY_NAME["ViT"])
    find_attention_blocks(model)[0].attention.sliding_window = 16
    with pytest.raises(UnsupportedAttentionError, match="within windows"):
        fna.patch(model, make_plan(model))


def test_a_masked_call_is_refused_by_block() -> None:
    model = build_tiny(BY_NAME["ViT"])
    fna.patch(model, make_plan(model, layers="1-2"))
    mask = torch.ones(2, 65, dtype=torch.bool)
    mask[:, 40:] = False
    with torch.no_grad(), pytest.raises(UnsupportedAttentionError, match=r"block 1 \(layers\.1\.attention\).*mask"):
        model(sample_pixels(), attention_mask=mask)


def test_siglip2_with_padding_is_refused_and_without_is_not() -> None:
    model = build_tiny(BY_NAME["SigLIP 2 vision"])
    inputs = siglip2_inputs(sample_pixels())
    fna.patch(model, make_plan(model))
    mask = torch.ones(2, 64, dtype=torch.int32)
    mask[1, 48:] = 0
    with torch.no_grad():
        with pytest.raises(UnsupportedAttentionError, match=r"block 0 \(encoder\.layers\.0\.self_attn\).*mask"):
            model(**{**inputs, "pixel_attention_mask": mask})
        unmasked = model(**inputs).last_hidden_state
        mask[:] = 1
        torch.testing.assert_close(model(**{**inputs, "pixel_attention_mask": mask}).last_hidden_state, unmasked)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attention_mask": torch.zeros(1, 1, 9, 9)}, "attention mask of shape"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
        ({"is_causal": True}, "causal"),
        ({"key": torch.zeros(1, 2, 7, 4)}, "cross-attention"),
        ({"key": torch.zeros(1, 1, 9, 4)}, "grouped heads"),
        ({"softcap": 30.0}, "caps its scores"),
        ({"sliding_window": 3}, "within a window"),
        ({"dropout": 0.1}, "drops attention weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_call_that_is_not_plain_self_attention_is_refused(arguments: dict[str, Any], reason: str) -> None:
    model = build_tiny(BY_NAME["ViT"])
    attention = fna.patch(model, make_plan(model, landmarks=4, sampler="grid"))[1].attention
    tokens = torch.randn(1, 2, 9, 4)
    call = {"query": tokens, "key": tokens, "value": tokens, "attention_mask": None, "scaling": 0.5}
    fna.patching.attention.fna_attention_forward(attention, **call)
    with pytest.raises(UnsupportedAttentionError, match=rf"block 1 \(layers\.1\.attention\).*{reason}"):
        fna.patching.attention.fna_attention_forward(attention, **{**call, **arguments})


def test_attention_dropout_in_training_is_refused() -> None:
    config = transformers.ViTConfig(**SIZES, **IMAGE, attention_probs_dropout_prob=0.1)
    model = transformers.ViTModel(config).train()
    fna.patch(model, make_plan(model))
    with pytest.raises(UnsupportedAttentionError, match=r"call model\.eval\(\)"):
        model(sample_pixels())


def test_two_patches_need_an_unpatch_between_them() -> None:
    model = build_tiny(BY_NAME["ViT"])
    fna.patch(model, make_plan(model))
    with pytest.raises(InvalidPlanError, match=r"patched already.*unpatch"):
        fna.patch(model, make_plan(model))
    fna.unpatch(model)
    fna.unpatch(model)  # harmless
    fna.patch(model, make_plan(model))


def test_a_plan_for_another_model_is_refused() -> None:
    model = build_tiny(BY_NAME["ViT"])
    with pytest.raises(InvalidPlanError, match="plan is for a model of 12 attention blocks, but this one has 3"):
        fna.patch(model, uniform_plan(12))


def test_more_landmarks_than_tokens_are_refused() -> None:
    model = build_tiny(BY_NAME["ViT"])
    fna.patch(model, make_plan(model, landmarks=66))
    with pytest.raises(InvalidLandmarksError, match="66 landmarks"):
        model(sample_pixels())
