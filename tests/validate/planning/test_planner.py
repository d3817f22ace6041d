"""Planning from images to a verified plan, for PyTorch models and for ONNX files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fna.arithmetic import block_products
from fna.engines.targets import find_target
from fna.errors import InvalidArgumentError
from fna.export.sources.loading import LoadedModel
from fna.plan import BlockPlan, Plan, uniform_plan
from fna.validate.planning import best_plan
from fna.validate.planning.best_plan import make_best_plan
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate, SearchRange, usual_candidate
from fna.validate.planning.cost import ProductCost, TimeCost, device_of
from fna.validate.planning.fidelity import Fidelity
from fna.validate.planning.goals import TaskGoal
from fna.validate.planning.onnx_subject import OnnxSubject
from fna.validate.planning.planner import FEW_TOKENS, PickedHeads, Planner
from fna.validate.planning.result import Planned
from fna.validate.planning.subject import Layout, Subject, TorchSubject
from fna.validate.planning.uniform import run_uniform_settings
from fna.validate.planning.wish import Wish

Pictures = list[NDArray[np.float32]]
TRIED = SearchRange(samplers=("lattice", "norm-grid"), landmarks=(4, 8, 16), iterations=(3, 6), shared=False, focal=())


NEAR = FocalCandidate(4, ((1, 0), (2, 1)), 2)
FAR = FocalCandidate(4, ((1, 0), (2, 1), (4, 2)), 2)
WIDE = Layout("m", 12, {}, 1370, 6, 64, 384, 1, (37, 37), (518, 518))
MIXED = replace(TRIED, focal=(NEAR, FAR))


def planner_for(subject: Subject, pictures: Pictures, **wish: Any) -> Planner:
    asked = Wish(**{"min_cosine": 0.98, "tried": TRIED, **wish})
    return Planner(subject, asked, ProductCost(subject.layout), pictures[:3], pictures[3:])


@pytest.fixture(scope="module")
def subject(planned_model: LoadedModel) -> TorchSubject:
    return TorchSubject(planned_model, 112, 112)


@pytest.fixture(scope="module")
def planned(subject: TorchSubject, pictures: Pictures) -> Planned:
    return make_best_plan(planner_for(subject, pictures))


def test_the_plan_saves_products_and_keeps_what_was_asked_for(
    planned: Planned, subject: TorchSubject, pictures: Pictures
) -> None:
    layout = subject.layout
    assert planned.plan.blocks
    assert planned.plan.model == "tests:planned"
    assert planned.plan.resolution == (112, 112)
    cost = sum(block_products(planned.plan, n, 65, 4, 16) for n in range(3))
    assert planned.point.cost == pytest.approx(cost)
    assert planned.point.saved == pytest.approx(1 - cost / planned.exact_cost)
    assert planned.point.measured is not None
    again = planner_for(subject, pictures).run(planned.plan, pictures[3:])
    assert again.mean == pytest.approx(planned.point.measured.mean, abs=1e-6)
    assert planned.reached == (again.mean >= 0.98)
    assert all(block.iterations is not None for block in planned.plan.blocks)
    assert layout.patches == (8, 8)


def test_asking_for_less_fidelity_gives_a_cheaper_plan(
    planned: Planned, subject: TorchSubject, pictures: Pictures
) -> None:
    less = make_best_plan(planner_for(subject, pictures, min_cosine=0.93))
    assert less.point.cost < planned.point.cost


def test_a_task_metric_is_kept_instead_of_a_cosine(subject: TorchSubject, pictures: Pictures) -> None:
    found = {}
    for minimum in (0.6, 0.8):
        goal = TaskGoal("segmentation:patch agreement", minimum)
        planner = planner_for(subject, pictures, min_cosine=None, goals=(goal,), whole_blocks=False)
        found[minimum] = make_best_plan(planner)
        assert planner.run(found[minimum].plan, pictures[:3]).tasks[goal.name] >= minimum
        measured = found[minimum].point.measured
        assert measured is not None
        assert found[minimum].reached == (measured.tasks[goal.name] >= minimum)
    assert found[0.6].point.cost < found[0.8].point.cost


def test_a_task_that_the_model_has_not_is_refused_before_anything_is_measured(
    subject: TorchSubject, pictures: Pictures
) -> None:
    with pytest.raises(InvalidArgumentError, match="saliency:IoU cannot be measured on this model"):
        planner_for(subject, pictures, goals=(TaskGoal("saliency:IoU", 0.9),))


def test_a_model_that_hands_out_patches_alone_has_no_class_token_to_leave_out(
    planned_model: LoadedModel, pictures: Pictures
) -> None:
    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = planned_model.module

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            first, *_ = self.model(pixels)
            return (first[:, 1:],)

    alone = replace(planned_model, module=Patches(), output_names=("tokens",), token_outputs=("tokens",))
    whole, bare = (TorchSubject(model, 112, 112) for model in (planned_model, alone))
    assert bare.kinds(bare.run(pictures[0], None)).prefix_of("tokens") == 0
    plan = Plan(num_blocks=3, blocks=(BlockPlan(block=1, landmarks=8),), prefix_tokens=1)
    expected, found = (planner_for(subject, pictures).run(plan, pictures[3:]) for subject in (whole, bare))
    assert (found.mean, found.p5) == pytest.approx((expected.mean, expected.p5), abs=1e-6)
    assert (expected.first is None, found.first) == (False, None)


def test_settings_alike_in_all_blocks_are_run_to_compare_with(subject: TorchSubject, pictures: Pictures) -> None:
    class Free(ProductCost):
        """FNA at 65 tokens would be dearer than exact attention, and left out."""

        def block(self, candidate: Candidate, heads: int, kernel: int) -> float:
            return 0.0

    planner = planner_for(subject, pictures)
    assert run_uniform_settings(planner) == ()
    planner.cost = Free(subject.layout)
    uniform = run_uniform_settings(planner)
    assert {point.layers for point in uniform} == {"1-2", "all"}
    assert {(point.sampler, point.method) for point in uniform} == {
        ("grid", "weighted"), ("norm-grid", "weighted"), ("grid", "published"),
    }  # fmt: skip
    for point in uniform:
        blocks = tuple(BlockPlan(block=n, landmarks=point.landmarks, sampler=point.sampler)
                       for n in ((1, 2) if point.layers == "1-2" else range(3)))  # fmt: skip
        plan = Plan(num_blocks=3, blocks=blocks, prefix_tokens=1, method=point.method)
        assert planner.run(plan, pictures[3:]).mean == pytest.approx(point.measured.mean, abs=1e-6)


def test_whole_blocks_have_no_single_heads(subject: TorchSubject, pictures: Pictures) -> None:
    found = make_best_plan(planner_for(subject, pictures, whole_blocks=True, min_cosine=0.9))
    assert found.plan.blocks
    assert all(entry.heads is None for entry in found.plan.blocks)


def test_a_block_is_exact_or_fna_or_focal_whatever_costs_least(subject: TorchSubject, pictures: Pictures) -> None:
    mixed = make_best_plan(planner_for(subject, pictures, tried=MIXED, min_cosine=0.95))
    alone = make_best_plan(planner_for(subject, pictures, whole_blocks=True, min_cosine=0.95))
    assert mixed.plan.focal
    assert {(entry.tile, entry.levels) for entry in mixed.plan.focal} <= {(c.tile, c.levels) for c in (NEAR, FAR)}
    assert len({entry.seed for entry in mixed.plan.focal}) == len(mixed.plan.focal)
    assert mixed.point.cost < alone.point.cost
    cost = sum(block_products(mixed.plan, n, 65, 4, 16) for n in range(3))
    assert mixed.point.cost == pytest.approx(cost)


def test_heads_of_a_block_are_split_only_where_a_split_has_a_time(subject: TorchSubject, pictures: Pictures) -> None:
    products = planner_for(subject, pictures)
    assert products.whole_blocks
    assert not planner_for(subject, pictures, whole_blocks=False).whole_blocks
    clock = TimeCost(subject.layout, device_of(find_target("jetson-agx-orin")))
    assert not Planner(subject, Wish(tried=TRIED), clock, pictures[:2], pictures[3:]).whole_blocks


def test_a_plan_that_falls_short_on_images_held_out_gives_way_to_a_more_faithful_one(
    subject: TorchSubject, pictures: Pictures
) -> None:
    class Lossier(Planner):
        """Images held out lose three times what those planned on lose."""

        def run(self, plan: Plan, images: Any) -> Fidelity:
            found = super().run(plan, images)
            return found.model_copy(update={"mean": 1 - 3 * found.loss}) if images is self.held_out else found

    kept, wish = [], Wish(0.95, tried=TRIED, whole_blocks=False)
    for kind in (Planner, Lossier):
        planner = kind(subject, wish, ProductCost(subject.layout), pictures[:3], pictures[3:])
        found = make_best_plan(planner)
        assert found.reached
        kept.append(found)
    assert kept[1].point.cost > kept[0].point.cost
    assert "to come nearer to what was asked for" in kept[1].notes[0]


class Harsh(Planner):
    """The first plans on images held out are said to keep too little, and the others enough."""

    refused, said, verified = 0, 0.0, 0

    def run(self, plan: Plan, images: Any) -> Fidelity:
        fidelity = super().run(plan, images)
        if images is not self.held_out:
            return fidelity
        self.verified += 1
        return fidelity.model_copy(update={"mean": self.said if self.verified <= self.refused else 0.95})


@pytest.mark.parametrize("refused", [1, 3])
def test_of_the_plans_run_on_images_held_out_the_cheapest_that_keeps_what_was_asked_for_is_written(
    refused: int, subject: TorchSubject, pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_plan, "SHOWN", (0.99, 0.8, 0.5))
    planner = Harsh(subject, Wish(0.9, tried=TRIED), ProductCost(subject.layout), pictures[:3], pictures[3:])
    planner.refused, planner.said = refused, 0.89
    found = make_best_plan(planner)
    keeping = [point for point in found.front if point.plan.replaced_blocks and point.measured.mean >= 0.9]
    assert found.reached
    assert found.point.cost == min(point.cost for point in keeping)
    assert len(keeping) < len(found.front)


def test_a_correction_is_left_out_where_it_costs_more_than_it_keeps(subject: TorchSubject, pictures: Pictures) -> None:
    class PricedCorrections(ProductCost):
        price = 0.0

        def block(self, candidate: AnyCandidate, heads: int, kernel: int) -> float:
            return super().block(candidate, heads, 0) + (self.price if kernel else 0.0)

    planner = planner_for(subject, pictures, min_cosine=0.9)
    planner.cost = PricedCorrections(subject.layout)
    free = make_best_plan(planner).plan.blocks
    planner.cost.price = planner.cost.exact(subject.layout.heads)
    dear = make_best_plan(planner).plan.blocks
    assert free
    assert dear
    assert all(block.correction for block in free)
    assert not any(block.correction for block in dear)


def test_plans_without_corrections_have_none(subject: TorchSubject, pictures: Pictures) -> None:
    tried = SearchRange(samplers=("grid",), landmarks=(8, 16), iterations=(6,), corrections=False, focal=())
    found = make_best_plan(planner_for(subject, pictures, tried=tried, min_cosine=0.9))
    assert found.plan.blocks
    assert all(entry.correction is None for entry in found.plan.blocks)


def test_a_fidelity_that_cannot_be_kept_says_the_best_reachable(subject: TorchSubject, pictures: Pictures) -> None:
    with pytest.raises(InvalidArgumentError, match=r"best reachable is 0\.\d+ .* FNA blocks \d of 3"):
        make_best_plan(planner_for(subject, pictures, min_cosine=0.99999999))


def test_where_fna_does_not_pay_the_plan_is_exact_and_says_where_it_would(
    subject: TorchSubject, pictures: Pictures
) -> None:
    cost = TimeCost(subject.layout, device_of(find_target("jetson-agx-orin")))
    found = make_best_plan(Planner(subject, Wish(tried=TRIED), cost, pictures[:2], pictures[3:]))
    assert not found.plan.blocks
    assert any("exact attention is faster: break-even is at about" in note for note in found.notes)


def test_an_interrupted_run_goes_on_where_it_was(subject: TorchSubject, pictures: Pictures, tmp_path: Path) -> None:
    class Interrupted:
        layout, preprocessing = subject.layout, subject.preprocessing
        looked, fails_at = 0, 2

        def look(self, pixels: NDArray[np.float32], visit: Callable[[Any], None]) -> None:
            self.looked += 1
            if self.looked == self.fails_at:
                raise KeyboardInterrupt
            subject.look(pixels, visit)

        run, tokens, kinds, fingerprint = subject.run, subject.tokens, subject.kinds, subject.fingerprint

    first, second = Interrupted(), Interrupted()
    second.fails_at = 0
    for interrupted in (first, second):
        planner = planner_for(interrupted, pictures)
        planner.cache = tmp_path
        if interrupted is first:
            with pytest.raises(KeyboardInterrupt):
                planner.measure()
        else:
            found = planner.measure()
    assert second.looked == 2
    fresh = planner_for(subject, pictures).measure()
    assert found.moments.keys() == fresh.moments.keys()
    for key, moments in fresh.moments.items():
        torch.testing.assert_close(found.moments[key].gram, moments.gram)


def test_the_cheaper_core_is_tried_where_it_is_usual_and_comes_back_from_the_cache(
    subject: TorchSubject, pictures: Pictures, tmp_path: Path
) -> None:
    (candidate,) = SearchRange(samplers=("grid",), landmarks=(128,), iterations=(6,), focal=()).candidates(WIDE)
    assert candidate == usual_candidate(128, "grid")
    assert isinstance(candidate, Candidate)
    assert candidate.chebyshev is not None
    tried = replace(candidate, landmarks=16)
    planner = planner_for(subject, pictures)
    planner.cache = tmp_path
    made = [planner.cached("step", lambda: planner._measure_image(pictures[0], {n: [tried] for n in range(3)}))]
    made.append(planner.cached("step", lambda: pytest.fail("made a second time")))
    assert made[0].moments.keys() == made[1].moments.keys() == {(number, tried) for number in range(3)}
    fits = planner.fits(made[1])
    plan = planner.make_plan([PickedHeads(tried, (0, 1, 2, 3)), PickedHeads(), PickedHeads()], fits)
    assert plan.chebyshev_of(plan.blocks[0]) == tried.chebyshev
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_what_was_measured_with_other_gradients_is_measured_anew(
    subject: TorchSubject, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = planner_for(subject, pictures)
    planner.cache = tmp_path
    assert planner.cached("step", lambda: 1) == 1
    monkeypatch.setattr("fna.validate.planning.subject.PROBES", 4)
    assert planner.cached("step", lambda: 2) == 2


def test_a_model_that_was_trained_further_under_its_name_is_measured_anew(
    planned_model: LoadedModel, planned_file: Path, pictures: Pictures, tmp_path: Path
) -> None:
    further = copy.deepcopy(planned_model)
    next(further.module.parameters()).data.flatten()[-1] += 1e-3
    found = []
    for number, model in enumerate((planned_model, planned_model, further)):
        planner = planner_for(TorchSubject(model, 112, 112), pictures)
        planner.cache = tmp_path / "cache"
        found.append(planner.cached("step", lambda number=number: number))
    assert found == [0, 0, 2]
    file = tmp_path / planned_file.name
    file.write_bytes(planned_file.read_bytes())
    subject = OnnxSubject(file, None)
    before = subject.fingerprint()
    file.write_bytes(file.read_bytes() + b"\x72\x00")  # metadata with nothing in it
    assert subject.fingerprint() != before


def test_a_plan_that_was_run_is_not_run_again(subject: TorchSubject, pictures: Pictures, tmp_path: Path) -> None:
    planner = planner_for(subject, pictures)
    planner.cache = tmp_path
    plan = uniform_plan(3, layers="1", landmarks=8, prefix_tokens=1)
    found = planner.run(plan, pictures[3:4])
    planner._run = lambda *_: pytest.fail("run a second time")  # type: ignore[method-assign, assignment]
    assert planner.run(plan, pictures[3:4]) == found
    planner._run = lambda *_: found.model_copy(update={"mean": 0.5})  # type: ignore[method-assign]
    assert planner.run(plan, pictures[2:3]).mean == 0.5
    assert planner.run(plan.only([]), pictures[3:4]).mean == 0.5


def test_an_onnx_file_is_planned_through_its_attention_blocks(planned_file: Path, pictures: Pictures) -> None:
    subject = OnnxSubject(planned_file, None)
    layout = subject.layout
    assert (layout.tokens, layout.heads, layout.head_size, layout.prefix_tokens, layout.patches) == (
        65,
        4,
        16,
        1,
        (8, 8),
    )
    found = make_best_plan(planner_for(subject, pictures, min_cosine=0.93))
    assert found.plan.blocks
    assert found.plan.model == "dense.onnx"
    assert found.point.measured is not None
    assert found.point.measured.mean > 0.9


def test_an_onnx_file_is_planned_with_focal_blocks(planned_file: Path, pictures: Pictures) -> None:
    subject = OnnxSubject(planned_file, None)
    wish = Wish(0.9, tried=replace(TRIED, focal=(NEAR,)))
    planner = Planner(subject, wish, ProductCost(subject.layout), pictures[:1], pictures[3:])
    fits = planner.with_dependence(planner.fits(planner.measure()))
    scales = planner.scales(fits)
    assert scales.keys() == {(block, kind) for block in range(3) for kind in ("FNA", "focal")}
    for block in range(3):
        alone = planner.make_plan(
            [PickedHeads(NEAR, (0, 1, 2, 3)) if n == block else PickedHeads() for n in range(3)], fits
        )
        assert [entry.block for entry in alone.focal] == [block]
        promised = float(fits[block, NEAR].losses.sum()) * scales[block, "focal"]
        assert planner.run(alone, planner.images).loss == pytest.approx(promised, rel=1e-3)


def test_an_onnx_file_shows_what_its_pytorch_model_shows(
    planned_file: Path, subject: TorchSubject, pictures: Pictures
) -> None:
    seen: list[list[Any]] = [[], []]
    for views, source in zip(seen, (subject, OnnxSubject(planned_file, None)), strict=True):
        source.look(pictures[0], views.append)
    for ours, theirs in zip(*seen, strict=True):
        for name in ("query", "key", "value", "exact", "hidden"):
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-3, atol=1e-4)
    file = OnnxSubject(planned_file, None)
    theirs, ours = file.tokens(file.run(pictures[0], None)), subject.tokens(subject.run(pictures[0], None))
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("tokens", "told", "threads"), [(1370, None, 1), (FEW_TOKENS + 1, None, 2), (1370, "2", 2)])
def test_few_tokens_are_planned_for_in_one_thread_unless_told(
    tokens: int, told: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    monkeypatch.setattr(best_plan, "_plan", lambda _planner: torch.get_num_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    planner = SimpleNamespace(layout=SimpleNamespace(tokens=tokens))
    assert make_best_plan(planner) == threads  # type: ignore[comparison-overlap, arg-type]
    torch.set_num_threads(before)
