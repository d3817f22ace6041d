"""Costs by the clock of this machine's onnxruntime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from fna.export.sources.loading import LoadedModel
from fna.plan import BlockPlan, FocalBlockPlan, Plan
from fna.runtime import open_session, run_session
from fna.validate.planning import clock
from fna.validate.planning.best_plan import make_best_plan
from fna.validate.planning.candidates import Candidate, FocalCandidate, SearchRange
from fna.validate.planning.clock import CpuCost
from fna.validate.planning.one_block import EXACT_FORMS, exact_block, planned_block
from fna.validate.planning.planner import Planner
from fna.validate.planning.subject import Layout, TorchSubject
from fna.validate.planning.wish import Wish

LAYOUT = Layout("m", 3, {}, 65, 4, 16, 64, 1, (8, 8), (112, 112))
GRID = Candidate(16, "grid", False, 6)
FOCAL = FocalCandidate(4, ((1, 0), (2, 1)), 2)


class FakeClock:
    """Takes every model for as many seconds as `seconds` has for it, told by its operators, and counts what it timed."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.timed = seconds, 0

    def __call__(self, model: ModelProto, layout: Layout) -> float:
        self.timed += 1
        calls = [node.op_type for node in model.graph.node]
        heads = "Concat" in calls and "FastNystromAttention" in calls
        kinds = {
            "correction": "Conv" in calls,
            "split": heads and "Conv" not in calls,
            "norms": "NormGridLandmarks" in calls,
        }
        for name, there in kinds.items():
            if there:
                return self.seconds[name]
        named = {"FocalAttention": "focal", "FastNystromAttention": "nystrom", "MultiHeadAttention": "fused"}
        return self.seconds[next((named[call] for call in calls if call in named), "exact")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    found = FakeClock(exact=8.0, fused=6.0, nystrom=2.0, focal=3.0, correction=2.5, split=6.0, norms=2.9)
    monkeypatch.setattr(clock, "_fastest", found)
    return found


def test_every_form_of_exact_attention_computes_the_same_and_a_plan_nearly_so() -> None:
    hidden = np.random.default_rng(0).standard_normal((1, 65, 64)).astype(np.float32)
    found = [
        run_session(open_session(exact_block(LAYOUT, form), name=form), {"hidden": hidden})["out"]
        for form in EXACT_FORMS
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)
    near = FocalBlockPlan(block=0, tile=4, levels=((1, 0),), hot=0)
    plan = Plan(num_blocks=1, focal=(near,), prefix_tokens=1, patches=(8, 8))
    out = run_session(open_session(planned_block(LAYOUT, plan), name="planned"), {"hidden": hidden})["out"]
    np.testing.assert_allclose(out, found[0], rtol=1e-4, atol=1e-4)
    plan = Plan(num_blocks=1, blocks=(BlockPlan(block=0, landmarks=16),), prefix_tokens=1, patches=(8, 8))
    out = run_session(open_session(planned_block(LAYOUT, plan), name="planned"), {"hidden": hidden})["out"]
    assert float(np.abs(out - found[0]).max()) > 1e-4


def test_a_block_costs_what_its_operators_take(fake: FakeClock) -> None:
    cost = CpuCost(LAYOUT, None)
    assert cost.exact(4) == 6.0
    assert cost.exact(1) == 2.0
    assert cost.baseline() == (6.0, EXACT_FORMS[2])
    assert cost.block(FOCAL, 4, 0) == 3.0
    assert cost.block(GRID, 4, 0) == 2.0
    assert cost.block(GRID, 4, 5) == pytest.approx(2.0 + 0.5)
    # of two heads FNA takes 1 s, the others 4 s; half of the heads took 6 s, so 1 s goes into splitting
    assert cost.block(GRID, 1, 0) == pytest.approx(0.5 + 6.0 + 1.0)
    norms = replace(GRID, sampler="norm-grid", resample=True)
    assert cost.block(norms, 4, 0) == pytest.approx(2.0 + 0.9)
    assert cost.block(replace(norms, resample=False), 4, 0) == pytest.approx(2.0 + 0.9 / 3)


def test_what_was_timed_once_is_remembered_for_these_sizes(fake: FakeClock, tmp_path: Path) -> None:
    first, again = CpuCost(LAYOUT, tmp_path), CpuCost(LAYOUT, tmp_path)
    other = CpuCost(replace(LAYOUT, tokens=66), tmp_path)
    counts = []
    for cost in (first, again, other):
        cost.exact(4)
        cost.exact(2)
        counts.append(fake.timed)
    assert counts == [3, 3, 6]  # the forms of exact attention


def test_a_plan_slower_than_the_fastest_exact_attention_is_not_made(
    fake: FakeClock, planned_model: LoadedModel, pictures: list[NDArray[np.float32]]
) -> None:
    subject = TorchSubject(planned_model, 112, 112)
    tried = SearchRange(samplers=("grid",), landmarks=(8,), iterations=(3,), corrections=False, focal=())
    wish = Wish(0.2, tried=tried, whole_blocks=True)
    found = make_best_plan(Planner(subject, wish, CpuCost(subject.layout, None), pictures[:1], pictures[1:2]))
    assert len(found.plan.blocks) == 3
    assert found.point.cost == 6.0
    assert found.exact_cost == 18.0
    fake.seconds["fused"] = 1.9
    found = make_best_plan(Planner(subject, wish, CpuCost(subject.layout, None), pictures[:1], pictures[1:2]))
    assert found.plan.replaced_blocks == []
    assert any("exact attention is faster" in note and EXACT_FORMS[2] in note for note in found.notes)
