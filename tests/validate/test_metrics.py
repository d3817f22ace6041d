"""The metrics, against libraries that have the same one and against constructed errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import paired_cosine_distances

from fna.validate.metrics import cosine, measure


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


def test_a_planted_error_is_found_in_its_image() -> None:
    reference, _ = tokens()
    actual = reference.copy()
    actual[2, 5] *= -1
    error = measure("tokens", reference, actual, prefix_tokens=1)
    assert error.worst_item == 2
    assert error.cosine_min == pytest.approx(-1)


def test_other_outputs_are_compared_item_by_item() -> None:
    reference = torch.rand(2, 1, 4, 4).numpy()
    error = measure("map", reference, reference * 2)
    assert error.cosine_min == pytest.approx(1)
    assert error.relative_l2 == pytest.approx(1)
    assert error.cosine_patches is None


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
