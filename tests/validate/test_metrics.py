"""The metrics, against libraries that have the same one and against constructed errors."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as scipy_cosine_distance
from sklearn.metrics.pairwise import paired_cosine_distances

from fna.cli import main
from fna.validate.metrics import JUDGED, METRICS, RELATIVE_FLOOR, ErrorMeter, Metric, cosine, measure


def tokens() -> tuple[np.ndarray, np.ndarray]:
    reference = torch.randn(3, 10, 8).numpy()
    return reference, reference + 0.1 * torch.randn(3, 10, 8).numpy()


def test_cosine_equals_scikit_learns() -> None:
    left, right = tokens()
    expected = 1 - paired_cosine_distances(left.reshape(-1, 8), right.reshape(-1, 8))
    np.testing.assert_allclose(cosine(left, right).ravel(), expected, atol=1e-6)


def test_token_outputs_are_compared_token_by_token() -> None:
    reference, actual = tokens()
    error = measure("tokens", reference, actual, prefix_tokens=1)
    each = torch.nn.functional.cosine_similarity(torch.from_numpy(reference), torch.from_numpy(actual), dim=-1)
    assert error.cosine_min == pytest.approx(each.min().item(), abs=1e-6)
    assert error.cosine_mean == pytest.approx(each.mean().item(), abs=1e-6)
    assert error.cosine_p5 == pytest.approx(np.percentile(each.numpy(), 5), abs=1e-6)
    assert error.cosine_first_token == pytest.approx(each[:, 0].mean().item(), abs=1e-6)
    assert error.cosine_patches == pytest.approx(each[:, 1:].mean().item(), abs=1e-6)
    assert error.max_abs == pytest.approx(np.abs(reference - actual).max())
    assert error.relative_l2 == pytest.approx(np.linalg.norm(reference - actual) / np.linalg.norm(reference), rel=1e-6)


def test_sqnr_is_pytorchs_mean_square_in_decibels() -> None:
    reference, actual = tokens()
    noise = torch.nn.functional.mse_loss(torch.from_numpy(actual), torch.from_numpy(reference)).item()
    expected = 10 * np.log10(np.square(reference).mean() / noise)
    assert measure("tokens", reference, actual).sqnr_db == pytest.approx(expected, abs=1e-3)
    assert measure("tokens", reference, reference).sqnr_db is None


def test_the_largest_relative_error_is_numpys_where_no_value_is_near_zero() -> None:
    reference = np.linspace(1, 2, 40).reshape(2, 20)
    actual = reference * (1 + 0.1 * torch.rand(2, 20).numpy())
    error = measure("x", reference, actual)
    with pytest.raises(AssertionError, match="Max relative difference") as caught:
        np.testing.assert_allclose(actual, reference, rtol=1e-9)
    line = next(line for line in str(caught.value).splitlines() if "Max relative difference" in line)
    assert error.max_rel == pytest.approx(float(line.split()[-1]), rel=1e-6)


def test_values_near_zero_do_not_blow_the_relative_error_up() -> None:
    reference = np.array([[0.0, 1.0, 1.0, 1.0]])
    error = measure("x", reference, reference + np.array([[1e-3, 0, 0, 0]]))
    assert error.max_rel == pytest.approx(1e-3 / (RELATIVE_FLOOR * np.sqrt(0.75)))


def test_every_token_position_has_its_own_errors() -> None:
    reference, actual = tokens()
    each = measure("tokens", reference, actual, prefix_tokens=1).tokens
    assert each is not None
    for position in range(10):
        alone = measure(
            "one", reference[:, position : position + 1], actual[:, position : position + 1], prefix_tokens=0
        )
        assert each.relative_l2[position] == pytest.approx(alone.relative_l2, rel=1e-6)
        assert each.max_abs[position] == pytest.approx(alone.max_abs, rel=1e-6)
        assert each.sqnr_db[position] == pytest.approx(alone.sqnr_db, abs=1e-3)
        distances = [scipy_cosine_distance(reference[item, position], actual[item, position]) for item in range(3)]
        assert each.cosine_min[position] == pytest.approx(1 - max(distances), abs=1e-6)
        assert each.cosine_mean[position] == pytest.approx(1 - np.mean(distances), abs=1e-6)


def test_images_one_by_one_give_what_all_at_once_give() -> None:
    reference, actual = tokens()
    meter = ErrorMeter("tokens", 1)
    for one, other in zip(reference, actual, strict=True):
        meter.add(one[None], other[None])
    assert meter.result() == measure("tokens", reference, actual, prefix_tokens=1)


def test_a_planted_error_is_found_in_its_image_and_token() -> None:
    reference, _ = tokens()
    actual = reference.copy()
    actual[2, 5] *= -1
    error = measure("tokens", reference, actual, prefix_tokens=1)
    assert (error.worst_item, error.worst_token) == (2, 5)
    assert error.cosine_min == pytest.approx(-1)


def test_other_outputs_are_compared_item_by_item() -> None:
    reference = torch.rand(2, 1, 4, 4).numpy()
    error = measure("map", reference, reference * 2)
    assert error.cosine_min == pytest.approx(1)
    assert error.relative_l2 == pytest.approx(1)
    assert error.cosine_patches is None
    assert error.tokens is None


def test_values_that_are_not_finite_are_counted() -> None:
    reference, actual = tokens()
    actual[0, 0, 0], actual[1, 1, 1] = np.nan, np.inf
    assert measure("tokens", reference, actual, prefix_tokens=1).not_finite == 2


def test_zero_vectors_agree_with_each_other_only() -> None:
    zero, one = np.zeros((1, 4)), np.ones((1, 4))
    assert cosine(zero, zero).tolist() == [1.0]
    assert cosine(zero, one).tolist() == [0.0]


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"output x .*\[2, 3\].*\[2, 4\]"):
        measure("x", np.zeros((2, 4)), np.zeros((2, 3)))


def test_a_further_metric_is_one_record_and_stands_in_json_page_and_terminal(
    tiny, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = Metric(
        "cosine_median", "median of cosines", "cos med", "the middle cosine", ".3f", "higher",
        lambda distances: np.median(distances.cosine, axis=0), by_token=True, by_block=True,
    )  # fmt: skip
    monkeypatch.setitem(METRICS, toy.name, toy)
    report = tmp_path / "report.html"
    arguments = [
        "validate",
        "fp32.onnx",
        "--images",
        "images",
        "--report",
        str(report),
        "--output",
        str(tmp_path / "files"),
    ]
    assert main(arguments) == 0
    validation = json.loads(report.with_suffix(".json").read_text())["validation"]
    error = validation["steps"][0]["errors"][0]
    assert error["cosine_p5"] < error["cosine_median"] <= 1
    assert len(error["tokens"]["cosine_median"]) == len(error["tokens"]["cosine_mean"]) == 65
    assert all(0 < block["cosine_median"] <= 1 for block in validation["blocks"])
    page = report.read_text()
    assert '<th title="the middle cosine">median of cosines</th>' in page
    shown = re.search(r'data-path="validation.steps.0.errors.0.cosine_median" data-format=".3f">([^<]*)<', page)
    assert shown is not None
    assert shown[1] == f"{error['cosine_median']:.3f}"
    assert "cos med" in capsys.readouterr().out


def test_a_metric_that_is_not_a_number_is_null_in_the_json_and_out_of_tolerance() -> None:
    reference, actual = tokens()
    actual[0, 0, 0] = np.nan
    error = measure("tokens", reference, actual, prefix_tokens=1)
    data = json.loads(error.model_dump_json())
    assert data["relative_l2"] is None
    assert data["tokens"]["cosine_mean"][0] is None
    assert math.isnan(error.judged)
    assert not JUDGED.is_within(error.judged, 1e9)


def test_better_may_be_higher() -> None:
    assert METRICS["cosine_mean"].is_within(0.99, 0.98)
    assert not METRICS["cosine_mean"].is_within(0.97, 0.98)
    assert METRICS["relative_l2"].is_within(1e-3, 1e-3)
