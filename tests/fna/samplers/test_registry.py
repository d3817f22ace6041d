"""A sampler is one record: registered, it is patched, exported, grafted, planned with and validated like those of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from seen_landmarks import seen_landmarks
from torch import Tensor

import fna
from fna.arithmetic import saved_part
from fna.errors import InvalidArgumentError
from fna.export.passes.lower import lower
from fna.export.sources.loading import load_model
from fna.export.surgery.graft import GraftOptions, graft
from fna.export.trace import TraceOptions, export_onnx
from fna.files import load_onnx
from fna.plan import BlockPlan, Plan, uniform_plan
from fna.runtime import open_session
from fna.samplers import LandmarkRequest, Sampler, find_sampler, register_sampler, sampler_names, unregister_sampler
from fna.validate.budget.measure import validate_file
from fna.validate.planning.best_plan import make_best_plan
from fna.validate.planning.candidates import SearchRange
from fna.validate.planning.cost import ProductCost
from fna.validate.planning.planner import Planner
from fna.validate.planning.subject import TorchSubject
from fna.validate.planning.wish import Wish

SIDE = 112  # 64 patches of 14 pixels and a class token


def last_tokens(request: LandmarkRequest, features: Tensor | None) -> Tensor:
    return torch.arange(request.num_tokens - request.num_landmarks, request.num_tokens, dtype=torch.int32)[None]


def loudest_tokens(request: LandmarkRequest, features: Tensor | None) -> Tensor:
    assert features is not None
    return features.float().square().sum(-1).topk(request.num_landmarks, dim=1).indices.int()


def loudest_nodes(op: Any, features: str, request: LandmarkRequest) -> str:
    norms = op.ReduceSumSquare(op.Cast(features, to="FLOAT"), axes=[2], keepdims=0)
    return op.Cast(op.TopK(norms, [request.num_landmarks], axis=1, outputs=2)[1], to="INT32")


LAST = Sampler("last", "the last tokens", select=last_tokens)
LOUDEST = Sampler(
    "loudest", "the tokens of largest norm", select=loudest_tokens, looks_at_features=True, nodes=loudest_nodes,
    nested=True, passes=lambda count: 1, launches=lambda count: 1,
)  # fmt: skip


@pytest.fixture(params=[LAST, LOUDEST], ids=["static", "by features"])
def toy(request: pytest.FixtureRequest) -> Iterator[Sampler]:
    register_sampler(request.param)
    yield request.param
    unregister_sampler(request.param.name)


def run_file(path: Path, pixels: np.ndarray) -> np.ndarray:
    session = open_session(lower(load_onnx(path), "portable"))
    return session.run(None, {session.get_inputs()[0].name: pixels})[0]


def test_a_toy_sampler_goes_the_whole_way(toy: Sampler, tmp_path: Path) -> None:
    model = load_model("tiny_vit:make_for_planning")
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    plan = uniform_plan(2, layers="0-1", landmarks=9, sampler=toy.name)

    fna.patch(model.module, plan)
    with torch.no_grad(), seen_landmarks() as seen:
        patched = model.module(pixels)[0].numpy()
    fna.unpatch(model.module)
    assert {tuple(landmarks.shape) for landmarks in seen} == {(1, 9)}
    if toy is LAST:
        assert seen[0].tolist() == [list(range(56, 65))]

    traced, dense, grafted = (tmp_path / f"{name}.onnx" for name in ("traced", "dense", "grafted"))
    export_onnx(model, plan, TraceOptions(SIDE, SIDE), traced)
    np.testing.assert_allclose(run_file(traced, pixels.numpy()), patched, atol=2e-4)
    export_onnx(model, uniform_plan(2, layers="none"), TraceOptions(SIDE, SIDE), dense)
    graft(dense, grafted, GraftOptions(layers="0-1", landmarks=9, sampler=toy.name))
    np.testing.assert_allclose(run_file(grafted, pixels.numpy()), patched, atol=2e-4)

    pictures = [np.random.default_rng(number).standard_normal((3, SIDE, SIDE), np.float32) for number in range(3)]
    subject = TorchSubject(model, SIDE, SIDE)
    tried = SearchRange(samplers=(toy.name,), landmarks=(8, 16))
    planner = Planner(subject, Wish(0.5, tried=tried), ProductCost(subject.layout), pictures[:2], pictures[2:])
    best = make_best_plan(planner).plan
    assert {block.sampler for block in best.blocks} == {toy.name}

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 100, 3), dtype=np.uint8))
    validation, _ = validate_file(traced, [("noise", image)])
    assert [line for line in validation.failures() if not line.startswith("approximation")] == []


def test_choosing_landmarks_by_features_costs_what_the_record_says() -> None:
    register_sampler(LOUDEST)
    try:
        plans = [
            Plan(num_blocks=2, blocks=(BlockPlan(block=0, landmarks=8, sampler=name),)) for name in ("grid", "loudest")
        ]
        grid, loudest = (saved_part(plan, 65, 2, 16) for plan in plans)
        assert grid - loudest == pytest.approx(65 * 32 / (2 * 2 * 2 * 65 * 65 * 16))
    finally:
        unregister_sampler("loudest")


def test_every_file_of_the_folder_is_a_sampler_of_that_name() -> None:
    for name in sampler_names():
        assert find_sampler(name).name == name
        assert find_sampler(name).summary


def test_a_name_can_be_taken_once_and_unknown_ones_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="named 'grid' exists already"):
        register_sampler(Sampler("grid", "another", select=last_tokens))
    with pytest.raises(InvalidArgumentError, match="'last' is not known; choose one of fps, grid"):
        find_sampler("last")
