"""Landmarks of several images whose tokens follow one another in a sequence: each image has its share of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fna.errors import InvalidLandmarksError
from fna.samplers.common.record import LandmarkRequest, Sampler
from fna.samplers.common.weights import landmark_bias


def landmarks_over_frames(sampler: Sampler, request: LandmarkRequest, frames: int) -> tuple[Tensor, Tensor]:
    """Choose landmarks in every frame: its prefix tokens, and its share of the others; what is left over goes to the first.

    Args:
        sampler: one that does not look at features.
        request: of the whole sequence, `prefix_tokens` and `patches` those of a frame.
        frames: images in the sequence, all of as many tokens.

    Returns:
        Landmarks `[1, S]`, int32, and the logarithms of their weights `[1, S]`, fp32.

    Raises:
        InvalidLandmarksError: if the tokens are not that many frames', or there are too few landmarks for all frames.
    """
    tokens, rest = divmod(request.num_tokens, frames)
    if rest:
        raise InvalidLandmarksError(
            f"{request.num_tokens} tokens are not those of {frames} frames; patch the model with an example of as many frames"
        )
    least = frames * (request.prefix_tokens + 1)
    if request.num_landmarks < least:
        raise InvalidLandmarksError(
            f"{request.num_landmarks} landmarks were asked for, but {frames} frames of {request.prefix_tokens} prefix tokens and a "
            f"patch each need {least}; ask for more"
        )
    chosen, biases = [], []
    for frame in range(frames):
        count = request.num_landmarks // frames + (frame < request.num_landmarks % frames)
        share = replace(request, num_tokens=tokens, num_landmarks=count)
        chosen.append(sampler.select(share, None) + frame * tokens)
        biases.append(
            landmark_bias(
                tokens, count, method=sampler.name, prefix_tokens=request.prefix_tokens, device=request.device
            )
        )
    return torch.cat(chosen, dim=1), torch.cat(biases, dim=1)
