"""Predicted times: what they depend on, where FNA starts to pay, and what a measurement changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fna.arithmetic import block_products
from fna.engines.targets import find_target
from fna.errors import InputFileError
from fna.plan import Method, uniform_plan
from fna.validate.planning.candidates import Candidate, usual_candidate
from fna.validate.planning.cost import ProductCost, TimeCost, device_of, find_break_even, read_calibration
from fna.validate.planning.counted import NystromSetting, counted_seconds
from fna.validate.planning.subject import Layout

LAYOUT = Layout("m", 12, {}, 1370, 6, 64, 384, 1, (37, 37), (518, 518))
ORIN = device_of(find_target("jetson-agx-orin"))
GRID = Candidate(64, "grid", False, 6)


@pytest.mark.parametrize("cost", [ProductCost(LAYOUT), TimeCost(LAYOUT, ORIN)], ids=["products", "time"])
def test_more_exact_heads_and_more_landmarks_cost_more(cost: ProductCost | TimeCost) -> None:
    assert 0 < cost.exact(1) < cost.exact(6)
    assert cost.block(GRID, 6, 0) < cost.block(replace(GRID, landmarks=256), 6, 0)
    assert cost.block(GRID, 6, 0) < cost.block(GRID, 6, 5)


@pytest.mark.parametrize("method", ["weighted", "published"])
def test_a_uniform_setting_costs_what_its_plan_computes(method: Method) -> None:
    candidate = usual_candidate(128, "grid", method)
    plan = uniform_plan(12, layers="6", landmarks=128, method=method, prefix_tokens=1)
    assert ProductCost(LAYOUT).block(candidate, 6, 0) == block_products(plan, 6, 1370, 6, 64)
    core = plan.chebyshev_of(plan.blocks[0])
    seconds = counted_seconds(ORIN, 1370, 6, 64, NystromSetting(128, plan.iterations, core))
    assert TimeCost(LAYOUT, ORIN).block(candidate, 6, 0) == pytest.approx(seconds)


def test_a_faster_device_is_predicted_to_be_faster() -> None:
    nano = device_of(find_target("jetson-orin-nano"))
    assert TimeCost(LAYOUT, ORIN).exact(6) < TimeCost(LAYOUT, nano).exact(6)


def test_break_even_is_where_the_prediction_changes_sides() -> None:
    tokens = find_break_even(LAYOUT, ORIN)
    for count, pays in ((tokens - 1, False), (tokens, True)):
        cost = TimeCost(replace(LAYOUT, tokens=count), ORIN)
        assert (cost.nystrom(GRID, 6) < cost.exact(6)) is pays


@pytest.mark.parametrize("landmarks", [64, 128])
def test_a_measurement_calibrates_both_kinds_of_attention(tmp_path: Path, landmarks: int) -> None:
    def row(tokens: int) -> dict[str, object]:
        cost = TimeCost(replace(LAYOUT, tokens=tokens), ORIN)
        rest, exact, fna = 1e-6 * tokens, 3 * cost.exact(6), 5 * cost.nystrom(usual_candidate(landmarks, "grid"), 6)
        times = {"dense": rest + 12 * exact, "fna": rest + 4 * exact + 8 * fna}
        return {"tokens": tokens, "landmarks": landmarks, "blocks": 8} | {
            k: {"median": v * 1e3} for k, v in times.items()
        }

    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"machine": {}, "rows": [row(1370), row(5330)]}))
    found = read_calibration(path, LAYOUT, ORIN)
    assert found.exact == pytest.approx(3, rel=1e-3)
    assert found.nystrom == pytest.approx(5, rel=1e-3)
    assert found.rest == pytest.approx(1e-6 * 1370, rel=1e-3)
    assert (found.times, found.worst) == (4, pytest.approx(0, abs=1e-3))
    assert TimeCost(LAYOUT, ORIN, found).exact(6) == pytest.approx(3 * TimeCost(LAYOUT, ORIN).exact(6), rel=1e-3)


def test_what_a_calibration_cannot_explain_is_said(tmp_path: Path) -> None:
    times = [(1370, 10.0, 8.0), (2500, 40.0, 15.0), (5330, 90.0, 35.0)]
    rows = [
        {"tokens": n, "landmarks": 64, "blocks": 12, "dense": {"median": dense}, "fna": {"median": fna}}
        for n, dense, fna in times
    ]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"rows": rows}))
    found = read_calibration(path, LAYOUT, ORIN)
    at = {n: TimeCost(replace(LAYOUT, tokens=n), ORIN, replace(found, rest=found.rest * n / 1370)) for n, _, _ in times}
    errors = [
        abs((at[n].calibration.rest + 12 * part) * 1e3 / measured - 1)
        for n, dense, fna in times
        for part, measured in ((at[n].exact(6), dense), (at[n].nystrom(GRID, 6), fna))
    ]
    assert found.worst == pytest.approx(max(errors), rel=1e-6)
    assert found.worst > 0.05
    assert f"within {found.worst:.1%} of each" in found.describe()


@pytest.mark.parametrize(
    ("text", "said"), [("{}", "rows"), ('{"rows": []}', "no rows"), ('{"rows": [{"tokens": 5}]}', "rows.0")]
)
def test_a_file_that_is_no_measurement_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InputFileError, match=said):
        read_calibration(path, LAYOUT, ORIN)
