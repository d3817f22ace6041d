"""The linear layers of a file, products with a constant matrix and the bias behind them, and changes to their constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fna.export.blocks import find_blocks

Array = NDArray[np.floating]
LINEAR = ("MatMul", "Gemm")
_SHAPE_ONLY = ("Shape", "Size")


@dataclass(frozen=True)
class LinearLayer:
    """One `x @ weight + bias`.

    Attributes:
        node: the MatMul or Gemm.
        source: the tensor that enters, `[..., K]`.
        block: that it belongs to; None outside all blocks.
    """

    node: NodeProto
    source: str
    block: int | None

    @property
    def name(self) -> str:
        """The name of its node."""
        return str(self.node.name or self.node.output[0])

    @property
    def is_transposed(self) -> bool:
        """Whether the file holds the weight as `[M, K]`."""
        return self.node.op_type == "Gemm" and _attribute(self.node, "transB") == 1


class LinearGraph:
    """A model's nodes and constants, looked up and changed in place; `finish` writes the nodes back.

    A constant that changes becomes an initializer of the changed place alone, so other readers keep the old one.
    """

    def __init__(self, model: ModelProto) -> None:
        """Look up the nodes of `model`, whose tensors are loaded."""
        self._graph = model.graph
        self.nodes = list(model.graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self._constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t
        self._outputs = {value.name for value in model.graph.output}
        self._taken = {*self._constants, *self.makers, *(name for node in self.nodes for name in node.input)}

    def readers(self, tensor: str) -> list[NodeProto]:
        """Return the nodes that use a tensor's values; those that use its shape alone do not count."""
        return [node for node in self.nodes if tensor in node.input and node.op_type not in _SHAPE_ONLY]

    def is_read_by_these_alone(self, tensor: str, nodes: Sequence[NodeProto]) -> bool:
        """Return whether a tensor's values go nowhere else."""
        return tensor not in self._outputs and all(
            any(node is other for other in nodes) for node in self.readers(tensor)
        )

    def constant(self, tensor: str) -> Array | None:
        """Return the values of an fp32 constant; None for what is not one."""
        found = self._constants.get(tensor)
        return numpy_helper.to_array(found) if found is not None and found.data_type == TensorProto.FLOAT else None

    def constant_side(self, node: NodeProto) -> int | None:
        """Return which of a node's two inputs is an fp32 constant; None for neither or both."""
        kinds = [self._constants.get(name) for name in node.input]
        sides = [side for side, kind in enumerate(kinds) if kind is not None and kind.data_type == TensorProto.FLOAT]
        return sides[0] if len(sides) == 1 and len(kinds) == 2 else None

    def weight(self, layer: LinearLayer) -> Array:
        """Return a layer's weight, `[K, M]`."""
        weight = self.constant(layer.node.input[1])
        assert weight is not None  # find_linear_layers takes no others
        return weight.T if layer.is_transposed else weight

    def set_weight(self, layer: LinearLayer, weight: Array) -> None:
        """Give a layer another weight, `[K, M]`."""
        self.set_constant(layer.node, 1, weight.T if layer.is_transposed else weight)

    def add_to_bias(self, layer: LinearLayer, difference: Array) -> None:
        """Add `[M]` to a layer's bias; a layer that has none gets one."""
        node, side = self._bias_of(layer)
        if side is None:
            product = layer.node.output[0]
            layer.node.output[0] = self._new_name(f"{product}/without_bias")
            self.makers[layer.node.output[0]] = self.makers.pop(product)
            self.insert("Add", [layer.node.output[0], self.add_constant(f"{product}/bias", difference)], product)
            return
        bias = self.constant(node.input[side]) if side < len(node.input) else None
        self.set_constant(node, side, difference if bias is None else bias.astype(np.float64) + difference)

    def _bias_of(self, layer: LinearLayer) -> tuple[NodeProto, int | None]:
        """The node that adds the bias, and at which input; None where there is none."""
        if layer.node.op_type == "Gemm":
            return layer.node, 2
        readers = self.readers(layer.node.output[0])
        if len(readers) == 1 and readers[0].op_type == "Add" and layer.node.output[0] not in self._outputs:
            return readers[0], self.constant_side(readers[0])
        return layer.node, None

    def set_constant(self, node: NodeProto, position: int, values: Array) -> None:
        """Give one input of one node other values, in fp32."""
        old = node.input[position] if position < len(node.input) else ""
        name = self.add_constant(old or f"{node.output[0]}/input{position}", values)
        node.input.extend([""] * (position + 1 - len(node.input)))
        node.input[position] = name

    def add_constant(self, name: str, values: NDArray[np.generic], kind: int = TensorProto.FLOAT) -> str:
        """Add an initializer and return its name, which is `name` or begins with it."""
        name = self._new_name(name)
        if kind == TensorProto.FLOAT:
            tensor = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        else:
            tensor = helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())
        self._constants[name] = tensor
        return name

    def insert(self, op_type: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        """Put a node right behind those that make its inputs, and return its output's name."""
        output = output if output not in self.makers else self._new_name(output)
        node = helper.make_node(op_type, inputs, [output], name=self._new_name(f"{output}/{op_type}"), **attributes)
        makers = [self.makers[value] for value in inputs if value in self.makers]
        places = [index for index, other in enumerate(self.nodes) if any(other is maker for maker in makers)]
        self.nodes.insert(max(places) + 1 if places else 0, node)
        self.makers[output] = node
        return output

    def finish(self) -> None:
        """Write the nodes back, and with them the constants that something reads."""
        read = {name for node in self.nodes for name in node.input} | self._outputs
        own = {tensor.name for tensor in self._graph.initializer}
        unread = [tensor for tensor in self._graph.initializer if tensor.name not in read]
        made = {name for node in self.nodes if node.op_type == "Constant" for name in node.output}
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        for tensor in unread:
            self._graph.initializer.remove(tensor)
        self._graph.initializer.extend(
            tensor for name, tensor in self._constants.items() if name in read and name not in own and name not in made
        )
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _new_name(self, name: str) -> str:
        new, count = name, 1
        while new in self._taken:
            count += 1
            new = f"{name}#{count}"
        self._taken.add(new)
        return new


def find_linear_layers(graph: LinearGraph, model: ModelProto, num_blocks: int) -> list[LinearLayer]:
    """Return the products with a constant matrix; those of attention have none.

    Args:
        graph: of `model`.
        model: with its nodes in topological order.
        num_blocks: attention blocks, as the file's plan counts them.
    """
    blocks = find_blocks(model, num_blocks)
    return [
        LinearLayer(node, node.input[0], blocks.get(node.output[0])) for node in graph.nodes if _is_linear(graph, node)
    ]


def _is_linear(graph: LinearGraph, node: NodeProto) -> bool:
    if node.op_type not in LINEAR or node.domain not in ("", "ai.onnx"):
        return False
    weight = graph.constant(node.input[1])
    if weight is None or weight.ndim != 2 or graph.constant(node.input[0]) is not None:
        return False
    if node.op_type == "MatMul":
        return True
    plain = _attribute(node, "transA") in (None, 0) and all(
        _attribute(node, name) in (None, 1.0) for name in ("alpha", "beta")
    )
    return plain and (len(node.input) < 3 or not node.input[2] or graph.constant(node.input[2]) is not None)


def _attribute(node: NodeProto, name: str) -> float | None:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return None if found is None else float(helper.get_attribute_value(found))
