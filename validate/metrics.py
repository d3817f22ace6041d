"""How far one array is from another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RELATIVE_FLOOR = 1e-2
"""Values smaller than this share of the reference's root mean square count as that large in `max_rel`: the relative error of a
value that happens to lie next to zero says nothing."""


class TokenErrors(BaseModel):
    """The distance of each token position from its reference, over all images; every list is `[N]`.

    Attributes:
        max_abs: largest absolute difference.
        max_rel: largest relative difference; see `OutputError`.
        relative_l2: norm of the difference over norm of the reference.
        cosine_min: smallest cosine over the images.
        cosine_mean: mean cosine over the images.
        sqnr_db: signal to quantisation noise ratio in dB; None where nothing differs.
    """

    model_config = ConfigDict(frozen=True)

    max_abs: tuple[float, ...]
    max_rel: tuple[float, ...]
    relative_l2: tuple[float, ...]
    cosine_min: tuple[float, ...]
    cosine_mean: tuple[float, ...]
    sqnr_db: tuple[float | None, ...]


class OutputError(BaseModel):
    """The distance of one output from its reference, over all images.

    Attributes:
        output: its name.
        max_abs: largest absolute difference, in the output's own unit.
        max_rel: largest difference over the reference's value, element by element; values under `RELATIVE_FLOOR` of the
            image's root mean square count as that large.
        relative_l2: norm of the difference over norm of the reference.
        sqnr_db: signal to quantisation noise ratio, `-20 log10(relative_l2)`, in dB; None where nothing differs.
        cosine_min: smallest cosine between corresponding vectors (tokens, or whole items for other outputs).
        cosine_p5: 5th percentile of those cosines.
        cosine_mean: their mean.
        cosine_first_token: mean cosine of the first token (the class token where there is one); None for other outputs.
        cosine_patches: mean cosine of the patch tokens; None for other outputs.
        worst_item: index of the image with the smallest cosine.
        worst_token: index of the token with the smallest cosine in that image; None for other outputs.
        not_finite: how many values are NaN or infinite.
        tokens: the same by token position; None for other outputs, or if the number of tokens changes between images.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    max_abs: float
    max_rel: float
    relative_l2: float
    sqnr_db: float | None
    cosine_min: float
    cosine_p5: float
    cosine_mean: float
    cosine_first_token: float | None = None
    cosine_patches: float | None = None
    worst_item: int
    worst_token: int | None = None
    not_finite: int
    tokens: TokenErrors | None = None


def measure(
    output: str,
    reference: NDArray[Any],  # [B, ...]
    actual: NDArray[Any],  # [B, ...]
    *,
    prefix_tokens: int | None = None,
) -> OutputError:
    """Compare two arrays of one shape, in fp64.

    Args:
        output: the output's name.
        reference: what it should be.
        actual: what it is.
        prefix_tokens: for `[B, N, C]` token outputs: how many tokens precede the patches. None compares whole items.

    Raises:
        ValueError: if the shapes differ.
    """
    meter = ErrorMeter(output, prefix_tokens)
    meter.add(reference, actual)
    return meter.result()


@dataclass
class ErrorMeter:
    """Collects the distance of an output from its reference image by image, so that no image's arrays have to be kept.

    Attributes:
        output: the output's name.
        prefix_tokens: as for `measure`.
    """

    output: str
    prefix_tokens: int | None = None
    _cosines: list[NDArray[np.float64]] = field(default_factory=list)  # each [N] or [1]
    _by_token: list[_TokenSums] = field(default_factory=list)
    _max_abs: float = 0.0
    _max_rel: float = 0.0
    _noise: float = 0.0
    _signal: float = 0.0
    _not_finite: int = 0

    def add(
        self,
        reference: NDArray[Any],  # [B, ...]
        actual: NDArray[Any],  # [B, ...]
    ) -> None:
        """Take in some images' arrays.

        Raises:
            ValueError: if the shapes differ.
        """
        if reference.shape != actual.shape:
            raise ValueError(
                f"output {self.output} has shape {list(actual.shape)}, but its reference has {list(reference.shape)}"
            )
        for one, other in zip(reference, actual, strict=True):
            self._add_image(one.astype(np.float64), other.astype(np.float64))

    def _add_image(self, expected: NDArray[np.float64], given: NDArray[np.float64]) -> None:
        tokens = self.prefix_tokens is not None and expected.ndim == 2
        rows = (expected, given) if tokens else (expected.reshape(1, -1), given.reshape(1, -1))  # [N, C] or [1, M]
        with np.errstate(invalid="ignore", over="ignore"):
            sums = _sum_tokens(*rows)
            self._cosines.append(sums.cosine)
            self._max_abs = _larger(self._max_abs, float(sums.max_abs.max()))
            self._max_rel = _larger(self._max_rel, float(sums.max_rel.max()))
            self._noise += float(sums.noise.sum())
            self._signal += float(sums.signal.sum())
        self._not_finite += int(np.count_nonzero(~np.isfinite(given)))
        if tokens:
            self._by_token.append(sums)

    def result(self) -> OutputError:
        """Return the errors over all images taken in so far; there must be at least one."""
        lowest = np.array([cosines.min() for cosines in self._cosines])
        worst = int(np.argmin(lowest))
        cosines = np.concatenate(self._cosines)
        prefix = self.prefix_tokens or 0
        is_tokens = bool(self._by_token)
        return OutputError(
            output=self.output,
            max_abs=self._max_abs,
            max_rel=self._max_rel,
            relative_l2=_ratio(self._noise, self._signal),
            sqnr_db=_decibel(self._noise, self._signal),
            cosine_min=float(cosines.min()),
            cosine_p5=float(np.percentile(cosines, 5)),
            cosine_mean=float(cosines.mean()),
            cosine_first_token=float(np.mean([item[0] for item in self._cosines])) if is_tokens and prefix else None,
            cosine_patches=(
                float(np.concatenate([item[prefix:] for item in self._cosines]).mean()) if is_tokens else None
            ),
            worst_item=worst,
            worst_token=int(np.argmin(self._cosines[worst])) if is_tokens else None,
            not_finite=self._not_finite,
            tokens=_merge_tokens(self._by_token),
        )


@dataclass(frozen=True)
class _TokenSums:
    """One image's sums, each `[N]`."""

    max_abs: NDArray[np.float64]
    max_rel: NDArray[np.float64]
    noise: NDArray[np.float64]
    signal: NDArray[np.float64]
    cosine: NDArray[np.float64]


def _sum_tokens(expected: NDArray[np.float64], given: NDArray[np.float64]) -> _TokenSums:
    difference = np.abs(given - expected)
    size = np.abs(expected)
    floor = max(RELATIVE_FLOOR * float(np.sqrt(np.mean(size**2))), np.finfo(np.float64).tiny)
    return _TokenSums(
        max_abs=difference.max(axis=1),
        max_rel=(difference / np.maximum(size, floor)).max(axis=1),
        noise=(difference**2).sum(axis=1),
        signal=(size**2).sum(axis=1),
        cosine=cosine(expected, given),
    )


def _merge_tokens(images: list[_TokenSums]) -> TokenErrors | None:
    if not images or len({len(image.cosine) for image in images}) > 1:
        return None
    noise = np.sum([image.noise for image in images], axis=0)
    signal = np.sum([image.signal for image in images], axis=0)
    cosines = np.stack([image.cosine for image in images])
    return TokenErrors(
        max_abs=_rounded(np.max([image.max_abs for image in images], axis=0)),
        max_rel=_rounded(np.max([image.max_rel for image in images], axis=0)),
        relative_l2=_rounded(np.array([_ratio(*pair) for pair in zip(noise, signal, strict=True)])),
        cosine_min=_rounded(cosines.min(axis=0)),
        cosine_mean=_rounded(cosines.mean(axis=0)),
        sqnr_db=tuple(_decibel(*pair) for pair in zip(noise.tolist(), signal.tolist(), strict=True)),
    )


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Seven significant digits, which is what fp32 arrays hold; there are thousands of these numbers in the JSON."""
    return tuple(float(f"{value:.7g}") for value in values)


def _ratio(noise: float, signal: float) -> float:
    return float(np.sqrt(noise) / max(np.sqrt(signal), np.finfo(np.float64).tiny))


def _decibel(noise: float, signal: float) -> float | None:
    if noise == 0 or not np.isfinite(noise) or signal == 0:
        return None
    return round(float(10 * np.log10(signal / noise)), 4)


def _larger(left: float, right: float) -> float:
    """The larger of two numbers; NaN if either is."""
    return right if np.isnan(right) or right > left else left


def cosine(
    left: NDArray[Any],  # [..., C]
    right: NDArray[Any],  # [..., C]
) -> NDArray[Any]:  # [...]
    """Cosine along the last axis; 1 where both vectors are zero, 0 where one is."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    both_zero = (np.linalg.norm(left, axis=-1) == 0) & (np.linalg.norm(right, axis=-1) == 0)
    safe = np.where(norms == 0, 1.0, norms)
    return np.where(both_zero, 1.0, np.where(norms == 0, 0.0, (left * right).sum(axis=-1) / safe))
