"""Values of small tensors that do not depend on the image: shapes, axes, scales, masks. NumPy, one operator at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from fna.export.surgery.graph.index import attribute, constant_node_value

Array = NDArray[Any]
LARGEST_FOLDED = 1 << 22
"""Elements; larger results are not formed."""


class CannotFoldError(Exception):
    """The value is not computed here; nothing is wrong with the graph."""


def fold(node: NodeProto, values: Sequence[Array | None]) -> list[Array]:
    """Compute a node's outputs from its inputs' values.

    Raises:
        CannotFoldError: for operators that are not listed, or results that are too large.
    """
    rule = RULES.get(node.op_type)
    if rule is None:
        raise CannotFoldError
    with np.errstate(all="ignore"):
        result = rule(node, list(values))
    outputs = result if isinstance(result, list) else [result]
    return [np.asarray(item) for item in outputs]


def numpy_type(element_type: int) -> np.dtype[Any]:
    """The NumPy type of an ONNX element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def axes_of(node: NodeProto, values: Sequence[Array | None], slot: int = 1) -> list[int] | None:
    """Axes that are an attribute in old opsets and an input in new ones."""
    given = attribute(node, "axes")
    if given is not None:
        return [int(axis) for axis in given]
    if len(values) > slot and values[slot] is not None:
        return [int(axis) for axis in np.asarray(values[slot]).reshape(-1)]
    return None


def slices_of(node: NodeProto, values: Sequence[Array | None], rank: int) -> tuple[slice, ...]:
    """The index that a Slice node takes, one slice per axis."""
    if any(value is None for value in values[1:3]) or len(values) < 3:
        raise CannotFoldError
    starts, ends = (np.asarray(value).reshape(-1) for value in values[1:3])
    axes = range(len(starts)) if len(values) < 4 or values[3] is None else np.asarray(values[3]).reshape(-1)
    steps = [1] * len(starts) if len(values) < 5 or values[4] is None else np.asarray(values[4]).reshape(-1)
    index = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop: int | None = int(end)
        if int(step) < 0 and int(end) < -(1 << 31):
            stop = None
        index[int(axis)] = slice(int(start), stop, int(step))
    return tuple(index)


def reshape_target(node: NodeProto, shape: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
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


def split_sizes(node: NodeProto, values: Sequence[Array | None], total: int) -> list[int]:
    """Sizes of the pieces of a Split."""
    given = attribute(node, "split")
    if given is None and len(values) > 1 and values[1] is not None:
        given = np.asarray(values[1]).reshape(-1)
    if given is not None:
        return [int(size) for size in given]
    pieces = len(node.output)
    size = -(-total // pieces)
    return [size] * (pieces - 1) + [total - size * (pieces - 1)]


def _need(values: Sequence[Array | None], count: int) -> list[Array]:
    if len(values) < count or any(value is None for value in values[:count]):
        raise CannotFoldError
    return [np.asarray(value) for value in values[:count]]


def _guard(size: float) -> None:
    if size > LARGEST_FOLDED:
        raise CannotFoldError


def _unary(function: Callable[[Array], Array]) -> Callable[[NodeProto, list[Array | None]], Array]:
    return lambda node, values: function(_need(values, 1)[0])


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[NodeProto, list[Array | None]], Array]:
    def rule(node: NodeProto, values: list[Array | None]) -> Array:
        left, right = _need(values, 2)
        _guard(float(np.prod(np.broadcast_shapes(left.shape, right.shape), dtype=np.float64)))
        return function(left, right)

    return rule


def _divide(left: Array, right: Array) -> Array:
    if np.issubdtype(left.dtype, np.integer):
        safe = np.where(right == 0, 1, right)
        magnitude = np.abs(left) // np.abs(safe)
        return (np.sign(left) * np.sign(safe) * magnitude).astype(left.dtype)
    return left / right


def _cast(node: NodeProto, values: list[Array | None]) -> Array:
    return _need(values, 1)[0].astype(numpy_type(int(attribute(node, "to"))))


def _gather(node: NodeProto, values: list[Array | None]) -> Array:
    data, index = _need(values, 2)
    axis = int(attribute(node, "axis", 0))
    return np.take(data, index, axis=axis)


def _unsqueeze(node: NodeProto, values: list[Array | None]) -> Array:
    axes = axes_of(node, values)
    if axes is None:
        raise CannotFoldError
    return np.expand_dims(_need(values, 1)[0], tuple(axes))


def _squeeze(node: NodeProto, values: list[Array | None]) -> Array:
    axes = axes_of(node, values)
    return np.squeeze(_need(values, 1)[0], None if axes is None else tuple(axes))


def _concat(node: NodeProto, values: list[Array | None]) -> Array:
    return np.concatenate(_need(values, len(node.input)), axis=int(attribute(node, "axis")))


def _slice(node: NodeProto, values: list[Array | None]) -> Array:
    data = _need(values, 3)[0]
    return data[slices_of(node, values, data.ndim)]


def _reshape(node: NodeProto, values: list[Array | None]) -> Array:
    data, wanted = _need(values, 2)
    return data.reshape(reshape_target(node, data.shape, wanted.tolist()))


def _transpose(node: NodeProto, values: list[Array | None]) -> Array:
    return np.transpose(_need(values, 1)[0], attribute(node, "perm"))


def _expand(node: NodeProto, values: list[Array | None]) -> Array:
    data, wanted = _need(values, 2)
    shape = np.broadcast_shapes(data.shape, tuple(int(size) for size in wanted))
    _guard(float(np.prod(shape, dtype=np.float64)))
    return np.ascontiguousarray(np.broadcast_to(data, shape))


def _constant_of_shape(node: NodeProto, values: list[Array | None]) -> Array:
    shape = _need(values, 1)[0]
    _guard(float(np.prod(shape, dtype=np.float64)))
    tensor = attribute(node, "value")
    value = np.zeros(1, np.float32) if tensor is None else onnx.numpy_helper.to_array(tensor)
    return np.full([int(size) for size in shape], value.reshape(-1)[0], value.dtype)


def _range(node: NodeProto, values: list[Array | None]) -> Array:
    start, limit, delta = (value.reshape(-1)[0] for value in _need(values, 3))
    if delta == 0:
        raise CannotFoldError
    _guard(abs(float((limit - start) / delta)))
    return np.arange(start, limit, delta, dtype=np.asarray(start).dtype)


def _where(node: NodeProto, values: list[Array | None]) -> Array:
    condition, yes, no = _need(values, 3)
    _guard(float(np.prod(np.broadcast_shapes(condition.shape, yes.shape, no.shape), dtype=np.float64)))
    return np.where(condition, yes, no)


def _tile(node: NodeProto, values: list[Array | None]) -> Array:
    data, repeats = _need(values, 2)
    _guard(data.size * float(np.prod(repeats, dtype=np.float64)))
    return np.tile(data, repeats)


def _reduce(function: Callable[..., Array]) -> Callable[[NodeProto, list[Array | None]], Array]:
    def rule(node: NodeProto, values: list[Array | None]) -> Array:
        axes = axes_of(node, values)
        data = _need(values, 1)[0]
        if axes is None and attribute(node, "noop_with_empty_axes", 0):
            return data
        axis = None if not axes else tuple(axes)
        return np.asarray(function(data, axis=axis, keepdims=bool(attribute(node, "keepdims", 1)))).astype(data.dtype)

    return rule


def _clip(node: NodeProto, values: list[Array | None]) -> Array:
    data = _need(values, 1)[0]
    low = values[1] if len(values) > 1 else None
    high = values[2] if len(values) > 2 else None
    if (len(node.input) > 1 and node.input[1] and low is None) or (
        len(node.input) > 2 and node.input[2] and high is None
    ):
        raise CannotFoldError
    return np.clip(data, low, high)


def _trilu(node: NodeProto, values: list[Array | None]) -> Array:
    data = _need(values, 1)[0]
    offset = int(np.asarray(values[1]).reshape(-1)[0]) if len(values) > 1 and values[1] is not None else 0
    return np.triu(data, offset) if attribute(node, "upper", 1) else np.tril(data, offset)


def _split(node: NodeProto, values: list[Array | None]) -> list[Array]:
    data = _need(values, 1)[0]
    axis = int(attribute(node, "axis", 0))
    sizes = split_sizes(node, values, data.shape[axis])
    return list(np.split(data, np.cumsum(sizes)[:-1], axis=axis))


def _constant(node: NodeProto, values: list[Array | None]) -> Array:
    value = constant_node_value(node)
    if value is None:
        raise CannotFoldError
    return value


def _matmul(node: NodeProto, values: list[Array | None]) -> Array:
    left, right = _need(values, 2)
    _guard(float(left.size) * float(right.size))
    return left @ right


def _many(function: Callable[[Array, Array], Array]) -> Callable[[NodeProto, list[Array | None]], Array]:
    def rule(node: NodeProto, values: list[Array | None]) -> Array:
        first, *rest = _need(values, len(node.input))
        for item in rest:
            first = function(first, item)
        return first

    return rule


RULES: dict[str, Callable[[NodeProto, list[Array | None]], Array | list[Array]]] = {
    "Abs": _unary(np.abs),
    "Add": _binary(np.add),
    "And": _binary(np.logical_and),
    "Cast": _cast,
    "Ceil": _unary(np.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _unary(np.cos),
    "CumSum": lambda node, values: np.cumsum(_need(values, 2)[0], axis=int(_need(values, 2)[1].reshape(-1)[0])),
    "Div": _binary(_divide),
    "Dropout": _unary(lambda x: x),
    "Equal": _binary(np.equal),
    "Exp": _unary(np.exp),
    "Expand": _expand,
    "Flatten": lambda node, values: _flatten(node, _need(values, 1)[0]),
    "Floor": _unary(np.floor),
    "Gather": _gather,
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Identity": _unary(lambda x: x),
    "IsInf": _unary(np.isinf),
    "IsNaN": _unary(np.isnan),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Log": _unary(np.log),
    "MatMul": _matmul,
    "Max": _many(np.maximum),
    "Min": _many(np.minimum),
    "Mod": _binary(lambda a, b: np.mod(a, np.where(b == 0, 1, b))),
    "Mul": _binary(np.multiply),
    "Neg": _unary(np.negative),
    "Not": _unary(np.logical_not),
    "Or": _binary(np.logical_or),
    "Pow": _binary(lambda a, b: np.power(a.astype(np.float64), b).astype(a.dtype)),
    "Range": _range,
    "Reciprocal": _unary(lambda x: 1 / x),
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Sigmoid": _unary(lambda x: 1 / (1 + np.exp(-x))),
    "Sin": _unary(np.sin),
    "Slice": _slice,
    "Softplus": _unary(lambda x: np.logaddexp(x, np.zeros_like(x))),
    "Split": _split,
    "Sqrt": _unary(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(np.subtract),
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": _binary(np.logical_xor),
}


def _flatten(node: NodeProto, data: Array) -> Array:
    axis = int(attribute(node, "axis", 1))
    axis += data.ndim if axis < 0 else 0
    return data.reshape(int(np.prod(data.shape[:axis], dtype=np.int64)), -1)
