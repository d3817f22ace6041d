"""The kernels by name, with the constants and parameter types of each variant. Imports Triton."""

from __future__ import annotations

from typing import Any

from fna.plugins.kernels import attention, sampling
from fna.plugins.plan import FPS_ONE_LAUNCH_TOKENS, FPS_TILE, FINISH_COLUMNS, TILE
from fna.plugins.plan import Variant, key_block, landmark_block, landmark_rows, query_block

KERNELS = {
    "landmark": attention.landmark_kernel,
    "newton": attention.newton_kernel,
    "finish": attention.finish_kernel,
    "output": attention.output_kernel,
    "fps": sampling.fps_kernel,
    "fps_step": sampling.fps_step_kernel,
}
_TYPED = {"query", "key", "value", "mixed", "out", "features"}
_INT_POINTERS = {"landmarks", "best_index"}
_FLOAT_POINTERS = {"bias", "partial", "stats", "matrices", "colsum", "exact", "mixed_scale", "steps", "distance", "best"}
_MULTIPLES_OF_16 = {"head_size", "stride_b", "stride_h", "stride_n", "out_b", "out_h", "out_n", "padded_d"}
_UNALIGNED = {"landmarks", "bias"}


def constants(variant: Variant, *, upcast: bool = False) -> dict[str, Any]:
    """The constexpr parameters of a variant. `upcast`: products of bf16 in fp32, for Triton's interpreter."""
    half = variant.dtype != "fp32"
    s_pad, block_d = variant.landmarks, variant.head_size
    if variant.kernel == "landmark":
        blocks = {"S_PAD": s_pad, "BLOCK_S": landmark_rows(variant.dtype, s_pad), "BLOCK_N": key_block(variant.dtype, block_d)}
        return {**blocks, "BLOCK_D": block_d, "HALF": half, "UPCAST": upcast}
    if variant.kernel == "newton":
        return {"S_PAD": s_pad, "HALF": half}
    if variant.kernel == "finish":
        return {"S_PAD": s_pad, "COLUMNS": FINISH_COLUMNS, "HALF": half}
    if variant.kernel == "output":
        blocks = {"S_PAD": s_pad, "TILE_S": landmark_block(variant.dtype, s_pad, block_d), "BLOCK_M": query_block(variant.dtype, s_pad, block_d)}
        return {**blocks, "BLOCK_D": block_d, "UPCAST": upcast}
    if variant.kernel == "fps":
        return {"BLOCK_N": FPS_ONE_LAUNCH_TOKENS, "BLOCK_C": 8}
    return {"BLOCK_N": FPS_TILE, "BLOCK_C": 64}
