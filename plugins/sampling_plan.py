"""Which kernels the samplers run: plans as `fna.plugins.launch_plan` describes them. Pure arithmetic; C++ has the same."""

from __future__ import annotations

from fna.errors import InvalidLandmarksError, InvalidShapeError
from fna.plugins.launch_plan import (
    ELEMENT_BYTES,
    FPS_ONE_LAUNCH_BYTES,
    FPS_ONE_LAUNCH_TOKENS,
    FPS_TILE,
    MAX_GRID_Y,
    MAX_LANDMARKS,
    NORM_GRID_BY_NORM,
    NORM_GRID_TOKENS,
    Dtype,
    KernelVariant,
    Launch,
    LaunchPlan,
    lay_out,
)


def sampling_plan(dtype: Dtype, batch: int, tokens: int, channels: int, num_landmarks: int) -> LaunchPlan:
    """Plan one call of FarthestPointSampling on contiguous features `[B, N, C]`.

    One launch where the tokens stay in the cache beside one multiprocessor, otherwise one launch for each landmark.
    """
    if min(batch, tokens, channels) < 1 or batch > MAX_GRID_Y:
        raise InvalidShapeError(
            f"features are [{batch}, {tokens}, {channels}], but sizes of at least 1 (B up to 65535) are needed"
        )
    if num_landmarks < 1 or num_landmarks > tokens:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were asked for of {tokens} tokens, but 1 to {tokens} are needed"
        )
    sizes = (tokens, channels, num_landmarks)
    aligned_channels = 16 if channels % 16 == 0 else 0
    if tokens <= FPS_ONE_LAUNCH_TOKENS and tokens * channels * ELEMENT_BYTES[dtype] <= FPS_ONE_LAUNCH_BYTES:
        return LaunchPlan(
            (
                Launch(
                    KernelVariant("fps", dtype, 0, aligned_channels), (batch, 1, 1), ("features", "landmarks", *sizes)
                ),
            )
        )
    tiles = -(-tokens // FPS_TILE)
    buffers = lay_out(
        {"distance": batch * tokens * 4, "best": batch * 2 * tiles * 4, "best_index": batch * 2 * tiles * 4}
    )
    launches = tuple(
        Launch(
            KernelVariant("fps_step", dtype, 0, aligned_channels),
            (tiles, batch, 1),
            ("features", "landmarks", "distance", "best", "best_index", *sizes, step),
        )
        for step in range(num_landmarks)
    )
    return LaunchPlan(launches, buffers)


def norm_grid_plan(
    dtype: Dtype, batch: int, tokens: int, channels: int, num_landmarks: int, *, prefix: int, by_norm: int
) -> LaunchPlan:
    """Plan norm-grid landmarks of contiguous features `[B, N, C]`: `prefix` tokens, `by_norm` by norm, the rest even."""
    if min(batch, tokens, channels) < 1 or batch > MAX_GRID_Y or tokens > NORM_GRID_TOKENS:
        raise InvalidShapeError(
            f"features are [{batch}, {tokens}, {channels}], but 1 to {MAX_GRID_Y} images of 1 to {NORM_GRID_TOKENS} tokens are needed"
        )
    most = min(MAX_LANDMARKS, tokens)
    if num_landmarks < 1 or num_landmarks > most or prefix + by_norm > num_landmarks or by_norm > NORM_GRID_BY_NORM:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks with {prefix} prefix tokens and {by_norm} by norm were asked for of {tokens} tokens, "
            f"but 1 to {most} with at most {NORM_GRID_BY_NORM} by norm are needed"
        )
    aligned_channels = 16 if channels % 16 == 0 else 0
    launches = (
        Launch(
            KernelVariant("norms", dtype, 0, aligned_channels),
            (-(-tokens // FPS_TILE), batch, 1),
            ("features", "norms", tokens, channels),
        ),
        Launch(
            KernelVariant("norm_grid", "fp32"),
            (batch, 1, 1),
            ("norms", "landmarks", tokens, num_landmarks, prefix, by_norm),
        ),
    )
    return LaunchPlan(launches, lay_out({"norms": batch * tokens * 4}))
