"""The two 8-bit types: what values they hold, how a scale is found, and how ONNX writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from fna.export.metadata import QuantizedTypes

Array = NDArray[np.floating]
EightBitName = Literal["int8", "fp8"]

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""Below it fp32 is subnormal, which GPUs flush to zero."""


@dataclass(frozen=True)
class EightBit:
    """A type of 8 bits with a symmetric range.

    Attributes:
        name: as in metadata and options.
        largest: the largest magnitude that a scale is fitted to.
        kind: ONNX element type of zero points.
        opset: of the standard operators, the first whose QuantizeLinear makes it.
    """

    name: EightBitName
    largest: float
    kind: int
    opset: int

    def scale(self, largest: Array) -> NDArray[np.float32]:
        """Return the scales for the largest magnitudes given, of any shape; 1 where they are zero."""
        scale = np.asarray(largest / self.largest, np.float32)
        return np.where(scale > 0, scale, np.float32(1))

    def round(self, values: Array, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return values as they are after quantising and dequantising, as QuantizeLinear does it: to the nearest, saturated."""
        rounded: NDArray[np.float32] = np.divide(values, scale, dtype=np.float32)
        if self.kind == TensorProto.INT8:
            np.clip(np.rint(rounded, out=rounded), -128, 127, out=rounded)
        else:
            np.clip(rounded, -self.largest, self.largest, out=rounded)
            rounded = rounded.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        rounded *= scale
        return rounded


INT8 = EightBit("int8", 127.0, TensorProto.INT8, 13)
FP8 = EightBit("fp8", 448.0, TensorProto.FLOAT8E4M3FN, 19)
EIGHT_BIT = {kind.name: kind for kind in (INT8, FP8)}


def quantized_types(model: ModelProto) -> QuantizedTypes | None:
    """Return the 8-bit types of a file's pairs as its metadata says them, `int8+fp8`, whoever wrote them; None without pairs."""
    points = {
        node.input[2]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2
    }
    found = {tensor.data_type for tensor in model.graph.initializer if tensor.name in points}
    names = "+".join(kind.name for kind in (INT8, FP8) if kind.kind in found)
    return cast(QuantizedTypes, names) if names else None
