"""Values of small tensors that do not depend on the image (shapes, axes, scales, masks), by onnx's reference operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.reference.ops import load_op

from fna.export.surgery.graph.files import node_proto
from fna.export.surgery.graph.view import attribute, constant_node_value, words

Array = NDArray[Any]
LARGEST_FOLDED = 1 << 22
"""Elements; larger results are not formed."""

FOLDED = words("""
    Abs Add And Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Exp Expand Flatten Floor Gather Greater
    GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pow Range Reciprocal ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum Reshape Sigmoid Sin Slice Softplus Split Sqrt Squeeze Sub Tile Transpose Trilu
    Unsqueeze Where Xor""")


class CannotFoldError(Exception):
    """The value is not computed here; nothing is wrong with the graph."""


def fold(node: gs.Node, values: Sequence[Array | None], opset: int) -> list[Array]:
    """Compute a node's outputs from its inputs' values.

    Raises:
        CannotFoldError: for operators that are not listed, or results that are too large.
        ValueError: if the operator cannot take these values.
    """
    if node.op == "Constant":
        value = constant_node_value(node)
        if value is None:
            raise CannotFoldError
        return [np.asarray(value)]
    if node.op == "Dropout" and values[0] is not None:
        return [values[0]]
    if node.op not in FOLDED:
        raise CannotFoldError
    if any(value is None and tensor.name for value, tensor in zip(values, node.inputs, strict=True)):
        raise CannotFoldError
    arrays = [None if value is None else np.asarray(value) for value in values]
    estimate = SIZES.get(node.op, _broadcast_size)(arrays)
    if not estimate <= LARGEST_FOLDED:
        raise CannotFoldError
    try:
        with np.errstate(all="ignore"):
            operator = _operator(node.op, opset)(node_proto(node), RUN_PARAMETERS)
            return [np.asarray(result) for result in operator.run(*arrays)]
    except Exception as error:  # the reference operators raise whatever NumPy does, and errors of their own
        raise ValueError(f"{node.op} cannot take its inputs: {error}") from None


RUN_PARAMETERS: dict[str, Any] = {"log": lambda *_: None, "opsets": {}, "new_ops": {}, "verbose": 0}


@cache
def _operator(op_type: str, opset: int) -> Any:
    return load_op("", op_type, opset)


def _broadcast_size(values: list[Any]) -> float:
    shapes = [value.shape for value in values if value is not None]
    try:
        return float(np.prod(np.broadcast_shapes(*shapes), dtype=np.float64))
    except ValueError:
        return 0.0


def _size(shape: Array | None) -> float:
    return float(np.prod(np.asarray(shape, np.float64)))


def _range_size(values: list[Any]) -> float:
    start, limit, step = (float(np.asarray(value).reshape(-1)[0]) for value in values)
    return abs((limit - start) / step) if step else float("inf")


SIZES: dict[str, Callable[[list[Any]], float]] = {
    "ConstantOfShape": lambda values: _size(values[0]),
    "Expand": lambda values: _size(np.maximum(*_aligned(values[0], values[1]))),
    "MatMul": lambda values: float(np.size(values[0])) * float(np.size(values[1])),
    "Range": _range_size,
    "Tile": lambda values: float(np.size(values[0])) * _size(values[1]),
    **dict.fromkeys(
        words("Cast Concat CumSum Flatten Gather Reshape Slice Split Squeeze Transpose Trilu Unsqueeze"),
        lambda values: 0.0,
    ),
}
"""Elements of a result, where it is not what broadcasting the inputs gives; 0 where it is no larger than they are."""


def _aligned(data: Any, wanted: Any) -> tuple[Array, Array]:
    """Two shapes of one rank."""
    left, right = list(np.shape(data)), [int(size) for size in np.asarray(wanted).reshape(-1)]
    rank = max(len(left), len(right))
    return np.asarray([1] * (rank - len(left)) + left), np.asarray([1] * (rank - len(right)) + right)


def numpy_type(element_type: int) -> np.dtype[Any]:
    """The NumPy type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def axes_of(node: gs.Node, values: Sequence[Array | None], slot: int = 1) -> list[int] | None:
    """Axes that are an attribute in old opsets and an input in new ones."""
    axes = attribute(node, "axes")
    if axes is not None:
        return [int(axis) for axis in axes]
    if len(values) > slot and values[slot] is not None:
        return [int(axis) for axis in np.asarray(values[slot]).reshape(-1)]
    return None


def reshape_target(node: gs.Node, shape: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Resolve the 0 and -1 of a Reshape."""
    keep_zero = bool(attribute(node, "allowzero", 0))
    target = [shape[i] if size == 0 and not keep_zero else int(size) for i, size in enumerate(wanted)]
    total = int(np.prod(shape, dtype=np.int64))
    if -1 in target:
        rest = int(np.prod([size for size in target if size != -1], dtype=np.int64))
        if target.count(-1) > 1 or rest == 0 or total % rest:
            raise ValueError(f"{list(shape)} cannot be reshaped to {list(wanted)}")
        target[target.index(-1)] = total // rest
    if int(np.prod(target, dtype=np.int64)) != total:
        raise ValueError(f"{list(shape)} cannot be reshaped to {list(wanted)}")
    return tuple(target)
