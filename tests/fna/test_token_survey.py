"""Finding massive and artifact tokens: planted ones exactly, none where there are none, and nothing left behind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, Family, build_tiny, sample_pixels
from torch import Tensor, nn

from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidPlanError, InvalidShapeError
from fna.patching import find_attention_blocks, patch, unpatch
from fna.plan import uniform_plan
from fna.special_tokens import (
    LARGEST_SHARE,
    MINIMAL_GAP,
    class_attention,
    find_artifact_tokens,
    find_massive_tokens,
    massive_tokens_mask,
)
from fna.token_survey import survey_tokens


def hidden_with(factor: float, *tokens: int, batch: int = 1, count: int = 80) -> Tensor:
    """Tokens of norm 1, and `tokens` of norm `factor`."""
    hidden = nn.functional.normalize(torch.randn(batch, count, 8), dim=-1)
    hidden[:, list(tokens)] *= factor
    return hidden


@given(
    st.sets(st.integers(0, 79), min_size=1, max_size=80 // LARGEST_SHARE),
    st.floats(3.1, 1e4),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
@settings(max_examples=30, deadline=None)
def test_planted_tokens_are_found_exactly(tokens: set[int], factor: float, dtype: torch.dtype) -> None:
    hidden = hidden_with(min(factor, 1e3) if dtype == torch.float16 else factor, *tokens).to(dtype)
    massive, gap = find_massive_tokens(hidden)
    assert set(massive[0].nonzero().flatten().tolist()) == tokens
    assert gap.item() > MINIMAL_GAP


def test_each_item_of_a_batch_has_its_own() -> None:
    hidden = hidden_with(1.0, batch=3)
    hidden[0, 5] *= 10
    hidden[2, [7, 70]] *= torch.tensor([9.0, 30.0])[:, None]
    massive, _ = find_massive_tokens(hidden)
    assert [row.nonzero().flatten().tolist() for row in massive] == [[5], [], [7, 70]]


@pytest.mark.parametrize(("factor", "found"), [(2.9, 0), (3.1, 1)])
def test_a_gap_below_a_factor_of_three_separates_nothing(factor: float, found: int) -> None:
    assert find_massive_tokens(hidden_with(factor, 30))[0].sum() == found
    assert find_massive_tokens(hidden_with(factor, 30), minimal_gap=math.log(1.5))[0].sum() == 1


def test_small_norms_make_no_token_massive() -> None:
    """Half of the tokens at a thousandth of the norm leave a large gap, but the others are no exception."""
    assert not find_massive_tokens(hidden_with(1e-3, *range(40)))[0].any()
    assert not find_massive_tokens(torch.zeros(1, 80, 8))[0].any()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_few_tokens_are_no_problem(count: int) -> None:
    massive, gap = find_massive_tokens(torch.ones(2, count, 4))
    assert massive.shape == (2, count)
    assert not massive.any()
    assert gap.tolist() == [0.0, 0.0]


def test_masks_of_massive_tokens_leave_prefix_tokens_out() -> None:
    hidden = hidden_with(50.0, 0, 3, 9)
    assert find_massive_tokens(hidden)[0][0].nonzero().flatten().tolist() == [0, 3, 9]
    assert massive_tokens_mask(hidden, 4)[0].nonzero().flatten().tolist() == [9]


def test_artifacts_draw_more_attention_from_the_class_token_than_itself() -> None:
    query, key = torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
    attention = torch.softmax(0.25 * query @ key.mT, dim=-1).mean(1)[:, 0]
    torch.testing.assert_close(class_attention(query, key, 0.25), attention)
    expected = attention > attention[:, :1]
    expected[:, :5] = False
    found = find_artifact_tokens(query, key, scale=0.25, prefix_tokens=5)
    assert torch.equal(found, expected)
    assert found.any()


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(InvalidShapeError, match=r"hidden states have shape \[3, 4\]"):
        find_massive_tokens(torch.zeros(3, 4))
    with pytest.raises(InvalidDtypeError, match=r"hidden states are torch.int64"):
        find_massive_tokens(torch.zeros(1, 3, 4, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match="this model has none"):
        find_artifact_tokens(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), scale=1.0, prefix_tokens=0)


def plant(layer: nn.Module, tokens: list[int], constant: float) -> None:
    """Add a large constant to the residual of some tokens after a layer."""

    def add(module: nn.Module, args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, tokens] += constant
        return output

    layer.register_forward_hook(add)


@pytest.mark.parametrize("name", ["ViT", "DINOv2 with registers", "CLIP vision", "SigLIP vision"])
def test_a_vit_with_planted_massive_tokens_shows_exactly_those(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model = build_tiny(family)
    blocks = find_attention_blocks(model)
    pixels = sample_pixels()
    assert not any(entry.massive.any() for entry in survey_tokens(model, lambda: model(pixels)))
    planted = [17, 30, 31]
    plant(blocks[1].layer, planted, 1000.0)
    found = survey_tokens(model, lambda: model(pixels))
    assert [entry.block for entry in found] == [block.number for block in blocks]
    assert not found[0].massive.any()
    for entry in found[1:]:  # the residual stream carries them on
        assert {tuple(row.nonzero().flatten().tolist()) for row in entry.massive} == {tuple(planted)}
        assert (entry.norms[:, planted] > 1000).all()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("ViT", "SigLIP vision")], ids=lambda f: f.name)
def test_a_survey_leaves_the_model_as_it_was(family: Family) -> None:
    model = build_tiny(family)
    pixels = sample_pixels()
    with torch.inference_mode():
        before = model(pixels).last_hidden_state
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    seen: list[Tensor] = []
    found = survey_tokens(model, lambda: seen.append(model(pixels).last_hidden_state))
    with torch.inference_mode():
        after = model(pixels).last_hidden_state
    assert torch.equal(before, after)
    assert torch.equal(before, seen[0])
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert all(entry.norms.shape == before.shape[:2] for entry in found)
    if family.prefix_tokens:
        assert all(torch.allclose(entry.class_attention.sum(1), torch.ones(len(before))) for entry in found)
    else:
        assert all(entry.class_attention is None and entry.artifacts is None for entry in found)


def test_a_survey_that_fails_leaves_the_model_as_it_was() -> None:
    model = build_tiny(next(family for family in FAMILIES if family.name == "ViT"))
    with pytest.raises(ZeroDivisionError):
        survey_tokens(model, lambda: 1 / 0)
    assert model.config._attn_implementation != "fna_survey"


def test_patched_models_are_refused() -> None:
    model = build_tiny(next(family for family in FAMILIES if family.name == "ViT"))
    patch(model, uniform_plan(len(find_attention_blocks(model)), layers="none"))
    with pytest.raises(InvalidPlanError, match=r"unpatch"):
        survey_tokens(model, lambda: None)
    unpatch(model)
