"""Choosing landmarks, and their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fna.errors import FnaError, InvalidArgumentError, InvalidDtypeError, InvalidLandmarksError, InvalidShapeError
from fna.samplers import landmark_bias, sampler_names, select_landmarks
from fna.samplers.common.roles import norm_grid_count
from fna.samplers.common.spacing import middles_of_stretches
from fna.samplers.fps import farthest_points_reference
from fna.samplers.grid import grid_landmarks
from fna.samplers.lattice import lattice_landmarks
from fna.samplers.random import random_landmarks

few = settings(max_examples=40, deadline=None)
sizes = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))


@pytest.mark.parametrize("method", sampler_names())
@few
@given(size=sizes, seed=st.integers(0, 1000))
def test_landmarks_are_distinct_token_indices(method: Any, size: tuple[int, int, int], seed: int) -> None:
    tokens, count, prefix = max(size[:2]), min(size[:2]), size[2]
    prefix = min(prefix, tokens)
    torch.manual_seed(seed)
    patches = (1, tokens - prefix)
    chosen = select_landmarks(torch.randn(2, tokens, 4), count, method=method, prefix_tokens=prefix, patches=patches)
    assert chosen.shape == (2, count)
    assert chosen.dtype == torch.int32
    for row in chosen.tolist():
        assert len(set(row)) == count
        assert 0 <= min(row) <= max(row) < tokens
        if method != "fps":
            assert row[: min(prefix, count)] == list(range(min(prefix, count)))


@pytest.mark.parametrize("method", sampler_names())
@few
@given(data=st.data(), seed=st.integers(0, 1000))
def test_guaranteed_tokens_come_first_and_excluded_ones_never(method: Any, data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    guaranteed = data.draw(st.sets(st.integers(0, 29), max_size=6))
    excluded = data.draw(st.sets(st.integers(0, 29), max_size=12)) - guaranteed
    masks = [torch.tensor([index in chosen for index in range(30)]) for chosen in (guaranteed, excluded)]
    chosen = select_landmarks(torch.randn(2, 30, 4), 12, method=method, guarantee=masks[0], exclude=masks[1])
    for row in chosen.tolist():
        assert len(set(row)) == 12
        assert not set(row) & excluded
        assert guaranteed <= set(row)
        if method == "fps":
            assert row[: len(guaranteed)] == sorted(guaranteed)


def test_masks_may_differ_between_batch_items() -> None:
    features = torch.randn(2, 20, 4)
    guarantee = torch.zeros(2, 20, dtype=torch.bool)
    guarantee[0, [7, 3]] = True
    guarantee[1, [9]] = True
    together = select_landmarks(features, 6, guarantee=guarantee)
    for item in range(2):
        alone = select_landmarks(features[item : item + 1], 6, guarantee=guarantee[item])
        assert together[item].tolist() == alone[0].tolist()


def test_fps_takes_the_farthest_token_next_and_the_lowest_on_ties() -> None:
    points = torch.tensor([[0.0], [10.0], [4.0], [-10.0], [10.0]])[None]
    assert select_landmarks(points, 4, method="fps")[0].tolist() == [0, 1, 3, 2]


def test_fps_of_equal_tokens_is_their_order() -> None:
    assert select_landmarks(torch.ones(1, 9, 3), 5, method="fps")[0].tolist() == [0, 1, 2, 3, 4]


def test_fps_starts_at_the_lowest_eligible_token() -> None:
    eligible = torch.tensor([[False, False, True, True, True]])
    assert farthest_points_reference(torch.randn(1, 5, 3), 1, eligible)[0].tolist() == [2]


def test_grid_spaces_patches_from_first_to_last() -> None:
    assert grid_landmarks(1370, 6, 1)[0].tolist() == [0, 1, 343, 685, 1027, 1369]
    assert grid_landmarks(10, 1, 0)[0].tolist() == [5]
    assert grid_landmarks(10, 2, 1)[0].tolist() == [0, 5]


@few
@given(tokens=st.integers(8, 3000), count=st.integers(3, 8))
def test_grid_equals_a_rounded_linspace(tokens: int, count: int) -> None:
    expected = torch.linspace(1, tokens - 1, count - 1, dtype=torch.float64)
    chosen = grid_landmarks(tokens, count, 1)[0, 1:].double()
    assert (chosen - expected).abs().max() <= 0.5 + 1e-9


def test_norm_grid_takes_the_largest_norms_and_spaces_the_rest_among_the_others() -> None:
    features = torch.ones(1, 101, 2)
    features[0, [40, 7, 90]] *= 50
    chosen = select_landmarks(features, 40, method="norm-grid", prefix_tokens=1)[0].tolist()
    assert norm_grid_count(40, 1) == 3
    assert chosen[:4] == [0, 7, 40, 90]
    others = [token for token in range(1, 101) if token not in (7, 40, 90)]
    spaced = middles_of_stretches(torch.arange(36), len(others), 36)
    assert chosen[4:] == [others[position] for position in spaced.tolist()]


def test_random_depends_on_the_seed_only() -> None:
    features = torch.randn(3, 50, 4)
    first = select_landmarks(features, 10, method="random", seed=1)
    assert first.tolist() == select_landmarks(features * 2, 10, method="random", seed=1).tolist()
    assert first.tolist() != select_landmarks(features, 10, method="random", seed=2).tolist()
    assert random_landmarks(50, 10, 1, 1)[0].tolist() == first[0].tolist()


def test_weights_count_every_token_once() -> None:
    for method in ("grid", "norm-grid"):
        for prefix in (0, 1, 5):
            weights = landmark_bias(1370, 64, method=method, prefix_tokens=prefix).exp()
            assert weights.sum().item() == pytest.approx(1370, rel=1e-5)
            own = prefix + (norm_grid_count(64, prefix) if method == "norm-grid" else 0)
            assert weights[0, :own].tolist() == [1.0] * own


@pytest.mark.parametrize("method", ["fps", "random"])
def test_fps_and_random_landmarks_weigh_one(method: Any) -> None:
    assert landmark_bias(100, 10, method=method).tolist() == [[0.0] * 10]


def test_samplers_are_seen_as_operators_by_compile_and_export() -> None:
    class Chooser(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return select_landmarks(features, 6, method="fps") + select_landmarks(features, 6, method="norm-grid")

    features = torch.randn(2, 30, 4)
    program = torch.export.export(Chooser(), (features,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"fna.farthest_point_sampling.default", "fna.norm_grid_landmarks.default"} <= targets
    compiled = torch.compile(Chooser(), backend="aot_eager", fullgraph=True)
    assert compiled(features).tolist() == Chooser()(features).tolist()


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        pytest.param({"features": torch.ones(5, 4)}, InvalidShapeError, r"\[5, 4\].*\[B, N, C\]", id="rank 2"),
        pytest.param({"features": torch.ones(1, 5, 4).int()}, InvalidDtypeError, "floating-point", id="integers"),
        pytest.param({"num_landmarks": 0}, InvalidLandmarksError, "0 landmarks.*1 to 20", id="none"),
        pytest.param({"num_landmarks": 21}, InvalidLandmarksError, "21 landmarks.*20 tokens", id="too many"),
        pytest.param({"method": "kmeans"}, InvalidArgumentError, "kmeans.*fps, grid", id="unknown sampler"),
        pytest.param({"prefix_tokens": -1}, InvalidArgumentError, "-1", id="negative prefix"),
        pytest.param({"guarantee": torch.ones(20)}, InvalidDtypeError, "guarantee", id="mask of floats"),
        pytest.param(
            {"exclude": torch.ones(19, dtype=torch.bool)}, InvalidShapeError, r"exclude.*\[19\]", id="mask too short"
        ),
        pytest.param(
            {"guarantee": torch.ones(20, dtype=torch.bool)},
            InvalidLandmarksError,
            "20 tokens are guaranteed",
            id="all guaranteed",
        ),
        pytest.param(
            {"exclude": torch.ones(20, dtype=torch.bool)}, InvalidLandmarksError, "not excluded", id="all excluded"
        ),
    ],
)
def test_invalid_requests_are_named(arguments: dict[str, Any], error: type[FnaError], said: str) -> None:
    request: dict[str, Any] = {"features": torch.randn(1, 20, 4), "num_landmarks": 5}
    with pytest.raises(error, match=said):
        select_landmarks(**(request | arguments))


@pytest.mark.parametrize(("rows", "columns"), [(37, 37), (8, 20), (5, 3)])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_lattice_landmarks_are_distinct_patches_after_the_prefix(rows: int, columns: int, count: int) -> None:
    if count - 2 > rows * columns:
        return
    index = lattice_landmarks(rows * columns + 2, count, 2, (rows, columns))[0].tolist()
    assert index == sorted(set(index))
    assert len(index) == count
    assert index[:2] == [0, 1][:count]
    assert index[-1] < rows * columns + 2


def test_a_lattice_covers_the_image_better_than_a_row_of_tokens() -> None:
    def farthest(index: torch.Tensor) -> float:
        place = torch.stack([(index[0, 1:] - 1) // 37, (index[0, 1:] - 1) % 37], dim=1).float()
        every = torch.cartesian_prod(torch.arange(37.0), torch.arange(37.0))
        return float(torch.cdist(every, place).amin(dim=1).max())

    for count in (32, 64, 128):
        assert farthest(lattice_landmarks(1370, count, 1)) < farthest(grid_landmarks(1370, count, 1))


def test_the_lattice_needs_to_know_where_patches_are() -> None:
    with pytest.raises(InvalidArgumentError, match="no square number"):
        select_landmarks(torch.zeros(1, 25, 4), 6, method="lattice")
    given = select_landmarks(torch.zeros(2, 25, 4), 6, method="lattice", patches=(4, 6))
    assert given.shape == (2, 6)
