"""Choosing landmark tokens by any sampler, with masks of tokens to guarantee and to exclude as in the published code."""

from __future__ import annotations

import torch
from torch import Tensor

from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidLandmarksError, InvalidShapeError
from fna.samplers import all_samplers, find_sampler
from fna.samplers.common.record import LandmarkRequest

all_samplers()  # so that torch.compile does not come upon their import


def select_landmarks(
    features: Tensor,  # [B, N, C]
    num_landmarks: int,
    *,
    method: str = "fps",
    guarantee: Tensor | None = None,  # [N] or [B, N], bool
    exclude: Tensor | None = None,  # [N] or [B, N], bool
    prefix_tokens: int = 1,
    seed: int = 0,
    patches: tuple[int, int] | None = None,
) -> Tensor:  # [B, S], int32
    """Choose `num_landmarks` distinct token indices per batch item.

    Args:
        features: what the samplers look at: hidden states, or query, key or value averaged over the heads.
        num_landmarks: S, from 1 to N.
        method: the sampler; `fna.samplers.sampler_names()` lists them. `grid`, `lattice` and `random` look at the shape of
            `features` only.
        guarantee: tokens that come first, in ascending order, whatever the sampler.
        exclude: tokens that are never chosen; a token that is also guaranteed is chosen.
        prefix_tokens: class and register tokens at the front, which all but `fps` take unless they are excluded.
        seed: for `random`.
        patches: rows and columns of the patch tokens, for `lattice`; None takes them for a square.

    Returns:
        Landmark indices `[B, S]`, int32, on the device of `features`.

    Raises:
        InvalidShapeError, InvalidDtypeError, InvalidArgumentError, InvalidLandmarksError: naming what was given.
    """
    sampler = find_sampler(method)
    _check_features(features)
    if prefix_tokens < 0:
        raise InvalidArgumentError(f"prefix_tokens is {prefix_tokens}, but 0 or more is needed")
    batch, num_tokens, _ = features.shape
    check_landmark_count(num_landmarks, num_tokens)
    request = LandmarkRequest(num_tokens, num_landmarks, prefix_tokens, seed, patches, features.device)
    if guarantee is None and exclude is None:
        return sampler.select(request, features).expand(batch, -1)
    if sampler.select_masked is None:
        raise InvalidArgumentError(f"sampler {method!r} takes no guarantee or exclude mask; choose another one")
    wanted = _token_mask("guarantee", guarantee, features)
    barred = _token_mask("exclude", exclude, features) & ~wanted
    _check_masks(wanted, barred, num_landmarks)
    return sampler.select_masked(request, features, wanted, barred)


def _token_mask(name: str, mask: Tensor | None, features: Tensor) -> Tensor:
    shape = features.shape[:2]
    if mask is None:
        return torch.zeros(shape, dtype=torch.bool, device=features.device)
    if mask.dtype != torch.bool:
        raise InvalidDtypeError(f"{name} is {mask.dtype}, but a boolean mask over the tokens is needed")
    if mask.shape not in (shape, shape[1:]):
        raise InvalidShapeError(f"{name} has shape {list(mask.shape)}, but [{shape[1]}] or {list(shape)} is needed")
    return mask.to(features.device).expand(shape)


def _check_masks(wanted: Tensor, barred: Tensor, num_landmarks: int) -> None:
    most, available = int(wanted.sum(1).max()), int((~barred).sum(1).min())
    if most > num_landmarks:
        raise InvalidLandmarksError(
            f"{most} tokens are guaranteed, but only {num_landmarks} landmarks were asked for; raise the number of landmarks"
        )
    if available < num_landmarks:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were asked for, but only {available} tokens are not excluded"
        )


def _check_features(features: Tensor) -> None:
    if features.dim() != 3:
        raise InvalidShapeError(f"features have shape {list(features.shape)}, but [B, N, C] (3 dimensions) is needed")
    if not features.is_floating_point():
        raise InvalidDtypeError(f"features are {features.dtype}, but a floating-point type is needed")


def check_landmark_count(num_landmarks: int, num_tokens: int) -> None:
    """Raise InvalidLandmarksError where so many landmarks cannot be chosen."""
    if num_landmarks < 1 or num_landmarks > num_tokens:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were asked for of {num_tokens} tokens, but 1 to {num_tokens} are needed"
        )
