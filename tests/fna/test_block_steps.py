"""What a plan means for a block, and the order in which its steps are wired."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fna.block_steps import steps_of, wire_block
from fna.composition import TorchWiring
from fna.correction import Correction
from fna.errors import InvalidPlanError
from fna.plan import BlockPlan, MaskPlan, Plan, TokenRange


def wire(query: Tensor, heads: tuple[int, ...] | None, nystrom, exact, correction: Correction | None = None) -> Tensor:
    plan = Plan(num_blocks=1, blocks=(BlockPlan(block=0, landmarks=2, heads=heads, correction=correction),))
    wiring = TorchWiring(nystrom, exact, torch.tensor([[0, 1]]), 1, None, True)
    return wire_block(steps_of(plan, 0), query.shape[1], query, query, query, wiring)


@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 3), (0, 2, 3), (0, 1, 2, 3), None])
def test_each_head_goes_where_the_plan_sends_it(heads: tuple[int, ...] | None) -> None:
    out = wire(torch.randn(2, 4, 5, 3), heads, lambda q, k, v: q * 0 + 1, lambda q, k, v: q * 0 - 1)
    expected = [1.0 if heads is None or head in heads else -1.0 for head in range(4)]
    assert out[:, :, 0, 0].tolist() == [expected, expected]


def test_exact_heads_keep_their_own_operands() -> None:
    query = torch.randn(1, 4, 5, 3)
    assert torch.equal(wire(query, (1, 3), lambda q, k, v: q, lambda q, k, v: q), query)


def test_a_correction_changes_the_fna_heads_only() -> None:
    query = torch.randn(1, 3, 5, 2)
    doubled = Correction(size=1, kernels=((0.0,),), gains=(2.0,))
    out = wire(query, (1,), lambda q, k, v: q, lambda q, k, v: q, doubled)
    changed = (out / query).round()[0, :, :, 0].int().tolist()
    assert changed == [[1] * 5, [1, 1, 2, 2, 2], [1] * 5]


def test_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidPlanError, match="head 4 of block 0, but the block has heads 0 to 3"):
        wire(torch.randn(1, 4, 5, 3), (4,), lambda q, k, v: q, lambda q, k, v: q)


def test_a_correction_for_other_heads_is_refused() -> None:
    correction = Correction(size=1, kernels=((0.0,),), gains=(1.0,))
    with pytest.raises(InvalidPlanError, match="kernels for 1 heads, but 4 are FNA"):
        wire(torch.randn(1, 4, 5, 3), None, lambda q, k, v: q, lambda q, k, v: q, correction)


def test_blocks_that_choose_landmarks_together_have_one_group() -> None:
    blocks = tuple(BlockPlan(block=number, landmarks=8, sampler="fps", resample=number == 2) for number in range(4))
    groups = []
    for number in range(4):
        step = steps_of(Plan(num_blocks=4, blocks=blocks), number).nystrom
        assert step is not None
        groups.append(step.landmarks.group)
    assert groups[0] == groups[1] == groups[3] != groups[2]


def test_named_tokens_are_found_at_the_first_block_of_their_range() -> None:
    plan = Plan(
        num_blocks=4,
        blocks=(BlockPlan(block=2, landmarks=8), BlockPlan(block=3, landmarks=8)),
        masks=(MaskPlan(blocks="1-3", tokens="massive", sink=True),),
        landmarks_include=(TokenRange(blocks="2-3", tokens=(5,)),),
    )
    untouched, masked, whole = (steps_of(plan, number) for number in (0, 1, 3))
    assert untouched.is_untouched
    assert masked.nystrom is None
    assert masked.key_masking == whole.key_masking
    assert whole.key_masking is not None
    assert (whole.key_masking.tokens.found_at, whole.key_masking.sink) == (1, True)
    assert whole.nystrom is not None
    assert whole.nystrom.landmarks.include is not None
    assert (whole.nystrom.landmarks.include.tokens, whole.nystrom.landmarks.include.found_at) == ((5,), 2)
