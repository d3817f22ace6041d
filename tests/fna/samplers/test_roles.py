"""Landmarks that include and exclude tokens: as the samplers with masks, and by a plan in a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seen_landmarks import seen_landmarks
from tiny_vit import make_vit
from torch import Tensor, nn

from fna.errors import InvalidLandmarksError, InvalidPlanError
from fna.patching import find_attention_blocks, patch, unpatch
from fna.plan import BlockPlan, MaskPlan, Plan, TokenRange, uniform_plan
from fna.samplers import landmark_bias, select_landmarks
from fna.samplers.common.roles import exclude_room, guided_landmarks, include_room

SAMPLERS = ["fps", "grid", "norm-grid"]
TOKENS = 48


def mask_of(*rows: set[int]) -> Tensor:
    return torch.tensor([[index in chosen for index in range(TOKENS)] for chosen in rows]).int()


@pytest.mark.parametrize("method", SAMPLERS)
@given(data=st.data(), seed=st.integers(0, 1000), prefix=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_roles_choose_what_masks_of_the_samplers_choose(
    method: Any, data: st.DataObject, seed: int, prefix: int
) -> None:
    torch.manual_seed(seed)
    features = torch.randn(2, TOKENS, 4)
    include, exclude = (
        mask_of(*(data.draw(st.sets(st.integers(prefix, TOKENS - 1), max_size=4)) for _ in range(2))) for _ in range(2)
    )
    chosen, _ = guided_landmarks(features, 12, method=method, include=include, exclude=exclude, prefix_tokens=prefix)
    expected = select_landmarks(
        features, 12, method=method, guarantee=include > 0, exclude=exclude > 0, prefix_tokens=prefix
    )
    assert chosen.tolist() == expected.tolist()
    assert chosen.dtype == torch.int32


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_with_nothing_included_landmarks_and_weights_are_the_samplers_own(method: Any, prefix: int) -> None:
    features, nothing = torch.randn(2, TOKENS, 4), torch.zeros(2, TOKENS, dtype=torch.int32)
    for masks in ({"include": nothing}, {"exclude": nothing}, {"include": nothing, "exclude": nothing}):
        chosen, bias = guided_landmarks(features, 12, method=method, prefix_tokens=prefix, **masks)
        assert torch.equal(chosen, select_landmarks(features, 12, method=method, prefix_tokens=prefix))
        assert torch.equal(
            bias.expand(2, -1), landmark_bias(TOKENS, 12, method=method, prefix_tokens=prefix).expand(2, -1)
        )


@pytest.mark.parametrize("method", ["grid", "norm-grid"])
def test_included_tokens_stand_for_themselves_and_weights_count_every_token_once(method: Any) -> None:
    chosen, bias = guided_landmarks(
        torch.randn(2, TOKENS, 4), 12, method=method, include=mask_of({20, 31}, set()), exclude=mask_of({7}, {8})
    )
    torch.testing.assert_close(bias.exp().sum(1), torch.full((2,), float(TOKENS)))
    weights = dict(zip(chosen[0].tolist(), bias[0].exp().tolist(), strict=True))
    assert [weights[token] for token in (0, 20, 31)] == [1.0, 1.0, 1.0]
    assert bias[0].exp().max() > bias[1].exp().max() > 1


@pytest.mark.parametrize("method", SAMPLERS)
def test_of_too_many_tokens_the_first_are_included_and_excluded(method: Any) -> None:
    """Whatever the masks are, landmarks are distinct tokens."""
    features, everything = torch.randn(1, TOKENS, 4), torch.ones(1, TOKENS, dtype=torch.int32)
    prefix = 0 if method == "fps" else 1
    room = include_room(12, prefix)
    chosen, _ = guided_landmarks(features, 12, method=method, include=everything)
    assert set(range(room)) <= set(chosen[0].tolist())
    assert len(set(chosen[0].tolist())) == 12
    assert max(chosen[0].tolist()) > room
    most = TOKENS - exclude_room(TOKENS)
    chosen, _ = guided_landmarks(features, most, method=method, exclude=everything)
    assert sorted(chosen[0].tolist()) == list(range(exclude_room(TOKENS), TOKENS))


def test_a_token_that_is_included_and_excluded_is_a_landmark() -> None:
    chosen, _ = guided_landmarks(
        None, 8, method="grid", include=mask_of({20}), exclude=mask_of({20, 0}), prefix_tokens=1
    )
    assert chosen[0, 0] == 20
    assert 0 not in chosen


@pytest.mark.parametrize(
    ("count", "method", "masks", "said"),
    [
        (2, "grid", "include", "landmarks_include needs 3 landmarks or more .*there are 2"),
        (1, "fps", "include", "landmarks_include needs 2 landmarks or more"),
        (43, "norm-grid", "exclude", "landmarks_exclude leaves 42 of 48 tokens, but 43 landmarks"),
    ],
)
def test_sizes_that_leave_no_choice_are_refused(count: int, method: Any, masks: str, said: str) -> None:
    with pytest.raises(InvalidLandmarksError, match=said):
        guided_landmarks(torch.randn(1, TOKENS, 4), count, method=method, **{masks: mask_of({3})})


# ---------------------------------------------------------------- whole models


def tiny_vit(*planted: int) -> nn.Module:
    """Four blocks of 65 tokens; `planted` tokens are massive from block 1's output on."""
    model = make_vit()

    def plant(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, list(planted), 0] += 30.0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    if planted:
        find_attention_blocks(model)[1].layer.register_forward_hook(plant)
    return model


def run(model: nn.Module, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    patch(model, plan)
    try:
        with torch.inference_mode(), seen_landmarks() as seen:
            return model(pixels).last_hidden_state, seen
    finally:
        unpatch(model)


def plan_with(sampler: Any, layers: str = "2-3", **settings: Any) -> Plan:
    return uniform_plan(4, layers=layers, landmarks=8, sampler=sampler, **settings)


MASSIVE = TokenRange(blocks="1-3", tokens="massive")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", ["weighted", "published"])
def test_planted_massive_tokens_become_landmarks(sampler: str, method: Any) -> None:
    planted = (20, 41)
    _, plain = run(tiny_vit(*planted), plan_with(sampler, method=method))
    _, guided = run(tiny_vit(*planted), plan_with(sampler, method=method, landmarks_include=(MASSIVE,)))
    own = {"fps": 2, "grid": 3, "norm-grid": 4}[sampler]  # and the class token, and the next largest norm
    for landmarks in guided:
        for row in landmarks.tolist():
            assert set(planted) <= set(row[:own])
            assert row[:own] == sorted(row[:own])
    assert sampler != "grid" or not set(planted) & set(plain[0].flatten().tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_planted_massive_tokens_are_no_landmarks_where_they_are_excluded(sampler: str) -> None:
    planted = (22, 64) if sampler == "grid" else (20, 41)
    _, plain = run(tiny_vit(*planted), plan_with(sampler))
    assert set(planted) & set(plain[0].flatten().tolist()), "or excluding them would change nothing"
    _, guided = run(tiny_vit(*planted), plan_with(sampler, landmarks_exclude=(MASSIVE,)))
    assert len(guided) == 2
    for landmarks in guided:
        assert not set(planted) & set(landmarks.flatten().tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_artifact_tokens_are_no_landmarks_where_they_are_excluded(sampler: str) -> None:
    from fna.token_survey import survey_tokens

    model = tiny_vit()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = survey_tokens(model, lambda: model(pixels))[0].artifacts
    assert found is not None
    first = [set(row.nonzero().flatten().tolist()[: exclude_room(65)]) for row in found]
    assert all(len(tokens) == exclude_room(65) for tokens in first)  # random weights have them in plenty
    plan = plan_with(sampler, "0", landmarks_exclude=(TokenRange(blocks="0", tokens="artifact"),))
    _, (landmarks,) = run(model, plan)
    for row, tokens in zip(landmarks.tolist(), first, strict=True):
        assert not set(row) & tokens
        assert len(set(row)) == 8
    _, (plain,) = run(model, plan_with(sampler, "0"))
    assert any(set(row) & tokens for row, tokens in zip(plain.expand(2, -1).tolist(), first, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_without_massive_tokens_comes_through_bit_by_bit(sampler: str) -> None:
    plain, _ = run(tiny_vit(), plan_with(sampler))
    guided, _ = run(tiny_vit(), plan_with(sampler, landmarks_include=(MASSIVE,), landmarks_exclude=(MASSIVE,)))
    assert torch.equal(plain, guided)


def test_listed_tokens_are_the_same_in_every_image() -> None:
    ranges = {"landmarks_include": (TokenRange(blocks="2", tokens=(9, 30)),)}
    _, (first, second) = run(tiny_vit(), plan_with("grid", **ranges))
    assert first.shape[0] == 1
    assert first[0, :3].tolist() == [0, 9, 30]
    _, (plain, _) = run(tiny_vit(), plan_with("grid"))
    assert torch.equal(second, plain), "block 3 is not in the range"


def test_tokens_are_found_once_for_masks_and_landmarks_and_anew_for_every_image() -> None:
    model = tiny_vit(20, 41)
    calls: list[Tensor] = []
    original = torch.ops.fna.massive_tokens
    plan = plan_with("grid", masks=(MaskPlan(blocks="2-3", tokens="massive"),), landmarks_exclude=(MASSIVE,))
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(torch.ops.fna, "massive_tokens", lambda *args: calls.append(original(*args)) or calls[-1])
        _, seen = run(model, plan)
        assert len(calls) == 1
        run(model, plan)
        assert len(calls) == 2
    assert not {20, 41} & set(torch.cat(seen).flatten().tolist())


def test_what_depends_on_queries_is_chosen_from_them() -> None:
    """fps by queries, artifacts excluded: both are known in the attention only."""
    entry = BlockPlan(block=0, landmarks=8, sampler="fps", feature="query")
    plan = Plan(num_blocks=4, blocks=(entry,), landmarks_exclude=(TokenRange(blocks="0", tokens="artifact"),))
    _, (guided,) = run(tiny_vit(), plan)
    _, (plain,) = run(tiny_vit(), plan.model_copy(update={"landmarks_exclude": ()}))
    assert guided.shape == plain.shape == (2, 8)
    assert not torch.equal(guided, plain)


def test_artifacts_need_a_class_token_and_the_key_is_named() -> None:
    from model_families import FAMILIES, build_tiny

    model = build_tiny(next(family for family in FAMILIES if family.name == "SigLIP vision"))
    count = len(find_attention_blocks(model))
    artifacts = (TokenRange(blocks="0", tokens="artifact"),)
    plan = uniform_plan(count, layers="0", landmarks=8, landmarks_exclude=artifacts)
    with pytest.raises(InvalidPlanError, match="landmarks_exclude name artifact tokens.*no class token"):
        patch(model, plan)
    assert all(not name.startswith("_fna") for module in model.modules() for name in vars(module))


def test_too_few_landmarks_name_the_block() -> None:
    plan = uniform_plan(4, layers="2", landmarks=2, landmarks_include=(MASSIVE,))
    with pytest.raises(InvalidLandmarksError, match=r"block 2 \(.*landmarks_include needs 3"):
        run(tiny_vit(), plan)
