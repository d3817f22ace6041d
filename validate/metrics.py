"""How far one array is from another: each metric is one record, which the JSON, the page and the command line read.

A further metric is a further record here, and a test of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

RELATIVE_FLOOR = 1e-2
"""Values smaller than this share of the reference's root mean square count as that large in `max_rel`: the relative error of a
value that happens to lie next to zero says nothing."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Distances:
    """What metrics are computed from. Their formulas reduce the first axis.

    A row is a token, or a whole image where the output is no tokens. There are two shapes: `[K]`, all K rows of all M images,
    for the output as a whole; `[M, N]` to have each of the N token positions by itself.

    Attributes:
        max_abs: largest absolute difference in each row.
        max_rel: largest difference over the reference's value in each row; see `RELATIVE_FLOOR`.
        cosine: of each row with its reference.
        noise: squared norm of the difference, one entry per image.
        signal: squared norm of the reference, likewise.
        class_cosine: of the first token of each image, `[M]`; None where there is no class token.
        patch_cosine: of the patch tokens, all in a row; None for other outputs.
    """

    max_abs: Values
    max_rel: Values
    cosine: Values
    noise: Sequence[Any]
    signal: Sequence[Any]
    class_cosine: Values | None = None
    patch_cosine: Values | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its key in the JSON.
        title: heads its column on the page.
        short: heads its column in the terminal.
        description: what it is, for the page.
        style: the format of its numbers.
        better: which way is better.
        formula: reduces the first axis of the distances; None where there is no such number.
        by_token: whether it is also computed for each token position.
        by_block: whether it is also computed for what leaves each block.
        absent: what the terminal shows for None.
    """

    name: str
    title: str
    short: str
    description: str
    style: str
    better: Literal["lower", "higher"]
    formula: Callable[[Distances], Any]
    by_token: bool = False
    by_block: bool = False
    absent: str = ""

    def show(self, value: float | None) -> str:
        """The value as the terminal shows it."""
        return self.absent if value is None else format(value, self.style)

    def is_within(self, value: float, tolerance: float) -> bool:
        """Whether a value is as good as the tolerance; NaN never is."""
        return value <= tolerance if self.better == "lower" else value >= tolerance


def _relative_l2(distances: Distances) -> Any:
    return np.sqrt(sum(distances.noise)) / np.maximum(np.sqrt(sum(distances.signal)), np.finfo(np.float64).tiny)


def _sqnr_db(distances: Distances) -> Any:
    noise, signal = (np.asarray(sum(parts)) for parts in (distances.noise, distances.signal))
    is_defined = (noise != 0) & np.isfinite(noise) & (signal != 0)
    decibels = 10 * np.log10(np.where(is_defined, signal, 1.0) / np.where(is_defined, noise, 1.0))
    return np.where(is_defined, np.round(decibels, 4), np.array(None))


def _mean(values: Values | None) -> float | None:
    return None if values is None else float(values.mean())


JUDGED = Metric(
    "relative_l2", "relative L2", "rel L2", "norm of the difference over norm of the reference",
    ".2e", "lower", _relative_l2, by_token=True, by_block=True,
)  # fmt: skip
"""The metric that tolerances, bars and charts are of."""

_METRICS = (
    Metric(
        "max_abs", "max abs", "max abs", "largest absolute difference, in the output's own unit",
        ".2e", "lower", lambda d: d.max_abs.max(axis=0), by_token=True,
    ),
    Metric(
        "max_rel", "max rel", "max rel", "largest difference over the reference's value, element by element",
        ".1e", "lower", lambda d: d.max_rel.max(axis=0), by_token=True,
    ),
    JUDGED,
    Metric(
        "sqnr_db", "SQNR, dB", "SQNR dB", "signal to quantisation noise ratio; none where nothing differs",
        ".1f", "higher", _sqnr_db, by_token=True, absent="exact",
    ),
    Metric(
        "cosine_min", "cosine min", "cos min", "smallest cosine of tokens, or of whole images for other outputs",
        ".5f", "higher", lambda d: d.cosine.min(axis=0), by_token=True,
    ),
    Metric(
        "cosine_p5", "5th perc.", "cos p5", "5th percentile of those cosines",
        ".5f", "higher", lambda d: np.percentile(d.cosine, 5, axis=0),
    ),
    Metric(
        "cosine_mean", "mean", "cos mean", "mean of those cosines",
        ".5f", "higher", lambda d: d.cosine.mean(axis=0), by_token=True, by_block=True,
    ),
    Metric(
        "cosine_first_token", "class token", "class", "mean cosine of the class token; none for other outputs",
        ".5f", "higher", lambda d: _mean(d.class_cosine),
    ),
    Metric(
        "cosine_patches", "patches", "patches", "mean cosine of the patch tokens; none for other outputs",
        ".5f", "higher", lambda d: _mean(d.patch_cosine),
    ),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}
"""By name, in the order of the tables' columns."""


class Measured(BaseModel):
    """Something with a value for each metric, `METRICS` says which, as fields of their own in the JSON."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float | None]

    def value(self, name: str) -> float | None:
        """Return a metric's value by its name."""
        return (self.__pydantic_extra__ or {}).get(name)

    @property
    def judged(self) -> float:
        """The value of the metric that tolerances are of."""
        value = self.value(JUDGED.name)
        return float("nan") if value is None else value


class TokenErrors(BaseModel):
    """The distance of each token position from its reference, over all images: a list `[N]` for each metric with `by_token`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, tuple[float | None, ...]]

    @property
    def judged(self) -> NDArray[np.float64]:  # [N]
        """The metric that tolerances are of."""
        return np.array((self.__pydantic_extra__ or {})[JUDGED.name], dtype=np.float64)


class OutputError(Measured):
    """The distance of one output from its reference, over all images; beside these fields, one for each metric.

    Attributes:
        output: its name.
        worst_item: index of the image with the smallest cosine.
        worst_token: index of the token with the smallest cosine in that image; None for other outputs.
        not_finite: how many values are NaN or infinite.
        tokens: the metrics by token position; None for other outputs, or if the number of tokens changes between images.
    """

    output: str
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
    _images: list[_ImageRows] = field(default_factory=list)
    _is_tokens: bool = False
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
        for expected, given in zip(reference.astype(np.float64), actual.astype(np.float64), strict=True):
            self._is_tokens = self.prefix_tokens is not None and expected.ndim == 2
            shape = expected.shape if self._is_tokens else (1, -1)  # [N, C] or [1, M]
            with np.errstate(invalid="ignore", over="ignore"):
                self._images.append(_compare_rows(expected.reshape(shape), given.reshape(shape)))
            self._not_finite += int(np.count_nonzero(~np.isfinite(given)))

    def result(self) -> OutputError:
        """Return the errors over all images taken in so far; there must be at least one."""
        cosines = [image.cosine for image in self._images]
        worst = int(np.argmin([image.min() for image in cosines]))
        with np.errstate(invalid="ignore", over="ignore"):
            whole = self._whole()
            values: dict[str, Any] = {name: _as_float(metric.formula(whole)) for name, metric in METRICS.items()}
            tokens = self._by_token()
        return OutputError(
            output=self.output,
            worst_item=worst,
            worst_token=int(np.argmin(cosines[worst])) if self._is_tokens else None,
            not_finite=self._not_finite,
            tokens=tokens,
            **values,
        )

    def _whole(self) -> Distances:
        images, prefix = self._images, self.prefix_tokens or 0
        is_tokens = self._is_tokens
        return Distances(
            max_abs=np.concatenate([image.max_abs for image in images]),
            max_rel=np.concatenate([image.max_rel for image in images]),
            cosine=np.concatenate([image.cosine for image in images]),
            noise=[image.noise.sum() for image in images],
            signal=[image.signal.sum() for image in images],
            class_cosine=np.array([image.cosine[0] for image in images]) if is_tokens and prefix else None,
            patch_cosine=np.concatenate([image.cosine[prefix:] for image in images]) if is_tokens else None,
        )

    def _by_token(self) -> TokenErrors | None:
        images = self._images
        if not self._is_tokens or len({len(image.cosine) for image in images}) > 1:
            return None
        names = ("max_abs", "max_rel", "cosine", "noise", "signal")
        rows: dict[str, Any] = {name: np.stack([getattr(image, name) for image in images]) for name in names}
        each = Distances(**rows)
        wanted = {name: metric for name, metric in METRICS.items() if metric.by_token}
        lists: dict[str, Any] = {name: tuple(map(_rounded, metric.formula(each))) for name, metric in wanted.items()}
        return TokenErrors(**lists)


@dataclass(frozen=True)
class _ImageRows:
    """One image's distances, row by row, each `[N]`; noise and signal as in `Distances`."""

    max_abs: Values
    max_rel: Values
    noise: Values
    signal: Values
    cosine: Values


def _compare_rows(expected: Values, given: Values) -> _ImageRows:
    difference = np.abs(given - expected)
    size = np.abs(expected)
    floor = max(RELATIVE_FLOOR * float(np.sqrt(np.mean(size**2))), np.finfo(np.float64).tiny)
    return _ImageRows(
        max_abs=difference.max(axis=1),
        max_rel=(difference / np.maximum(size, floor)).max(axis=1),
        noise=(difference**2).sum(axis=1),
        signal=(size**2).sum(axis=1),
        cosine=cosine(expected, given),
    )


def _as_float(value: Any) -> float | None:
    return None if value is None or (isinstance(value, np.ndarray) and value.item() is None) else float(value)


def _rounded(value: Any) -> float | None:
    """Seven significant digits, which is what fp32 arrays hold; there are thousands of these numbers in the JSON."""
    return None if value is None else float(f"{value:.7g}")


def cosine(
    left: NDArray[Any],  # [..., C]
    right: NDArray[Any],  # [..., C]
) -> NDArray[Any]:  # [...]
    """Cosine along the last axis; 1 where both vectors are zero, 0 where one is."""
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    both_zero = (np.linalg.norm(left, axis=-1) == 0) & (np.linalg.norm(right, axis=-1) == 0)
    safe = np.where(norms == 0, 1.0, norms)
    return np.where(both_zero, 1.0, np.where(norms == 0, 0.0, (left * right).sum(axis=-1) / safe))
