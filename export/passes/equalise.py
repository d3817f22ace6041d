"""Making what enters each linear layer easy to quantise, without changing what the file computes.

One int8 scale covers all channels of a tensor, but a Vision Transformer's channels lie off centre, and a few are many times as wide as
the rest. So the middle of each channel's range is taken off and what stands out is divided down, in constants that are there already
(a norm's weight and bias, the factor of a GELU) or in a node of their own; the layer's weight and bias take both back:

    x = scale * y + shift,   x W + b = y (scale W) + (shift W + b)

What comes straight out of attention cannot be shifted through it: FNA's rows need not sum to 1. But every kind of attention treats
each channel of its values by itself and linearly, so a division goes through it, into the weight and bias that make the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import OPERATORS
from fna.export.passes.linear import Array, LinearGraph, LinearLayer

_MOVES = (
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Cast",
    "Identity",
    "Slice",
    "Concat",
    "Gather",
    "Flatten",
    "Split",
)
"""Operators that hand values on in another order."""
_ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Relu", "Gelu", "Sigmoid", "Tanh", "Elu", "Selu", "Swish", "HardSwish", "Clip", "QuickGelu",
    "LeakyRelu", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization", "GroupNormalization",
)  # fmt: skip

_SWAP_HEADS = [0, 2, 1, 3]


@dataclass(frozen=True)
class Equalisation:
    """How a tensor becomes the one that is quantised: `(x - shift) / scale`; both `[K]`."""

    shift: NDArray[np.float64]
    scale: NDArray[np.float64]


class Freedom(Enum):
    """What may be done to a tensor before it is quantised."""

    NONE = "none"
    SCALE = "scale"
    ALL = "shift and scale"


def find_freedom(graph: LinearGraph, source: str, layers: Sequence[LinearLayer]) -> Freedom:
    """Return what may be done to the input of linear layers: all to what a norm or a function by elements made.

    What comes straight out of attention can be scaled where its values come from a weight and nowhere else.
    """
    maker = graph.makers.get(source)
    while maker is not None and maker.op_type in _MOVES:
        maker = graph.makers.get(maker.input[0])
    if maker is not None and maker.op_type in _ELEMENTWISE and maker.domain in ("", "ai.onnx", "com.microsoft"):
        return Freedom.ALL
    values = _values_of_attention(graph, source, [layer.node for layer in layers])
    size = len(graph.weight(layers[0]))
    return Freedom.SCALE if values is not None and _factors(graph, *values, size) is not None else Freedom.NONE


def equalise(graph: LinearGraph, source: str, layers: Sequence[LinearLayer], chosen: Equalisation) -> str:
    """Shift and scale what enters linear layers, in place, and return the tensor that enters them now.

    Args:
        graph: the file's.
        source: the tensor `[..., K]` that enters.
        layers: all linear layers that it enters.
        chosen: the shift and scale.
    """
    for layer in layers:
        weight = graph.weight(layer).astype(np.float64)
        if chosen.shift.any():
            graph.add_to_bias(layer, chosen.shift @ weight)
        if (chosen.scale != 1).any():
            graph.set_weight(layer, chosen.scale[:, None] * weight)
    nodes = [layer.node for layer in layers]
    tensor = _divide(graph, source, nodes, chosen.scale)
    tensor = _subtract(graph, tensor, nodes, chosen.shift / chosen.scale)
    for node in nodes:
        node.input[0] = tensor
    return tensor


def _divide(graph: LinearGraph, tensor: str, readers: Sequence[NodeProto], scale: NDArray[np.float64]) -> str:
    """Divide a tensor by `[K]` in the constants that make it; in a node where there are none."""
    if (scale == 1).all():
        return tensor
    places = _factors(graph, *(_values_of_attention(graph, tensor, readers) or (tensor, readers)), scale.size)
    if places is None:
        return graph.insert("Mul", [tensor, graph.add_constant(f"{tensor}/factor", 1 / scale)], f"{tensor}/scaled")
    for node, position in places:
        values = graph.constant(node.input[position])
        assert values is not None
        graph.set_constant(node, position, values / scale)
    return tensor


def _subtract(graph: LinearGraph, tensor: str, readers: Sequence[NodeProto], shift: NDArray[np.float64]) -> str:
    """Subtract `[K]` from a tensor in the constant that was added last; in a node where there is none."""
    if not shift.any():
        return tensor
    maker = graph.makers[tensor]
    if graph.is_read_by_these_alone(tensor, readers):
        position = 2 if maker.op_type == "LayerNormalization" else None
        if maker.op_type == "Add":
            position = graph.constant_side(maker)
        if position is not None:
            values = graph.constant(maker.input[position]) if position < len(maker.input) else np.zeros(1)
            if values is not None and _is_per_channel(values, shift.size):
                graph.set_constant(maker, position, values - shift)
                return tensor
    return graph.insert("Sub", [tensor, graph.add_constant(f"{tensor}/middle", shift)], f"{tensor}/shifted")


def _factors(
    graph: LinearGraph, tensor: str, readers: Sequence[NodeProto], size: int
) -> list[tuple[NodeProto, int]] | None:
    """The constants that divide a tensor when they are divided, as (node, position of its input); None where there are none."""
    maker = graph.makers.get(tensor)
    if maker is None or not graph.is_read_by_these_alone(tensor, readers):
        return None
    if maker.op_type == "LayerNormalization":
        places = [(maker, position) for position in range(1, len(maker.input)) if maker.input[position]]
    elif maker.op_type in ("Mul", "Add") and (side := graph.constant_side(maker)) is not None:
        places = [(maker, side)]
        if maker.op_type == "Add":
            inner = _factors(graph, maker.input[1 - side], [maker], size)
            if inner is None:
                return None
            places += inner
    elif maker.op_type == "MatMul":
        places = [(maker, 1)]
    elif maker.op_type == "Mul":
        either = (_factors(graph, factor, [maker], size) for factor in maker.input)
        return next((places for places in either if places is not None), None)
    else:
        return None
    values = [(node, graph.constant(node.input[position])) for node, position in places]
    fits = (
        value is not None and (_is_per_channel(value, size) or _is_weight(node, value, size)) for node, value in values
    )
    return places if all(fits) else None


def _values_of_attention(
    graph: LinearGraph, tensor: str, readers: Sequence[NodeProto]
) -> tuple[str, list[NodeProto]] | None:
    """Of a tensor `[B, N, H D]` straight out of attention, the tensor of that shape that its values are, and what reads it.

    None where it is something else, its heads are laid out otherwise, or something else reads the values.
    """
    attention = _past_heads(graph, tensor, readers)
    maker = None if attention is None else graph.makers.get(attention[0])
    if attention is None or maker is None or not graph.is_read_by_these_alone(*attention):
        return None
    operator = OPERATORS.get(maker.op_type) if maker.domain == DOMAIN else None
    if operator is not None and operator.attends:
        value = maker.input[[formal.name for formal in operator.inputs].index("value")]
    elif maker.op_type == "Attention":
        value = maker.input[2]
    elif maker.op_type == "MatMul" and _is_softmax(graph, maker.input[0]):
        value = maker.input[1]
    else:
        return None
    return _past_heads(graph, value, [maker])


def _past_heads(graph: LinearGraph, tensor: str, readers: Sequence[NodeProto]) -> tuple[str, list[NodeProto]] | None:
    """Go up past the splitting or joining of heads to `(tensor, what reads it)`; None where there is none."""
    swaps, reader = 0, list(readers)
    while (maker := graph.makers.get(tensor)) is not None and maker.op_type in ("Reshape", "Transpose"):
        if not graph.is_read_by_these_alone(tensor, reader):
            return None
        if maker.op_type == "Transpose":
            swaps += list(maker.attribute[0].ints) == _SWAP_HEADS if maker.attribute else 2
        tensor, reader = maker.input[0], [maker]
    return (tensor, reader) if swaps == 1 else None


def _is_softmax(graph: LinearGraph, tensor: str) -> bool:
    maker = graph.makers.get(tensor)
    while maker is not None and maker.op_type == "Cast":
        maker = graph.makers.get(maker.input[0])
    return maker is not None and maker.op_type == "Softmax"


def _is_per_channel(values: Array, size: int) -> bool:
    """Whether a constant is one number, or one for each channel of the last axis."""
    return values.size == 1 or (values.size == size and values.shape[-1] == size)


def _is_weight(node: NodeProto, values: Array, size: int) -> bool:
    return node.op_type == "MatMul" and values.ndim == 2 and values.shape[1] == size
