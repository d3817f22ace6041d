"""Planning from images to a verified plan, for PyTorch models and for ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fna.arithmetic import block_products
from fna.engines.targets import find_target
from fna.errors import InvalidArgumentError
from fna.export.sources import LoadedModel
from fna.validate.planning.cost import ProductCost, TimeCost, device_of
from fna.validate.planning.measure import Range
from fna.validate.planning.onnx_subject import OnnxSubject
from fna.validate.planning.planner import Planned, Planner, Wish, make_best_plan
from fna.validate.planning.subject import Subject, TorchSubject

Pictures = list[NDArray[np.float32]]
TRIED = Range(samplers=("lattice", "norm-grid"), landmarks=(4, 8, 16), iterations=(3, 6), shared=False)


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
    cost = sum(block_products(planned.plan.find(n), planned.plan, 65, 4, 16) for n in range(3))
    assert planned.point.cost == pytest.approx(cost)
    assert planned.point.saved == pytest.approx(1 - cost / planned.exact_cost)
    assert planned.point.measured is not None
    again = planner_for(subject, pictures).run(planned.plan, pictures[3:])
    assert again.mean == pytest.approx(planned.point.measured.mean, abs=1e-6)
    assert planned.reached == (again.mean >= 0.98)
    assert layout.patches == (8, 8)


def test_asking_for_less_fidelity_gives_a_cheaper_plan(
    planned: Planned, subject: TorchSubject, pictures: Pictures
) -> None:
    less = make_best_plan(planner_for(subject, pictures, min_cosine=0.93))
    assert less.point.cost < planned.point.cost


def test_whole_blocks_have_no_single_heads(subject: TorchSubject, pictures: Pictures) -> None:
    found = make_best_plan(planner_for(subject, pictures, whole_blocks=True, min_cosine=0.9))
    assert found.plan.blocks
    assert all(entry.heads is None for entry in found.plan.blocks)


def test_plans_without_corrections_have_none(subject: TorchSubject, pictures: Pictures) -> None:
    tried = Range(samplers=("grid",), landmarks=(8, 16), iterations=(6,), corrections=False)
    found = make_best_plan(planner_for(subject, pictures, tried=tried, min_cosine=0.9))
    assert found.plan.blocks
    assert all(entry.correction is None for entry in found.plan.blocks)


def test_a_fidelity_that_cannot_be_kept_says_the_best_reachable(subject: TorchSubject, pictures: Pictures) -> None:
    with pytest.raises(InvalidArgumentError, match=r"best reachable is 0\.\d+ .* in block \d"):
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

        run, tokens, kinds = subject.run, subject.tokens, subject.kinds

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
