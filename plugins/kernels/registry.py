"""The kernels by name, with the constants and parameter types of each variant. Imports Triton."""

from __future__ import annotations

from typing import Any

import triton

from fna.plugins.focal_plan import FOCAL_ROWS, KEY_BLOCK, LIST_BLOCK, PREFIX_BLOCK, RANK_BLOCK, SCAN_BLOCK
from fna.plugins.kernels import attention, focal, norms, sampling
from fna.plugins.launch_plan import (
    CHEBYSHEV_COLUMNS,
    FINISH_COLUMNS,
    FPS_ONE_LAUNCH_TOKENS,
    FPS_TILE,
    HEAD_PADDINGS,
    MAX_HOT,
    MAX_LANDMARKS,
    NORM_GRID_BY_NORM,
    NORM_GRID_TOKENS,
    TILE,
    KernelVariant,
    blocks_of,
)
from fna.plugins.table.chips import OLDEST_CHIP

HOPPER = 90

GLUON_SINCE = (3, 9)
"""The first Triton whose Gluon has all that focal attention's tiles take. Under PyTorch older ones run the kernel that fp32 has."""

KERNELS = {
    "landmark": attention.landmark_kernel,
    "landmark_chebyshev": attention.landmark_kernel,
    "finish": attention.finish_kernel,
    "finish_chebyshev": attention.finish_chebyshev_kernel,
    "output": attention.output_kernel,
    "focal_hot": focal.focal_hot_kernel,
    "focal": focal.focal_kernel,
    "fps": sampling.fps_kernel,
    "fps_step": sampling.fps_step_kernel,
    "norms": norms.norms_kernel,
    "norm_grid": norms.norm_grid_kernel,
}
_TYPED = {"query", "key", "value", "mixed", "out", "features"}
_INT_POINTERS = {
    "landmarks", "key_mask", "best_index", "tile_queries", "tile_keys", "candidates", "hot_tokens", "listed",
}  # fmt: skip
_FLOAT_POINTERS = {
    "bias", "partial", "stats", "matrices", "colsum", "exact", "mixed_scale", "between", "distance", "best", "norms",
    "tile_bias", "query_sums", "hot_scores", "hot_values", "offsets", "biases",
}  # fmt: skip
_MULTIPLES_OF_16 = {
    "head_size",
    "stride_b",
    "stride_h",
    "stride_n",
    "out_b",
    "out_h",
    "out_n",
    "padded_d",
    "row_length",
}
_UNALIGNED = {"landmarks", "bias", "key_mask", "tile_queries", "tile_keys", "tile_bias"}


def has_gluon() -> bool:
    """Whether this Triton is of `GLUON_SINCE` or later."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= GLUON_SINCE


def kernel_of(variant: KernelVariant, sm: int = OLDEST_CHIP) -> Any:
    """The kernel that a variant is compiled from for a chip (`sm` as of `options`). The interpreter has no Gluon."""
    if variant.dtype != "fp32" and has_gluon() and not triton.knobs.runtime.interpret:
        if variant.kernel == "focal":
            from fna.plugins.kernels import focal_tiles

            return focal_tiles.focal_kernel
        if variant.kernel == "landmark" and _two_warps_hold(variant, sm):
            from fna.plugins.kernels import landmark_tiles

            return landmark_tiles.landmark_kernel
    return KERNELS[variant.kernel]


def constants(variant: KernelVariant, *, upcast: bool = False) -> dict[str, Any]:
    """The constexpr parameters of a variant. `upcast`: products of bf16 in fp32, for Triton's interpreter."""
    half = variant.dtype != "fp32"
    if variant.landmarks:
        blocks = blocks_of(variant.dtype, variant.landmarks, variant.head_size or HEAD_PADDINGS[0])
        chebyshev = variant.kernel.endswith("_chebyshev")
        core = blocks.chebyshev if chebyshev else blocks.newton_schulz
        kept = {"S_PAD": blocks.landmarks, "MATRICES": core.matrices, "IN_REGISTERS": core.in_registers}
        if variant.kernel.startswith("finish"):
            return {**kept, "COLUMNS": CHEBYSHEV_COLUMNS if chebyshev else FINISH_COLUMNS}
        padded = {"BLOCK_D": blocks.head_size, "UPCAST": upcast}
        if variant.kernel.startswith("landmark"):
            rows = {"BLOCK_S": blocks.landmark_rows, "BLOCK_N": blocks.key_block}
            return {**kept, **padded, **rows, "CHEBYSHEV": chebyshev, "HALF": half}
        tiles = {"TILE_S": blocks.landmark_block, "BLOCK_M": blocks.query_block, "HELD": _holds_landmarks(variant)}
        return {**padded, "S_PAD": blocks.landmarks, **tiles}
    if variant.kernel == "focal_hot":
        return {"BLOCK_N": MAX_HOT, "BLOCK_D": variant.head_size, "BLOCK_C": SCAN_BLOCK, "BLOCK_R": RANK_BLOCK}
    if variant.kernel == "focal":
        rows = {"BLOCK_M": FOCAL_ROWS, "BLOCK_N": KEY_BLOCK[variant.dtype], "BLOCK_D": variant.head_size}
        return {**rows, "BLOCK_P": PREFIX_BLOCK, "BLOCK_L": LIST_BLOCK}
    if variant.kernel == "fps":
        return {"BLOCK_N": FPS_ONE_LAUNCH_TOKENS, "BLOCK_C": 8}
    if variant.kernel == "norm_grid":
        return {"BLOCK_N": NORM_GRID_TOKENS, "BLOCK_S": MAX_LANDMARKS, "BLOCK_T": NORM_GRID_BY_NORM}
    return {"BLOCK_N": FPS_TILE, "BLOCK_C": 64}


def _holds_landmarks(variant: KernelVariant) -> bool:
    """Whether a program of the output kernel keeps the landmarks' keys and values on chip."""
    return variant.dtype != "fp32" and variant.landmarks <= 2 * TILE


def _two_warps_hold(variant: KernelVariant, sm: int) -> bool:
    """Whether two warps hold what the landmark kernel needs; from Hopper on products take four at a time."""
    small = variant.landmarks == TILE and variant.head_size == HEAD_PADDINGS[0]
    return variant.dtype != "fp32" and small and sm < HOPPER


def options(variant: KernelVariant, sm: int = OLDEST_CHIP) -> dict[str, int | bool]:
    """Warps and pipeline stages, chosen by registers and shared memory (no spills, and at most 99 KB), and rounding.

    Fewer warps read fewer keys and values twice, since a warp reads them for its own rows. At 64 landmarks two hold what the landmark
    kernel needs, at 128 four, up to compute capability 8.9; later chips (`sm`, the capability times ten) compile to more registers,
    and spill, or multiply by four warps at a time.

    Sums of squares that have to tie exactly are not contracted to fused multiply-adds: lanes that hold one sum twice would
    round it differently (`fma(d, d, shuffled)`), and one of them is stored.
    """
    wide = variant.dtype == "fp32"
    four_hold_128 = variant.landmarks == 2 * TILE and variant.head_size == HEAD_PADDINGS[0] and sm < HOPPER
    if variant.kernel.startswith("landmark"):
        warps = 4 if not wide and (variant.landmarks == TILE or four_hold_128) else 8
        warps = 2 if _two_warps_hold(variant, sm) else warps
        # Here 8 warps spill 72 to 152 bytes a thread, 4 at most 48 (ptxas 12.9, and 13.4 for sm_110).
        if wide and variant.kernel == "landmark" and variant.landmarks == 2 * TILE and sm > HOPPER:
            warps = 4
        stages = 1 if wide else 2
    elif variant.kernel.startswith("finish"):
        warps, stages = 2 if not wide and variant.landmarks == TILE and sm < HOPPER else 4, 1
    elif variant.kernel == "output":
        held = _holds_landmarks(variant)
        short = variant.landmarks == TILE and variant.head_size == HEAD_PADDINGS[0]
        warps, stages = 4 if held and (short or four_hold_128) else 8, 2 if held else 1
    elif variant.kernel == "focal":
        short = variant.head_size == HEAD_PADDINGS[0]
        warps, stages = (4 if short else 8) if wide else (2 if short else 4), 1
    else:
        warps, stages = 16 if variant.kernel in ("fps", "norm_grid") else 4, 2
    exact_ties = variant.kernel in ("fps", "fps_step", "norms")
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": not exact_ties}


def signature(variant: KernelVariant) -> dict[str, str]:
    """Triton's type of each parameter, `constexpr` among them, in the kernel's order."""
    typed = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}[variant.dtype]
    kinds = dict.fromkeys(_TYPED, typed) | dict.fromkeys(_INT_POINTERS, "*i32")
    kinds |= dict.fromkeys(_FLOAT_POINTERS, "*fp32") | dict.fromkeys(("scale", "middle", "ratio", "half_width"), "fp32")
    parameters = kernel_of(variant).params
    return {p.name: "constexpr" if p.is_constexpr else kinds.get(p.name, "i32") for p in parameters}


def multiples_of_16(variant: KernelVariant) -> list[int]:
    """Positions of the parameters that the compiler may take as multiples of 16: addresses in bytes, sizes in elements.

    TensorRT aligns its tensors; landmarks, bias and mask may be views in PyTorch, and are read element by element.
    """
    names = set(_MULTIPLES_OF_16) | (
        {"channels"} if variant.kernel in ("fps", "fps_step", "norms") and variant.head_size else set()
    )
    kinds = signature(variant)
    pointers = {name for name, kind in kinds.items() if kind.startswith("*")} - _UNALIGNED
    return [i for i, name in enumerate(kinds) if name in names | pointers]


def parameter_layout(variant: KernelVariant) -> str:
    """One letter for each launch argument: p for an address, i for an int32, f for a float32."""
    letters = {"i32": "i", "fp32": "f"}
    return "".join(letters.get(kind, "p") for kind in signature(variant).values() if kind != "constexpr")
