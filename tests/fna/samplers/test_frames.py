"""Landmarks of several images in one sequence."""

from __future__ import annotations

import math

import pytest
import torch

from fna.errors import InvalidLandmarksError
from fna.samplers import LandmarkRequest, find_sampler
from fna.samplers.common.frames import landmarks_over_frames


@pytest.mark.parametrize("name", ["grid", "lattice"])
@pytest.mark.parametrize(("frames", "count"), [(2, 20), (3, 22)])
def test_every_frame_has_its_prefix_tokens_and_its_share(name: str, frames: int, count: int) -> None:
    request = LandmarkRequest(frames * 66, count, prefix_tokens=2)
    landmarks, bias = landmarks_over_frames(find_sampler(name), request, frames)
    assert landmarks.shape == bias.shape == (1, count)
    assert landmarks.unique().numel() == count
    frame, place = landmarks[0] // 66, landmarks[0] % 66
    shares = [count // frames + (number < count % frames) for number in range(frames)]
    assert torch.bincount(frame, minlength=frames).tolist() == shares
    for number, share in enumerate(shares):
        own = place[frame == number]
        assert own[:2].tolist() == [0, 1]
        assert own.max() > 50  # to the end of the image
        weights = bias[0][frame == number].exp()
        torch.testing.assert_close(weights[:2], torch.ones(2))
        torch.testing.assert_close(weights.sum(), torch.tensor(66.0))
        assert math.isclose(float(weights[2]), 64 / (share - 2), rel_tol=1e-5)


@pytest.mark.parametrize(("tokens", "count", "reason"), [(132, 5, "need 6"), (133, 20, "not those of 2 frames")])
def test_too_few_landmarks_or_odd_tokens_are_refused(tokens: int, count: int, reason: str) -> None:
    with pytest.raises(InvalidLandmarksError, match=reason):
        landmarks_over_frames(find_sampler("grid"), LandmarkRequest(tokens, count, prefix_tokens=2), 2)
