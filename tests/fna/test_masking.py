"""Masked keys: what each softmax does with them, in FNA and in exact attention, and by a plan in a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vit import make_vit
from torch import Tensor, nn

from fna.attention import fast_nystrom_attention
from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidPlanError, InvalidShapeError
from fna.patching import find_attention_blocks, patch, unpatch
from fna.plan import MaskPlan, Plan, parse_plan, uniform_plan
from fna.special_tokens import listed_tokens_mask, masked_attention

SCALE = 0.25
MASKED = (4, 5, 7)
"""Of these, token 4 is a landmark of `make_inputs`."""


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(2, 3, 40, 16, dtype=dtype) for _ in range(3))
    return query, key, value, torch.arange(0, 40, 4).int()[None]


def mask_of(*tokens: int) -> Tensor:
    return torch.zeros(1, 40, dtype=torch.bool).index_fill(1, torch.tensor(tokens, dtype=torch.int64), True)


def softmax_without(scores: Tensor, hidden: Tensor) -> Tensor:
    """Softmax over the columns that are not hidden, written with infinities."""
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)


@pytest.mark.parametrize("sink", [False, True])
def test_masked_keys_have_no_weight_in_any_softmax_of_fna(sink: bool) -> None:
    query, key, value, landmarks = make_inputs()
    mask = mask_of(*MASKED)[0]
    rows = landmarks[0].long()
    sees_masked = mask if sink else torch.zeros_like(mask)
    hidden = mask[None, :] & ~sees_masked[:, None]  # [queries, keys]
    core = softmax_without(SCALE * query[:, :, rows] @ key[:, :, rows].mT, hidden[rows][:, rows])
    exact = softmax_without(SCALE * query[:, :, rows] @ key.mT, hidden[rows]) @ value
    inverse = core.mT / core.sum(-2).amax(-1)[..., None, None]
    eye = torch.eye(len(rows), dtype=torch.float64)
    for _ in range(6):
        product = core @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    expected = softmax_without(SCALE * query @ key[:, :, rows].mT, hidden[:, rows]) @ inverse @ exact
    out = fast_nystrom_attention(query, key, value, landmarks, scale=SCALE, key_mask=mask[None], sink=sink)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sink", [False, True])
def test_masked_keys_have_no_weight_in_exact_attention(sink: bool) -> None:
    query, key, value, _ = make_inputs()
    mask = mask_of(*MASKED)[0]
    hidden = mask[None, :] & ~(mask if sink else torch.zeros_like(mask))[:, None]
    expected = softmax_without(SCALE * query @ key.mT, hidden) @ value
    out = masked_attention(query, key, value, mask[None].int(), SCALE, sink)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mask_of_zeros_changes_no_bit(dtype: torch.dtype, sink: bool) -> None:
    query, key, value, landmarks = make_inputs(dtype)
    none = torch.zeros(2, 40, dtype=torch.int32)
    plain = fast_nystrom_attention(query, key, value, landmarks, exact_rows=True)
    assert torch.equal(
        fast_nystrom_attention(query, key, value, landmarks, exact_rows=True, key_mask=none, sink=sink), plain
    )
    exact = nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    assert torch.equal(masked_attention(query, key, value, none, SCALE, sink), exact)


def test_what_masked_values_are_does_not_matter_without_sinks() -> None:
    query, key, value, landmarks = make_inputs()
    changed = value.clone()
    changed[:, :, list(MASKED)] = 1e6
    results = [fast_nystrom_attention(query, key, v, landmarks, key_mask=mask_of(*MASKED)) for v in (value, changed)]
    assert torch.equal(*results)


def test_with_sinks_the_masked_rows_of_exact_attention_stay_as_they_were() -> None:
    query, key, value, _ = make_inputs()
    mask = mask_of(*MASKED)
    exact = nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    out = masked_attention(query, key, value, mask.int(), SCALE, True)
    torch.testing.assert_close(out[:, :, mask[0]], exact[:, :, mask[0]])
    assert (out[:, :, ~mask[0]] - exact[:, :, ~mask[0]]).abs().amin(dim=(0, 1, 3)).gt(0).all()


def test_where_every_key_is_masked_nothing_is() -> None:
    """No row is empty, so nothing is NaN; scores keep three decimals beside what masking takes off them."""
    query, key, value, landmarks = make_inputs(torch.float32)
    everything = torch.ones(1, 40, dtype=torch.int32)
    plain = fast_nystrom_attention(query, key, value, landmarks)
    torch.testing.assert_close(
        fast_nystrom_attention(query, key, value, landmarks, key_mask=everything), plain, rtol=0, atol=0.05
    )
    exact = nn.functional.scaled_dot_product_attention(query, key, value, scale=SCALE)
    torch.testing.assert_close(masked_attention(query, key, value, everything, SCALE, False), exact, rtol=0, atol=0.05)


def test_masked_fna_is_differentiable_as_far_as_finite_differences_tell() -> None:
    query, key, value, landmarks = (t[:1, :1, :12, :4] if t.dim() == 4 else t[:, :3] for t in make_inputs())
    mask = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.tensor([4, 5]), True)
    inputs = tuple(t.clone().requires_grad_(True) for t in (query, key, value))
    for sink in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v, sink=sink: fast_nystrom_attention(q, k, v, landmarks, key_mask=mask, sink=sink), inputs
        )


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (torch.zeros(1, 40), InvalidDtypeError, "key_mask is torch.float32"),
        (
            torch.zeros(40, dtype=torch.bool),
            InvalidShapeError,
            r"key_mask has shape \[40\], but \[1, 40\] or \[2, 40\]",
        ),
        (torch.zeros(1, 39, dtype=torch.bool), InvalidShapeError, r"key_mask has shape \[1, 39\]"),
        (torch.zeros(3, 40, dtype=torch.bool), InvalidShapeError, r"key_mask has shape \[3, 40\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, error: type[Exception], said: str) -> None:
    query, key, value, landmarks = make_inputs()
    with pytest.raises(error, match=said):
        fast_nystrom_attention(query, key, value, landmarks, key_mask=mask)


# ---------------------------------------------------------------- plans


def test_plans_with_masks_survive_being_written_and_read() -> None:
    plan = Plan(
        num_blocks=12,
        masks=(MaskPlan(blocks="0-2", tokens="artifact"), MaskPlan(blocks="5,7-8", tokens=(3, 9), sink=True)),
    )
    assert parse_plan(plan.dump_json()) == plan
    assert plan.masked_blocks == {0, 1, 2, 5, 7, 8}
    assert plan.find_mask(8) == (5, plan.masks[1])
    assert plan.find_mask(6) is None


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ('{"blocks": "6-12", "tokens": "massive"}', "block 12"),
        ('{"blocks": "6-8", "tokens": "large"}', "masks.0.tokens"),
        ('{"blocks": "6-8", "tokens": [-1]}', "masks.0.tokens"),
        ('{"blocks": "6-8", "tokens": "massive", "colour": 1}', "masks.0.colour"),
        (
            '{"blocks": "6-8", "tokens": "massive"}, {"blocks": "8", "tokens": "artifact"}',
            "block 8 is in more than one",
        ),
    ],
)
def test_malformed_masks_name_what_is_wrong(mask: str, said: str) -> None:
    with pytest.raises(InvalidPlanError, match=said) as caught:
        parse_plan(f'{{"num_blocks": 12, "masks": [{mask}]}}')
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- whole models


class Planted(nn.Module):
    """A layer after which some tokens have a large constant added to one channel: massive tokens, as they are in the wild."""

    def __init__(self, layer: nn.Module, tokens: list[int], constant: float) -> None:
        super().__init__()
        self.layer, self.tokens, self.constant = layer, tokens, constant

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        added = torch.zeros(hidden.shape[1], hidden.shape[2])
        added[self.tokens, 0] = self.constant
        hidden = hidden + added
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def tiny_vit(*planted: int) -> nn.Module:
    model = make_vit()
    layers = find_attention_blocks(model)
    if planted:
        parent = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and layers[1].layer in list(m))
        parent[1] = Planted(parent[1], list(planted), 30.0)
    return model


def run(model: nn.Module, plan: Plan | None = None) -> Tensor:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if plan is not None:
        patch(model, plan)
    try:
        with torch.inference_mode():
            return model(pixels).last_hidden_state
    finally:
        unpatch(model)


LAYERS = ["none", "1-3"]


def plan_with(layers: str, *masks: MaskPlan) -> Plan:
    return uniform_plan(4, layers=layers, landmarks=8, masks=masks)


@pytest.mark.parametrize("layers", LAYERS, ids=["exact", "FNA"])
@pytest.mark.parametrize("sink", [False, True])
def test_a_model_without_massive_tokens_comes_through_bit_by_bit(layers: str, sink: bool) -> None:
    model = tiny_vit()
    masked = run(model, plan_with(layers, MaskPlan(blocks="1-3", tokens="massive", sink=sink)))
    assert torch.equal(masked, run(model, plan_with(layers)))


@pytest.mark.parametrize("layers", LAYERS, ids=["exact", "FNA"])
@pytest.mark.parametrize("sink", [False, True])
def test_massive_tokens_are_masked_from_the_block_after_the_one_that_made_them(layers: str, sink: bool) -> None:
    """Found at run time, they are masked as the same tokens by index are; without them the output is another."""
    model = tiny_vit(20, 41)
    found = run(model, plan_with(layers, MaskPlan(blocks="2-3", tokens="massive", sink=sink)))
    listed = run(model, plan_with(layers, MaskPlan(blocks="2-3", tokens=(20, 41), sink=sink)))
    assert torch.equal(found, listed)
    assert not torch.equal(found, run(model, plan_with(layers)))
    early = run(model, plan_with(layers, MaskPlan(blocks="0-1", tokens="massive", sink=sink)))
    assert torch.equal(early, run(model, plan_with(layers)))  # nothing is massive yet where the range begins


def test_masking_keeps_planted_tokens_from_the_others() -> None:
    """What the massive tokens hold no longer reaches ordinary tokens: exactly the blocks that are masked hide it."""
    small, large = tiny_vit(20, 41), tiny_vit(20, 41)
    planted = next(module for module in large.modules() if isinstance(module, Planted))
    planted.constant = 300.0
    others = [token for token in range(65) if token not in (20, 41)]
    plan = plan_with("none", MaskPlan(blocks="2-3", tokens="massive"))
    assert torch.equal(run(small, plan)[:, others], run(large, plan)[:, others])
    assert not torch.equal(run(small)[:, others], run(large)[:, others])


def test_artifact_tokens_are_those_that_the_class_token_looks_at_more_than_at_itself() -> None:
    from fna.token_survey import survey_tokens

    model = tiny_vit()
    (first, *_) = survey_tokens(model, lambda: run(model))
    assert first.artifacts is not None
    assert first.artifacts.any(dim=1).all()  # random weights: the class token is nothing special
    masked = run(model, plan_with("none", MaskPlan(blocks="0", tokens="artifact")))
    one_item = tuple(first.artifacts[0].nonzero().flatten().tolist())
    by_index = run(model, plan_with("none", MaskPlan(blocks="0", tokens=one_item)))
    assert torch.equal(masked[0], by_index[0])
    assert not torch.equal(masked[1], by_index[1])


def test_artifact_masks_need_a_class_token() -> None:
    from model_families import FAMILIES, build_tiny

    family = next(family for family in FAMILIES if family.name == "SigLIP vision")
    model = build_tiny(family)
    count = len(find_attention_blocks(model))
    plan = Plan(num_blocks=count, masks=(MaskPlan(blocks="0", tokens="artifact"),))
    with pytest.raises(InvalidPlanError, match="no class token"):
        patch(model, plan)
    assert run_unpatched_is_possible(model)


def run_unpatched_is_possible(model: nn.Module) -> bool:
    return all(not name.startswith("_fna") for module in model.modules() for name in vars(module))


def test_token_indices_beyond_the_last_token_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="the plan lists token 65, but there are 65 tokens"):
        run(tiny_vit(), plan_with("none", MaskPlan(blocks="0", tokens=(65,))))
    assert listed_tokens_mask((2,), 4).tolist() == [[0, 0, 1, 0]]
    assert listed_tokens_mask((), 4).tolist() == [[0, 0, 0, 0]]
