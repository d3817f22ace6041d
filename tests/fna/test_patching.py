"""Patching transformers' vision models: what changes and what does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from model_families import (
    FAMILIES,
    IMAGE,
    SIZES,
    Family,
    build_tiny,
    run_vision,
    sample_pixels,
    siglip2_inputs,
)
from patch_plans import BY_NAME, LANDMARKS, make_plan, snapshot
from torch import Tensor, nn
from tower_models import depth_pro

import fna
import fna.patching.attention
from fna.attention import fast_nystrom_attention
from fna.observing import NystromCall, observed
from fna.patching import find_attention_blocks
from fna.plan import METHODS, BlockPlan, Plan, uniform_plan
from fna.samplers import landmark_bias, sampler_names, select_landmarks

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@dataclass
class Call:
    """One FNA block's inputs and output, as the patched model computed it."""

    query: Tensor
    key: Tensor
    value: Tensor
    landmarks: Tensor
    settings: dict[str, Any]
    out: Tensor


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Records each call that a patched model makes of `fast_nystrom_attention`."""
    recorded: list[Call] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, **settings: Any) -> Tensor:
        out = fast_nystrom_attention(query, key, value, landmarks, **settings)
        recorded.append(Call(query, key, value, landmarks, settings, out))
        return out

    monkeypatch.setattr(fna.patching.attention, "fast_nystrom_attention", spy)
    return recorded


def hidden_states(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What enters each transformer layer, by hooks of the test's own."""
    seen: list[Tensor] = []
    blocks = find_attention_blocks(model)
    hooks = [
        block.layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


# What a patch does


@every_family
def test_planned_blocks_compute_fna_and_the_others_do_not_change(family: Family, calls: list[Call]) -> None:
    model = build_tiny(family)
    pixels = sample_pixels()
    before = hidden_states(model, lambda: run_vision(family, model, pixels))
    blocks = fna.patch(model, make_plan(model, layers="1-2"))
    during = hidden_states(model, lambda: run_vision(family, model, pixels))

    assert [block.refusal for block in blocks] == [None] * len(blocks)
    assert len(calls) == 2
    for entering in (0, 1):  # block 0 is exact, so nothing up to block 1 may differ by a bit
        assert torch.equal(before[entering], during[entering])
    assert not torch.allclose(before[2], during[2], atol=1e-3)

    landmarks = select_landmarks(during[1], LANDMARKS, method="fps", prefix_tokens=family.prefix_tokens)
    for call in calls:
        assert call.query.shape == (2, 4, family.num_tokens, 8)
        assert torch.equal(call.landmarks, landmarks)
        expected = fast_nystrom_attention(
            call.query, call.key, call.value, landmarks, landmark_bias=None, scale=8**-0.5, exact_rows=True
        )
        torch.testing.assert_close(call.out, expected, rtol=0, atol=1e-6)


@every_family
def test_unpatch_leaves_the_model_as_it_was_to_the_bit(family: Family) -> None:
    model = build_tiny(family)
    pixels = sample_pixels()
    state = snapshot(model)
    with torch.no_grad():
        before = run_vision(family, model, pixels)
        fna.patch(model, make_plan(model))
        during = run_vision(family, model, pixels)
        fna.unpatch(model)
        after = run_vision(family, model, pixels)
    assert not torch.allclose(before, during, atol=1e-3)
    assert torch.equal(before, after)
    assert snapshot(model) == state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampler", sampler_names())
@pytest.mark.parametrize("name", ["DINOv2 with registers", "SigLIP vision"])
def test_every_sampler_and_method(name: str, sampler: Any, method: Any, calls: list[Call]) -> None:
    family = BY_NAME[name]
    model = build_tiny(family)
    fna.patch(model, make_plan(model, sampler=sampler, method=method, seed=3))
    hidden = hidden_states(model, lambda: run_vision(family, model, sample_pixels()))
    landmarks = select_landmarks(hidden[0], LANDMARKS, method=sampler, prefix_tokens=family.prefix_tokens, seed=3)
    bias = landmark_bias(family.num_tokens, LANDMARKS, method=sampler, prefix_tokens=family.prefix_tokens)
    assert len(calls) == 3
    for call in calls:
        assert torch.equal(call.landmarks.expand(2, -1), landmarks)
        used = call.settings["landmark_bias"]
        assert used is None if method == "published" else torch.equal(used, bias)
        assert call.settings["exact_rows"] is (method == "weighted")


@pytest.mark.parametrize("feature", ["query", "key", "value"])
@pytest.mark.parametrize("resample", [False, True])
def test_landmarks_by_query_key_or_value(feature: str, resample: bool, calls: list[Call]) -> None:
    model = build_tiny(BY_NAME["DINOv2"])
    fna.patch(model, make_plan(model, feature=feature, resample=resample))
    run_vision(BY_NAME["DINOv2"], model, sample_pixels())
    chosen = [select_landmarks(getattr(call, feature).mean(1), LANDMARKS, method="fps") for call in calls]
    expected = chosen if resample else [chosen[0]] * 3
    assert all(torch.equal(call.landmarks, want) for call, want in zip(calls, expected, strict=True))
    assert not torch.equal(chosen[0], chosen[1])  # or the test could not tell the two apart


@pytest.mark.parametrize("resample", [False, True])
def test_landmarks_from_hidden_states_are_chosen_once_or_per_block(resample: bool, calls: list[Call]) -> None:
    family = BY_NAME["ViT"]
    model = build_tiny(family)
    fna.patch(model, make_plan(model, resample=resample))
    hidden = hidden_states(model, lambda: run_vision(family, model, sample_pixels()))
    chosen = [select_landmarks(states, LANDMARKS, method="fps") for states in hidden]
    expected = chosen if resample else [chosen[0]] * 3
    assert all(torch.equal(call.landmarks, want) for call, want in zip(calls, expected, strict=True))
    assert not torch.equal(chosen[0], chosen[2])


def test_blocks_share_landmarks_only_where_number_sampler_and_feature_are_equal(calls: list[Call]) -> None:
    family = BY_NAME["ViT"]
    model = build_tiny(family)
    blocks = (
        BlockPlan(block=0, landmarks=8, sampler="fps"),
        BlockPlan(block=1, landmarks=9, sampler="fps"),
        BlockPlan(block=2, landmarks=8, sampler="fps"),
    )
    fna.patch(model, Plan(num_blocks=3, blocks=blocks))
    hidden = hidden_states(model, lambda: run_vision(family, model, sample_pixels()))
    assert torch.equal(calls[0].landmarks, select_landmarks(hidden[0], 8, method="fps"))
    assert torch.equal(calls[1].landmarks, select_landmarks(hidden[1], 9, method="fps"))
    assert torch.equal(calls[2].landmarks, calls[0].landmarks)


def test_landmarks_belong_to_one_forward_pass(calls: list[Call]) -> None:
    family = BY_NAME["ViT"]
    model = build_tiny(family)
    fna.patch(model, make_plan(model))
    run_vision(family, model, sample_pixels(batch=2))
    run_vision(family, model, sample_pixels(batch=3, seed=2))
    first, second = calls[:3], calls[3:]
    assert {call.landmarks.shape for call in first} == {(2, LANDMARKS)}
    assert {call.landmarks.shape for call in second} == {(3, LANDMARKS)}


def test_a_plan_may_say_the_prefix_tokens_itself(calls: list[Call]) -> None:
    model = build_tiny(BY_NAME["ViT"])
    fna.patch(model, make_plan(model, sampler="grid", prefix_tokens=4))
    run_vision(BY_NAME["ViT"], model, sample_pixels())
    assert calls[0].landmarks[0, :5].tolist() == [0, 1, 2, 3, 4]
    assert calls[0].settings["landmark_bias"][0, :4].tolist() == [0, 0, 0, 0]


def test_a_plan_without_blocks_computes_the_same_bit_for_bit() -> None:
    family = BY_NAME["ViT"]
    model = build_tiny(family)
    state, before = snapshot(model), run_vision(family, model, sample_pixels())
    fna.patch(model, make_plan(model, layers="none"))
    for given, expected in zip(run_vision(family, model, sample_pixels()), before, strict=True):
        assert torch.equal(given, expected)
    fna.unpatch(model)
    assert snapshot(model) == state


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_exact_blocks_keep_the_implementation_that_they_had(implementation: str) -> None:
    family = BY_NAME["DINOv3"]
    model = build_tiny(family)
    model.set_attn_implementation(implementation)
    pixels = sample_pixels()
    before = hidden_states(model, lambda: run_vision(family, model, pixels))
    fna.patch(model, make_plan(model, layers="2"))
    during = hidden_states(model, lambda: run_vision(family, model, pixels))
    assert all(torch.equal(exact, patched) for exact, patched in zip(before, during, strict=True))
    fna.unpatch(model)
    assert model.config._attn_implementation == implementation


# What a patch leaves alone


def test_clips_text_tower_is_left_alone() -> None:
    model = build_tiny(BY_NAME["CLIP"])
    words = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        before = model.get_text_features(input_ids=words).pooler_output
        blocks = fna.patch(model, make_plan(model))
        during = model.get_text_features(input_ids=words).pooler_output
    assert torch.equal(before, during)
    assert all(block.name.startswith("vision_model.") for block in blocks)
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2"])
def test_siglips_text_tower_is_left_alone(name: str) -> None:
    model = build_tiny(BY_NAME[name])
    words = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        before = model.text_model(input_ids=words).pooler_output
        fna.patch(model, make_plan(model))
        assert torch.equal(before, model.text_model(input_ids=words).pooler_output)


@pytest.mark.parametrize("name", ["SigLIP vision", "SigLIP 2 vision"])
def test_siglips_pooling_head_is_left_alone(name: str) -> None:
    family = BY_NAME[name]
    model = build_tiny(family)
    pixels = sample_pixels()
    inputs = siglip2_inputs(pixels) if name == "SigLIP 2 vision" else {"pixel_values": pixels}
    more = (None,) if name == "SigLIP 2 vision" else ()
    with torch.no_grad():
        blocks = fna.patch(model, make_plan(model))
        output = model(**inputs)
        fna.unpatch(model)
        pooled = model.head(output.last_hidden_state, *more)
    assert not any("head" in block.name for block in blocks)
    assert torch.equal(output.pooler_output, pooled)


def test_llavas_language_model_is_left_alone() -> None:
    model = build_tiny(BY_NAME["LLaVA"])
    words = torch.arange(16).reshape(2, 8)
    image_words = torch.tensor([[1, *[98] * 64, 2]])
    with torch.no_grad():
        text_before = model(input_ids=words).logits
        both_before = model(input_ids=image_words, pixel_values=sample_pixels(1)).logits
        blocks = fna.patch(model, make_plan(model))
        text_during = model(input_ids=words).logits
        both_during = model(input_ids=image_words, pixel_values=sample_pixels(1)).logits
    assert all("vision_tower" in block.name for block in blocks)
    assert torch.equal(text_before, text_during)
    assert not torch.allclose(both_before, both_during, atol=1e-3)


# Failing, copying, compiling


def test_a_patch_that_fails_midway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    family = BY_NAME["ViT"]
    model = build_tiny(family)
    blocks = find_attention_blocks(model)
    with torch.no_grad():
        before = run_vision(family, model, sample_pixels())
    state = snapshot(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    with monkeypatch.context() as patched:
        patched.setattr(type(blocks[2].layer), "register_forward_pre_hook", fail_from_second(fail))
        with pytest.raises(RuntimeError, match="no more hooks"):
            fna.patch(model, make_plan(model, resample=True))
    assert snapshot(model) == state
    with torch.no_grad():
        assert torch.equal(before, run_vision(family, model, sample_pixels()))
    fna.patch(model, make_plan(model))  # and it can be patched afterwards


def fail_from_second(fail: Callable[..., None]) -> Callable[..., Any]:
    """The real `register_forward_pre_hook` once, then a failure."""
    count = iter(range(10))

    def register(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.register_forward_pre_hook(layer, *args, **kwargs) if next(count) == 0 else fail()

    return register


def test_a_copy_of_a_patched_model_works_by_itself() -> None:
    family = BY_NAME["DINOv2"]
    model = build_tiny(family)
    with torch.no_grad():
        exact = run_vision(family, model, sample_pixels())
        fna.patch(model, make_plan(model))
        twin = copy.deepcopy(model)
        patched = run_vision(family, model, sample_pixels())
        fna.unpatch(model)
        assert torch.equal(run_vision(family, twin, sample_pixels()), patched)
        fna.unpatch(twin)
        assert torch.equal(run_vision(family, twin, sample_pixels()), exact)


@pytest.mark.parametrize(
    ("name", "sampler", "backend"), [("ViT", "fps", "eager"), ("DINOv3", "norm-grid", "aot_eager")]
)
def test_a_patched_model_compiles_to_the_same_outputs(name: str, sampler: Any, backend: str) -> None:
    family = BY_NAME[name]
    model = build_tiny(family)
    fna.patch(model, make_plan(model, sampler=sampler))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for seed in (1, 2):  # the second pass must not reuse the first's landmarks
            pixels = sample_pixels(seed=seed)
            expected = model(pixels).last_hidden_state
            torch.testing.assert_close(compiled(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", sampler_names())
def test_a_patched_model_exports_with_one_operator_per_block(sampler: Any) -> None:
    model = build_tiny(BY_NAME["DINOv2 with registers"])
    fna.patch(model, make_plan(model, sampler=sampler))
    pixels = sample_pixels()
    with torch.no_grad():
        program = torch.export.export(model, (pixels,))
        expected = model(pixels).last_hidden_state
        torch.testing.assert_close(program.module()(pixels).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("fna.attention.default") == 3
    assert targets.count("fna.farthest_point_sampling.default") == (sampler == "fps")
    assert targets.count("fna.norm_grid_landmarks.default") == (sampler == "norm-grid")


def test_gradients_flow_through_a_patched_model() -> None:
    model = build_tiny(BY_NAME["ViT"])
    fna.patch(model, make_plan(model))
    model(sample_pixels()).last_hidden_state.square().sum().backward()
    projection = find_attention_blocks(model)[1].attention.q_proj.weight
    assert projection.grad is not None
    assert projection.grad.abs().max() > 0


# Several towers


def test_a_model_with_two_vision_stacks_has_two_towers() -> None:
    config = transformers.ViTMAEConfig(
        **SIZES,
        **IMAGE,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=32,
    )
    blocks = find_attention_blocks(transformers.ViTMAEForPreTraining(config))
    assert [block.tower_name for block in blocks] == ["vit"] * 3 + ["decoder_layers"]
    assert [block.number for block in blocks] == [0, 1, 2, 3]


def test_each_tower_has_its_own_prefix_tokens() -> None:
    blocks = find_attention_blocks(depth_pro())
    towers = ["patch_encoder", "image_encoder", "fov_encoder"]
    assert [(block.tower_name, block.prefix_tokens) for block in blocks] == [(name, 1) for name in towers]


def test_windows_that_are_joined_have_prefix_tokens_each() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 64}
    config = transformers.RfDetrDinov2Config(
        **sizes, patch_size=8, num_windows=2, window_block_indexes=[0], out_indices=[1, 2]
    )
    model = transformers.RfDetrDinov2Backbone(config).eval()
    blocks = find_attention_blocks(model)
    assert [(block.refusal, block.frames, block.prefix_tokens) for block in blocks] == [
        ("it attends within windows", 1, 1),
        (None, 4, 1),
    ]
    calls: list[NystromCall] = []
    fna.patch(model, uniform_plan(2, layers="1", landmarks=LANDMARKS))
    with torch.no_grad(), observed(model, replaced=calls.append):
        model(sample_pixels(size=64))
    assert calls[0].query.shape == (2, 4, 4 * 17, 8)
    assert [number for number in calls[0].landmarks[0].tolist() if number % 17 == 0] == [0, 17, 34, 51]
