"""What matching asks of an onnx-graphsurgeon graph: who computes a tensor, who reads it, what is constant, what depends on data.

Tensors are known by name and nodes by their place in the list: graphsurgeon's own objects compare by content and cannot be
keys. Nothing here changes the graph, and constants are read one at a time, when they are looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx
from onnx_graphsurgeon.ir.tensor import SparseValues

from fna.errors import InputFileError
from fna.export.surgery.graph.files import folder_of, one_line, stored_value

STANDARD_DOMAINS = (None, "", "ai.onnx")
"""graphsurgeon says None where a file says nothing."""
MICROSOFT = "com.microsoft"
LARGEST_CONSTANT = 1 << 24
"""Elements: constants above this are not read for matching (masks of 4096 x 4096 are)."""


class GraphView:
    """Producers, readers and constants of a graph whose nodes are in topological order."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.folder = folder_of(graph)
        self.nodes: list[gs.Node] = list(graph.nodes)
        self.tensors: dict[str, gs.Tensor] = graph.tensors()
        self.initializers: dict[str, gs.Constant] = {
            name: tensor
            for name, tensor in self.tensors.items()
            if isinstance(tensor, gs.Constant) and not isinstance(tensor._values, SparseValues)
        }
        self.inputs: list[gs.Variable] = list(graph.inputs)
        self.outputs = {tensor.name for tensor in graph.outputs}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in output_names(node):
                if name:
                    self.producer[name] = index
            for name in dict.fromkeys(all_inputs(node)):
                self.consumers[name].append(index)
        self._constants: dict[str, NDArray[Any] | None] = {}

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self.graph.opset)

    @cached_property
    def live(self) -> set[int]:
        """Indices of the nodes that some graph output needs."""
        return self.needed_for(self.outputs)

    def needed_for(self, names: set[str]) -> set[int]:
        """Indices of all nodes that `names` are computed from."""
        seen: set[int] = set()
        todo = [self.producer[name] for name in names if name in self.producer]
        while todo:
            index = todo.pop()
            if index in seen:
                continue
            seen.add(index)
            todo.extend(self.producer[name] for name in all_inputs(self.nodes[index]) if name in self.producer)
        return seen

    @cached_property
    def data(self) -> set[str]:
        """Names of the tensors whose values depend on a graph input's values (not only on its shape)."""
        dependent = {tensor.name for tensor in self.inputs}
        for node in self.nodes:
            if node.op in ("Shape", "Size") and node.domain in STANDARD_DOMAINS:
                continue
            names = input_names(node)[:1] if node.op in ("CastLike", "EyeLike") else list(all_inputs(node))
            if node.op.startswith("Random") or any(name in dependent for name in names):
                dependent.update(name for name in output_names(node) if name)
        return dependent

    def source(self, name: str) -> gs.Node | None:
        """The node that computes `name`; None for inputs and initializers."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

    def readers(self, name: str) -> list[int]:
        """Indices of the live nodes that read `name`."""
        return [index for index in self.consumers.get(name, ()) if index in self.live]

    def constant(self, name: str) -> NDArray[Any] | None:
        """Value of an initializer or Constant node; None for all else and for very large ones.

        Raises:
            InputFileError: if the file does not hold what its header promises.
        """
        if name not in self._constants:
            self._constants[name] = self._read_constant(name)
        return self._constants[name]

    def _read_constant(self, name: str) -> NDArray[Any] | None:
        tensor = self.initializers.get(name)
        if tensor is None:
            node = self.source(name)
            return constant_node_value(node) if node is not None and node.op == "Constant" else None
        if int(np.prod(tensor.shape, dtype=np.float64)) > LARGEST_CONSTANT:
            return None
        try:
            return stored_value(tensor)
        except Exception as error:
            raise InputFileError(f"initializer {name!r} cannot be read: {one_line(error)}") from None


def constant_node_value(node: gs.Node) -> NDArray[Any] | None:
    """Value of a Constant node, whichever of its attributes holds it."""
    for name, value in node.attrs.items():
        if name == "value":
            return stored_value(value)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
    return None


def input_names(node: gs.Node) -> list[str]:
    """Names of the tensors that a node reads, empty where an optional one is left out."""
    return [tensor.name for tensor in node.inputs]


def output_names(node: gs.Node) -> list[str]:
    """Names of the tensors that a node writes, empty where an optional one is left out."""
    return [tensor.name for tensor in node.outputs]


def attribute(node: gs.Node, name: str, default: Any = None) -> Any:
    """One attribute of a node: a Python value, a `gs.Constant` or a `gs.Graph`."""
    return node.attrs.get(name, default)


def element_type(tensor: gs.Tensor) -> int:
    """ONNX element type of a tensor; 0 where none is declared, or it is no plain tensor."""
    if tensor.dtype is None or getattr(tensor, "type", "tensor_type") != "tensor_type":
        return 0
    return int(dtype_to_onnx(tensor.dtype))


def subgraphs(node: gs.Node) -> list[gs.Graph]:
    """Bodies of If, Loop and Scan."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def all_inputs(node: gs.Node) -> Iterator[str]:
    """Names that a node reads, those that its bodies take from outside included."""
    for tensor in node.inputs:
        if tensor.name:
            yield tensor.name
    for body in subgraphs(node):
        yield from captured_names(body)


def captured_names(body: gs.Graph) -> Iterator[str]:
    """Names that a body reads and does not compute; its own constants are among them."""
    own = {tensor.name for tensor in body.inputs} | {name for node in body.nodes for name in output_names(node)}
    for node in body.nodes:
        yield from (name for name in all_inputs(node) if name not in own)
    yield from (tensor.name for tensor in body.outputs if tensor.name not in own)


def words(text: str) -> frozenset[str]:
    """The words of a text, for sets of operator names."""
    return frozenset(text.split())
