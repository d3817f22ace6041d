"""Patching models without transformers' attention interface, by the calls that they make of PyTorch's attention functions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from called_models import (
    DIM,
    GRID,
    PATCH,
    Block,
    CrossViT,
    EncoderViT,
    MapViT,
    OwnViT,
    SharedViT,
    TwoTowers,
    Unrunnable,
    ValueDependent,
    build,
    make_scene,
)
from model_families import sample_pixels
from torch import Tensor, nn

import fna
from fna.attention import fast_nystrom_attention
from fna.errors import InvalidPlanError, ModelSourceError, UnsupportedAttentionError
from fna.observing import AttentionCall, NystromCall, observed
from fna.patching import find_attention_blocks
from fna.plan import BlockPlan, FocalBlockPlan, MaskPlan, Plan, TokenRange, uniform_plan
from fna.samplers import select_landmarks

S = 12
MODELS = {
    "own code": lambda: OwnViT(prefix=5),
    "encoder": EncoderViT,
    "tokens first": lambda: EncoderViT(batch_first=False),
    "map": MapViT,
    "two calls": lambda: OwnViT("twice", "plain"),
    "shared": SharedViT,
}
every_model = pytest.mark.parametrize("name", MODELS)


def fps_plan(model: nn.Module, layers: str = "all", **settings: Any) -> Plan:
    return uniform_plan(len(find_attention_blocks(model)), layers=layers, landmarks=S, sampler="fps", **settings)


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about the modules that a patch could leave behind."""
    return [
        (name, sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks), module.training)
        for name, module in model.named_modules()
    ]


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(sample_pixels())


@pytest.mark.parametrize(
    ("name", "paths", "prefix"),
    [
        ("own code", [f"blocks.{n}.attn" for n in range(3)], 5),
        ("encoder", [f"encoder.layers.{n}.self_attn" for n in range(3)], 0),
        ("tokens first", [f"encoder.layers.{n}.self_attn" for n in range(3)], 0),
        ("map", ["blocks.0.attn", "blocks.1.attn"], 0),
        ("two calls", ["blocks.0.attn", "blocks.0.attn#1", "blocks.1.attn"], 1),
        ("shared", ["blocks.0.attn"], 1),
    ],
)
def test_blocks_are_found_in_the_order_of_the_run(name: str, paths: list[str], prefix: int) -> None:
    model = build(MODELS[name]()).train()
    before = snapshot(model)
    blocks = find_attention_blocks(model)
    assert snapshot(model) == before
    assert [block.name for block in blocks] == paths
    assert {(block.prefix_tokens, block.heads, block.head_size, block.refusal) for block in blocks} == {
        (prefix, 4, 8, None)
    }
    assert [block.runs for block in blocks] == [2 if name == "shared" else 1] * len(blocks)


@every_model
def test_planned_blocks_compute_fna_of_what_entered_them_and_the_others_do_not_change(name: str) -> None:
    model = build(MODELS[name]())
    exact: list[AttentionCall] = []
    entered: list[Tensor] = []
    with observed(model, exact.append, entering=lambda _, hidden: entered.append(hidden)):
        torch.testing.assert_close(run(model), build(MODELS[name]())(sample_pixels()), rtol=1e-4, atol=1e-5)
    calls: list[NystromCall] = []
    fna.patch(model, fps_plan(model, layers="0"))
    with observed(model, replaced=calls.append):
        run(model)
    first = exact[0]
    landmarks = select_landmarks(entered[0], S, method="fps")
    assert torch.equal(calls[0].landmarks, landmarks)
    expected = fast_nystrom_attention(
        first.query, first.key, first.value, landmarks, scale=first.scale, exact_rows=True
    )
    torch.testing.assert_close(calls[0].out, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == (2 if name == "shared" else 1)


@every_model
def test_unpatching_leaves_no_trace(name: str) -> None:
    model = build(MODELS[name]())
    before, state = run(model), snapshot(model)
    fna.patch(model, fps_plan(model))
    assert not torch.allclose(run(model), before, atol=1e-3)
    fna.unpatch(model)
    assert snapshot(model) == state
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("name", ["two calls", "tokens first", "shared"])
def test_a_patched_model_exports_compiles_copies_and_has_gradients(name: str) -> None:
    model = build(MODELS[name]())
    fna.patch(model, fps_plan(model))
    pixels = sample_pixels()
    expected = model(pixels)
    program = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(pixels), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(pixels), expected)
    twin = copy.deepcopy(model)
    fna.unpatch(model)
    assert torch.equal(twin(pixels), expected)
    twin(pixels).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in twin.parameters())


def test_every_attention_of_a_plan_is_computed() -> None:
    model = build(OwnViT("plain", "plain", "plain", "plain"))
    before = run(model)
    plan = Plan(
        num_blocks=4,
        blocks=(BlockPlan(block=1, landmarks=S, heads=(1, 3)), BlockPlan(block=2, landmarks=S, sampler="norm-grid")),
        focal=(FocalBlockPlan(block=3, tile=4, hot=4),),
        masks=(MaskPlan(blocks="0", tokens=(3, 5)), MaskPlan(blocks="1-2", tokens="massive")),
        landmarks_include=(TokenRange(blocks="1", tokens="artifact"),),
    )
    seen: list[tuple[int, str, int]] = []
    fna.patch(model, plan)
    with observed(model, replaced=lambda call: seen.append((call.block, type(call).__name__, call.query.shape[1]))):
        after = run(model)
    assert seen == [(1, "NystromCall", 2), (2, "NystromCall", 4), (3, "FocalCall", 4)]
    assert not torch.allclose(before, after, atol=1e-3)
    fna.unpatch(model)
    assert torch.equal(run(model), before)


def test_queries_stand_in_for_hidden_states_that_cannot_be_had() -> None:
    class Bare(OwnViT):
        def forward(self, pixel_values: Tensor) -> Tensor:
            x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2).contiguous()
            attention = self.blocks[0].attn
            split = x.unflatten(-1, (4, -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(split, split, split) + attention.proj.bias.sum()

    model = build(Bare("plain"))
    calls: list[NystromCall] = []
    fna.patch(model, fps_plan(model))
    with observed(model, replaced=calls.append):
        run(model)
    assert torch.equal(calls[0].landmarks, select_landmarks(calls[0].query.mean(1), S, method="fps"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("masked", "adds an attention mask of shape [65, 65]"),
        ("biased", "adds a position bias or mask of shape [4, 65, 65]"),
        ("causal", "it is causal"),
        ("pooled keys", "cross-attention: 65 queries, 33 keys"),
        ("grouped", "heads are grouped"),
        ("flat", "its query has 3 dimensions"),
        ("explicit", "softmax(q @ k.T) @ v by itself"),
    ],
)
def test_a_block_that_is_not_plain_self_attention_is_refused_by_name(kind: str, reason: str) -> None:
    model = build(OwnViT("plain", kind))
    blocks = find_attention_blocks(model)
    assert blocks[0].refusal is None
    assert reason in str(blocks[1].refusal)
    with pytest.raises(UnsupportedAttentionError, match=r"block 1 \(blocks\.1\.attn\) cannot be FNA.*plan's layers"):
        fna.patch(model, fps_plan(model))
    fna.patch(model, fps_plan(model, layers="0"))
    with pytest.raises(UnsupportedAttentionError, match=r"OwnViT has no .* and so for all 2"):
        find_attention_blocks(build(OwnViT(kind, kind)))


@pytest.mark.parametrize("kind", ["windowed", "flat windowed"])
def test_windows_are_told_from_a_batch(kind: str) -> None:
    model = build(OwnViT(kind, "plain", prefix=0))
    blocks = find_attention_blocks(model)
    assert blocks[0].refusal == f"it attends within windows (4 of {GRID * GRID // 4} tokens for each image)"
    assert blocks[1].refusal is None
    assert blocks[1].prefix_tokens == 0


def test_patches_are_found_without_a_convolution_and_by_the_size_of_the_image() -> None:
    class FlatViT(OwnViT):
        def forward(self, pixel_values: Tensor) -> Tensor:
            cut = pixel_values.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))  # [B, 3, rows, p, columns, p]
            flat = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
            patches = nn.functional.linear(flat, self.patch_embed.weight.flatten(1))
            return self.blocks(torch.cat([self.front.expand(len(patches), -1, -1), patches], dim=1))

    block = find_attention_blocks(build(FlatViT(prefix=3)))[0]
    assert (block.patches, block.prefix_tokens) == ((GRID, GRID), 3)


def test_a_convolution_within_windows_makes_no_images_of_them() -> None:
    class Positions(Block):  # as CSWin adds them
        def forward(self, x: Tensor) -> Tensor:
            windows = x.unflatten(1, (4, -1)).flatten(0, 1)
            kernel = torch.ones(DIM, 1, 3, 3)
            encoded = nn.functional.conv2d(windows.mT.unflatten(2, (4, -1)), weight=kernel, padding=1, groups=DIM)
            return self.attn(windows + encoded.flatten(2).mT).reshape(x.shape)

    model = build(OwnViT("plain", "plain", prefix=0))
    model.blocks[0] = build(Positions())
    refusals = [block.refusal for block in find_attention_blocks(model)]
    assert refusals == [f"it attends within windows (4 of {GRID * GRID // 4} tokens for each image)", None]


def test_cross_attention_of_equal_lengths_is_refused() -> None:
    assert "cross-attention" in str(find_attention_blocks(build(CrossViT()))[-1].refusal)


def test_attention_whose_weights_are_used_is_refused_and_where_they_are_dropped_it_is_not() -> None:
    class Pooled(EncoderViT):
        def forward(self, pixel_values: Tensor) -> Any:
            x = super().forward(pixel_values)
            out, weights = self.pool(x, x, x)
            if self.use == "computed with":
                return weights @ out
            return out if self.use == "dropped" else (out, [weights])

    model = build(Pooled(pool=True))
    for use in ("computed with", "returned"):
        model.use = use
        assert find_attention_blocks(model)[-1].refusal == "its attention weights are used, which FNA does not compute"
    model.use = "dropped"
    assert find_attention_blocks(model)[-1].refusal is None
    before = run(model)
    fna.patch(model, uniform_plan(4, layers="3", landmarks=S))
    assert not torch.allclose(run(model), before, atol=1e-3)


def test_a_call_that_was_plain_when_found_and_is_masked_later_is_refused() -> None:
    class Switched(OwnViT):
        pass

    model = build(Switched())
    fna.patch(model, fps_plan(model))
    model.blocks[1].attn.kind = "masked"
    with pytest.raises(UnsupportedAttentionError, match=r"block 1 \(blocks\.1\.attn\).*attention mask"):
        run(model)
    encoder = build(EncoderViT())
    fna.patch(encoder, fps_plan(encoder))
    with pytest.raises(UnsupportedAttentionError, match="called causally or with a mask"):
        encoder.encoder(torch.zeros(2, 4, DIM), mask=torch.ones(4, 4, dtype=torch.bool).triu(1))


def test_attention_that_cannot_be_seen_says_what_was_called() -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.0\.attn called sigmoid.* not .*use fna graft"):
        find_attention_blocks(build(OwnViT("unseen")))
    with pytest.raises(
        UnsupportedAttentionError,
        match="Sequential has no self-attention block .*no module called",
    ):
        find_attention_blocks(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_a_model_that_does_not_take_images_needs_an_example() -> None:
    model = build(Unrunnable())
    with pytest.raises(ModelSourceError, match=r"does not run on an input of shape \[2, 3, 32, 32\].*example"):
        fna.patch(model, uniform_plan(3))
    example = (sample_pixels(), torch.zeros(2))
    assert len(fna.patch(model, uniform_plan(3, landmarks=S), example)) == 3


def test_a_model_that_looks_at_values_is_patched_all_the_same() -> None:
    assert len(fna.patch(build(ValueDependent()), uniform_plan(3, landmarks=S))) == 3


def test_towers_are_told_apart_and_patched_by_their_own_prefix_tokens() -> None:
    model = build(TwoTowers())
    blocks = find_attention_blocks(model)
    assert [(block.tower_name, block.prefix_tokens) for block in blocks] == 2 * [("vision", 1)] + 3 * [("depth", 3)]
    towers = {"vision": "0-1", "depth": "2-4"}
    with pytest.raises(InvalidPlanError, match=r"towers are no name.*this model's are vision .blocks 0-1., depth"):
        fna.patch(model, uniform_plan(5, landmarks=S))
    with torch.no_grad():
        before = model(sample_pixels())
        fna.patch(model, uniform_plan(5, layers="depth:1-2", towers=towers, landmarks=S))
        calls: list[NystromCall] = []
        with observed(model, replaced=calls.append):
            after = model(sample_pixels())
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    assert [call.landmarks[0, :4].tolist() for call in calls] == [[0, 1, 2, 3]] * 2
    assert [call.block for call in calls] == [3, 4]


class HalvedViT(OwnViT):
    """Its last block has half as many tokens, as in a pyramid."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.blocks[:2](self.patch_embed(pixel_values).flatten(2).transpose(1, 2))
        return self.blocks[2:](x[:, ::2])


@pytest.mark.parametrize(
    ("make", "towers", "layers"),
    [(TwoTowers, {"vision": "0-1", "depth": "2-4"}, "vision:0-1,depth:0"), (HalvedViT, {}, "all")],
)
def test_landmarks_are_shared_among_blocks_of_the_same_tokens_only(
    make: type[nn.Module], towers: dict[str, str], layers: str
) -> None:
    model = build(make())
    plan = uniform_plan(5 if towers else 3, layers=layers, towers=towers, landmarks=S, sampler="fps")
    entered: list[Tensor] = []
    for block in fna.patch(model, plan):
        block.layer.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    calls: list[NystromCall] = []
    with torch.no_grad(), observed(model, replaced=calls.append):
        model(sample_pixels())
    first, second, other = (call.landmarks for call in calls)
    assert torch.equal(first, select_landmarks(entered[0], S, method="fps"))
    assert torch.equal(second, first)
    assert torch.equal(other, select_landmarks(entered[2], S, method="fps"))


def test_blocks_over_several_images_take_landmarks_of_each() -> None:
    model = make_scene(frames=3)
    blocks = find_attention_blocks(model)
    assert [(block.tower_name, block.frames, block.prefix_tokens) for block in blocks[:2]] == [
        ("frame_blocks", 1, 2),
        ("global_blocks", 3, 2),
    ]
    towers = {"frame_blocks": "0,2", "global_blocks": "1,3"}
    fna.patch(model, uniform_plan(4, layers="all", towers=towers, landmarks=S))
    calls: list[NystromCall] = []
    with torch.no_grad(), observed(model, replaced=calls.append):
        model(torch.randn(2, 3, 3, 32, 32))
    assert [tuple(call.query.shape[:3]) for call in calls] == [(6, 4, 66), (2, 4, 198)] * 2
    alone, together = calls[0].landmarks[0].tolist(), calls[1].landmarks[0].tolist()
    assert alone[:2] == [0, 1]
    assert [number // 66 for number in together] == [0] * 4 + [1] * 4 + [2] * 4
    assert [number % 66 for number in together[4:6]] == [0, 1]
    fna.unpatch(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocks": (BlockPlan(block=1, landmarks=S, sampler="norm-grid"),)}, "the norm-grid sampler .*choose grid"),
        ({"focal": (FocalBlockPlan(block=1),)}, "focal attention knows"),
        ({"masks": (MaskPlan(blocks="global_blocks:0", tokens="massive"),)}, "artifact and massive tokens"),
    ],
)
def test_what_knows_one_image_only_is_refused_over_several(change: dict[str, Any], reason: str) -> None:
    towers = {"frame_blocks": "0,2", "global_blocks": "1,3"}
    with pytest.raises(InvalidPlanError, match=rf"block 1 \(global_blocks\.0\.attn\) .*2 images at once: .*{reason}"):
        fna.patch(make_scene(frames=2), Plan(num_blocks=4, towers=towers, **change))


def test_a_patched_model_is_found_as_it_was_and_not_patched_twice() -> None:
    model = build(OwnViT())
    blocks = fna.patch(model, fps_plan(model))
    assert find_attention_blocks(model) == blocks
    with pytest.raises(InvalidPlanError, match="patched already"):
        fna.patch(model, fps_plan(model))


def test_a_patch_that_fails_midway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(OwnViT())
    before, plan, state = run(model), fps_plan(model), snapshot(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(fna.patching.apply, "intercept", fail)
    with pytest.raises(RuntimeError, match="no more"):
        fna.patch(model, plan)
    monkeypatch.undo()
    assert snapshot(model) == state
    assert torch.equal(run(model), before)
