"""One observer for all that looks into a running model: blocks in order, what enters and leaves them, and nothing left behind."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from model_families import FAMILIES, build_tiny, sample_pixels
from torch import Tensor, nn

from fna.errors import InvalidPlanError
from fna.observing import AttentionCall, NystromCall, observed
from fna.patching import patch, unpatch
from fna.plan import BlockPlan, uniform_plan


@pytest.fixture
def model() -> nn.Module:
    return build_tiny(next(family for family in FAMILIES if family.name == "DINOv2"))


def test_attention_is_seen_in_order_as_it_is(model: nn.Module) -> None:
    pixels = sample_pixels()
    calls: list[AttentionCall] = []
    before = model(pixels).last_hidden_state
    with torch.inference_mode(), observed(model, calls.append) as blocks:
        assert torch.equal(model(pixels).last_hidden_state, before)
    assert [call.block for call in calls] == [block.number for block in blocks]
    for call in calls:
        weights = torch.softmax(call.scale * call.query @ call.key.mT, dim=-1)
        torch.testing.assert_close(call.out, weights @ call.value, rtol=1e-4, atol=1e-5)
        assert call.is_plain


def test_what_an_observer_returns_takes_the_outputs_place(model: nn.Module) -> None:
    pixels = sample_pixels()
    before = model(pixels).last_hidden_state
    with torch.inference_mode(), observed(model, lambda call: call.out + 1 if call.block == 1 else None):
        assert not torch.allclose(model(pixels).last_hidden_state, before, atol=1e-3)
    assert torch.equal(model(pixels).last_hidden_state, before)


def test_what_leaves_a_block_enters_the_next(model: nn.Module) -> None:
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}
    with torch.inference_mode(), observed(model, entering=entered.__setitem__, leaving=left.__setitem__) as blocks:
        model(sample_pixels())
    assert sorted(entered) == sorted(left) == [block.number for block in blocks]
    assert all(torch.equal(left[first], entered[second]) for first, second in pairwise(sorted(left)))


def test_fna_operators_are_seen_with_their_blocks_and_arguments(model: nn.Module) -> None:
    calls: list[NystromCall] = []
    plan = uniform_plan(3, layers="0,2", landmarks=7, iterations=4)
    plan = plan.model_copy(update={"blocks": (plan.blocks[0], BlockPlan(block=2, landmarks=9, heads=(1,)))})
    patch(model, plan)
    try:
        with torch.inference_mode(), observed(model, replaced=calls.append):
            model(sample_pixels())
            model(sample_pixels())
        with pytest.raises(InvalidPlanError, match=r"call fna.unpatch\(model\) to look into"), observed(model, print):
            pass
    finally:
        unpatch(model)
    assert [(call.block, call.landmarks.shape[-1], call.out.shape[1]) for call in calls] == 2 * [(0, 7, 4), (2, 9, 1)]
    assert {(call.iterations, call.exact_rows, call.key_mask) for call in calls} == {(4, True, None)}


def test_an_error_leaves_nothing_behind(model: nn.Module) -> None:
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), observed(model, lambda call: 1 / 0, leaving=print, entering=lambda *_: None):
        model(sample_pixels())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert not any(hasattr(module, "_fna_observer") for module in model.modules())
    assert model.config._attn_implementation != "fna-observed"
