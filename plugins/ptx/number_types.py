"""PTX's names of number types, as NumPy's types. The code that `translate.py` generates uses these names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

u8, u16, u32, u64 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
s8, s16, s32, s64 = (np.dtype(f"i{size}") for size in (1, 2, 4, 8))
f16, f32, f64 = (np.dtype(f"f{size}") for size in (2, 4, 8))

NUMBER_TYPES: dict[str, np.dtype[Any]] = {
    "b8": u8, "u8": u8, "s8": s8, "b16": u16, "u16": u16, "s16": s16, "b32": u32, "u32": u32, "s32": s32,
    "b64": u64, "u64": u64, "s64": s64, "f16": f16, "f32": f32, "f64": f64,
}  # fmt: skip

REGISTER_WIDTHS: dict[str, np.dtype[Any]] = {
    "%p": np.dtype(bool), "%rs": u16, "%r": u32, "%rd": u64, "%f": u32, "%fd": u64
}  # fmt: skip
"""Registers hold bits, so floats too are kept as unsigned integers. The names are LLVM's."""
