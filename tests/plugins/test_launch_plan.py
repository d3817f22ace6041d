"""The launch plan: pure arithmetic."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fna.errors import FnaError, InvalidArgumentError, InvalidLandmarksError, InvalidShapeError
from fna.plugins.kernels.registry import signature
from fna.plugins.launch_plan import (
    DTYPES,
    AttentionShape,
    all_variants,
    attention_buffers,
    attention_plan,
    call_blocks,
    core_programs,
    split_keys,
    workspace_bound,
)
from fna.plugins.sampling_plan import sampling_plan

SHAPES = st.builds(
    AttentionShape,
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 16),
    heads=st.integers(1, 24),
    tokens=st.integers(256, 20000),
    head_size=st.sampled_from([16, 32, 64, 80, 96, 128]),
    landmarks=st.integers(1, 256),
)


def plan(shape: AttentionShape, **changes):
    options = {"scale": 0.125, "iterations": 6, "exact_rows": False, "multiprocessors": 16, **changes}
    return attention_plan(shape, **options)


@given(SHAPES, st.integers(1, 300))
def test_splits_cover_every_key_once_and_none_is_empty(shape: AttentionShape, multiprocessors: int) -> None:
    splits, tokens = split_keys(shape, multiprocessors)
    assert tokens % call_blocks(shape).key_block == 0
    assert (splits - 1) * tokens < shape.tokens <= splits * tokens


def test_keys_are_split_no_further_than_the_core_beside_them_takes() -> None:
    """Newton-Schulz at 128 landmarks takes longer than all keys of a head by one program; Chebyshev's matrices do not."""
    shape = AttentionShape("fp16", 1, 12, 1370, 64, 128)
    assert split_keys(shape, 108)[0] == 1
    assert split_keys(shape, 108, chebyshev=True)[0] > 4


@given(SHAPES, st.data())
def test_the_workspace_bound_holds_for_everything_smaller_on_every_gpu(shape: AttentionShape, data) -> None:
    landmarks = data.draw(st.integers(1, shape.landmarks))
    smaller = AttentionShape(
        shape.dtype,
        data.draw(st.integers(1, shape.batch)),
        shape.heads,
        data.draw(st.integers(landmarks, shape.tokens)),
        shape.head_size,
        landmarks,
    )
    assert plan(smaller, multiprocessors=data.draw(st.integers(1, 400))).workspace_bytes <= workspace_bound(shape)


@given(SHAPES)
def test_buffers_are_aligned_and_do_not_overlap(shape: AttentionShape) -> None:
    buffers = sorted(attention_buffers(shape, 7).values(), key=lambda buffer: buffer.offset)
    for before, after in pairwise(buffers):
        assert after.offset % 256 == 0
        assert before.offset + before.size <= after.offset


@given(SHAPES)
def test_every_launch_names_a_variant_that_the_build_compiles(shape: AttentionShape) -> None:
    known = set(all_variants())
    assert all(launch.variant in known for launch in plan(shape).launches)


@pytest.mark.parametrize(("landmarks", "launches"), [(64, 3), (128, 3), (256, 3 + 16)])
def test_newton_schulz_takes_launches_of_its_own_only_above_128_landmarks(landmarks: int, launches: int) -> None:
    assert len(plan(AttentionShape("fp16", 1, 6, 1370, 64, landmarks)).launches) == launches


@given(SHAPES)
def test_the_launches_of_the_landmark_kernel_share_out_all_of_the_split(shape: AttentionShape) -> None:
    launches = [launch for launch in plan(shape).launches if launch.variant.kernel == "landmark"]
    names = list(signature(launches[0].variant))
    s_pad = launches[0].variant.landmarks
    expected = 0
    for step, launch in enumerate(launches):
        values = dict(zip(names, launch.arguments, strict=False))
        assert (values["first_job"], values["step"]) == (expected, step)
        expected += launch.grid[1] - core_programs(s_pad, step)
    assert expected == values["splits"] * call_blocks(shape).row_tiles


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"head_size": 72}, InvalidShapeError, "head size D is 72", id="odd head size"),
        pytest.param({"head_size": 144}, InvalidShapeError, "head size D is 144", id="large head size"),
        pytest.param({"landmarks": 257}, InvalidLandmarksError, "257 landmarks were given for 1370", id="landmarks"),
        pytest.param({"tokens": 63}, InvalidLandmarksError, "64 landmarks were given for 63", id="few tokens"),
        pytest.param({"batch": 0}, InvalidShapeError, "B is 0", id="empty batch"),
        pytest.param({"batch": 20000}, InvalidShapeError, r"B \* H is 120000", id="grid"),
        pytest.param({"tokens": 2**23}, InvalidShapeError, r"H \* N \* D is 3221225472", id="strides"),
        pytest.param({"dtype": "fp64"}, InvalidArgumentError, "fp64 was given", id="type"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_by_value(changes: dict, error: type[FnaError], message: str) -> None:
    sizes = {"dtype": "fp16", "batch": 1, "heads": 6, "tokens": 1370, "head_size": 64, "landmarks": 64, **changes}
    with pytest.raises(error, match=message):
        plan(AttentionShape(**sizes))


@pytest.mark.parametrize("iterations", [0, 65])
def test_the_number_of_iterations_is_bounded(iterations: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"iterations is {iterations}"):
        plan(AttentionShape("fp16", 1, 6, 1370, 64, 64), iterations=iterations)


def test_sampling_refuses_more_landmarks_than_tokens() -> None:
    with pytest.raises(InvalidLandmarksError, match="65 landmarks were asked for of 64"):
        sampling_plan("fp16", 1, 64, 384, 65)
