"""Layer scale, worked into the weights of the linear layer before it.

DINOv2 and its kin multiply each branch by a constant per channel (layer scale) after its last linear layer. The exporter leaves that
as a product over all tokens; here it becomes part of the weights, where it costs nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper


@dataclass(frozen=True)
class _ScaledLinear:
    """One `(x @ weight + bias) * scale`; `add` is None for a linear layer without a bias."""

    product: NodeProto
    add: NodeProto | None
    multiply: NodeProto
    scale: str


def fold_channel_scales(graph: GraphProto) -> int:
    """Fold each constant per-channel factor behind a linear layer into the layer's weight and bias, in place.

    Only fp32 layers are touched (a folded fp16 weight could underflow), and only where nothing else reads what changes.

    Args:
        graph: whose linear layers are `MatMul(x, weight [K, M])` and, if biased, `Add(product, bias [M])`, with
            `Mul(..., scale [M])` after.

    Returns:
        How many factors were folded.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    layers = _find(graph, constants)
    for layer in layers:
        scale = numpy_helper.to_array(constants[layer.scale])
        last = layer.add or layer.product
        _scale_constant(graph, constants, layer.product, 1, scale)
        if layer.add is not None:
            _scale_constant(graph, constants, layer.add, _constant_side(layer.add, constants), scale)
        last.output[0] = layer.multiply.output[0]
        graph.node.remove(layer.multiply)
    _drop_unread(graph, {layer.scale for layer in layers})
    return len(layers)


def _find(graph: GraphProto, constants: dict[str, TensorProto]) -> list[_ScaledLinear]:
    producers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    layers = []
    for multiply in graph.node:
        if multiply.op_type != "Mul" or (side := _constant_side(multiply, constants)) is None:
            continue
        scale = constants[multiply.input[side]]
        inner = producers.get(multiply.input[1 - side])
        add = inner if inner is not None and inner.op_type == "Add" else None
        if add is not None:
            bias_side = _constant_side(add, constants)
            if bias_side is None or list(constants[add.input[bias_side]].dims) != list(scale.dims):
                continue
            inner = producers.get(add.input[1 - bias_side])
        if inner is None or inner.op_type != "MatMul" or inner.input[1] not in constants:
            continue
        weight = constants[inner.input[1]]
        fits = len(weight.dims) == 2 and list(scale.dims) == [weight.dims[1]]
        typed = {tensor.data_type for tensor in (weight, scale)} == {TensorProto.FLOAT}
        private = all(readers[node.output[0]] == 1 for node in (inner, add) if node is not None)
        if fits and typed and private:
            layers.append(_ScaledLinear(inner, add, multiply, scale.name))
    return layers


def _constant_side(node: NodeProto, constants: dict[str, TensorProto]) -> int | None:
    sides = [index for index, name in enumerate(node.input) if name in constants]
    return sides[0] if len(sides) == 1 else None


def _scale_constant(
    graph: GraphProto,
    constants: dict[str, TensorProto],
    node: NodeProto,
    position: int | None,
    scale: NDArray[np.float32],  # [M]
) -> None:
    """Give one node its own scaled copy of a constant; the copy takes the name where no other node reads the original."""
    assert position is not None
    name = node.input[position]
    scaled = (numpy_helper.to_array(constants[name]).astype(np.float64) * scale).astype(np.float32)
    shared = sum(list(other.input).count(name) for other in graph.node) > 1
    new_name = f"{name}.scaled.{node.name or node.output[0]}" if shared else name
    tensor = numpy_helper.from_array(scaled, new_name)
    if shared:
        graph.initializer.append(tensor)
        node.input[position] = new_name
    else:
        constants[name].CopyFrom(tensor)


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names - read]:
        graph.initializer.remove(tensor)
