"""A read-only index over an ONNX graph, and safe loading of files that anyone may have written.

Nothing here changes the model. Weights in external files are read one at a time, when they are looked at.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from fna.errors import InputFileError

STANDARD_DOMAINS = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
LARGEST_CONSTANT = 1 << 24
"""Elements: constants above this are not read for matching (masks of 4096 x 4096 are)."""

MAX_PROTOBUF_BYTES = 2**31 - 1
"""A protobuf message cannot be larger; such models keep their weights in external data."""


class Graph:
    """Producers, consumers and constants of a model's main graph, its nodes in topological order."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.proto = model.graph
        self.initializers: dict[str, TensorProto] = {item.name: item for item in self.proto.initializer}
        self.sparse = {item.values.name for item in self.proto.sparse_initializer}
        self.inputs = [item for item in self.proto.input if item.name not in self.initializers]
        self.outputs = {item.name for item in self.proto.output}
        self.nodes, self.was_sorted = _sorted_nodes(self.proto, self.initializers, self.sparse)
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.producer[name] = index
            for name in dict.fromkeys(all_inputs(node)):
                self.consumers[name].append(index)
        self._constants: dict[str, NDArray[Any] | None] = {}

    @cached_property
    def opset(self) -> int:
        """Version of the standard operators."""
        for entry in self.model.opset_import:
            if entry.domain in STANDARD_DOMAINS:
                return int(entry.version)
        raise InputFileError("the file imports no standard operator set, so its operators have no meaning")

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
        found = {item.name for item in self.inputs}
        for node in self.nodes:
            if node.op_type in ("Shape", "Size") and node.domain in STANDARD_DOMAINS:
                continue
            names = node.input[:1] if node.op_type in ("CastLike", "EyeLike") else list(all_inputs(node))
            if node.op_type.startswith("Random") or any(name in found for name in names):
                found.update(name for name in node.output if name)
        return found

    def source(self, name: str) -> NodeProto | None:
        """The node that computes `name`; None for inputs and initializers."""
        index = self.producer.get(name)
        return None if index is None else self.nodes[index]

    def readers(self, name: str) -> list[int]:
        """Indices of the live nodes that read `name`."""
        return [index for index in self.consumers.get(name, ()) if index in self.live]

    def constant(self, name: str) -> NDArray[Any] | None:
        """Value of an initializer or Constant node; None for all else and for very large ones."""
        if name not in self._constants:
            self._constants[name] = self._read_constant(name)
        return self._constants[name]

    def _read_constant(self, name: str) -> NDArray[Any] | None:
        tensor = self.initializers.get(name)
        if tensor is None:
            node = self.source(name)
            return constant_node_value(node) if node is not None and node.op_type == "Constant" else None
        if int(np.prod(tensor.dims, dtype=np.float64)) > LARGEST_CONSTANT:
            return None
        try:
            return numpy_helper.to_array(tensor, base_dir=str(self.folder))
        except Exception as error:
            raise InputFileError(f"initializer {name!r} cannot be read: {one_line(error)}") from None


def constant_node_value(node: NodeProto) -> NDArray[Any] | None:
    """Value of a Constant node, whichever of its attributes holds it."""
    for item in node.attribute:
        if item.name == "value":
            return numpy_helper.to_array(item.t)
        if item.name in ("value_int", "value_ints"):
            return np.asarray(onnx.helper.get_attribute_value(item), np.int64)
        if item.name in ("value_float", "value_floats"):
            return np.asarray(onnx.helper.get_attribute_value(item), np.float32)
    return None


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values, strings decoded."""
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {
        name: value.decode("utf-8", "replace") if isinstance(value, bytes) else value for name, value in values.items()
    }


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """One attribute of a node as a Python value."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return default


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Bodies of If, Loop and Scan."""
    for item in node.attribute:
        if item.type == AttributeProto.GRAPH:
            yield item.g
        elif item.type == AttributeProto.GRAPHS:
            yield from item.graphs


def all_inputs(node: NodeProto) -> Iterator[str]:
    """Names a node reads, those that its bodies take from outside included."""
    for name in node.input:
        if name:
            yield name
    for body in subgraphs(node):
        yield from captured_names(body)


def captured_names(body: GraphProto) -> Iterator[str]:
    """Names that a body reads from the graphs around it."""
    own = {item.name for item in body.input} | {item.name for item in body.initializer}
    own |= {name for node in body.node for name in node.output}
    for node in body.node:
        for name in all_inputs(node):
            if name not in own:
                yield name
    for item in body.output:
        if item.name not in own:
            yield item.name


def words(text: str) -> frozenset[str]:
    """The words of a text, for sets of operator names."""
    return frozenset(text.split())


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def load_model(path: Path) -> ModelProto:
    """Read an ONNX file without its external data.

    Raises:
        InputFileError: if it is missing, empty or not an ONNX model, or its external data is missing or outside its folder.
    """
    if not path.is_file():
        raise InputFileError(f"{path} is not a file; give the path of an ONNX model")
    try:
        size = path.stat().st_size
        if size == 0:
            raise InputFileError(f"{path} is empty; give the path of an ONNX model")
        if size > MAX_PROTOBUF_BYTES:
            raise InputFileError(f"{path} is larger than 2 GB; save it with external data")
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError, UnicodeDecodeError, RuntimeError) as error:
        raise InputFileError(f"{path} cannot be read as an ONNX model: {one_line(error)}") from None
    if not model.graph.node:
        raise InputFileError(f"{path} is not an ONNX model, or holds no nodes")
    for tensor in all_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            external_file(tensor, path.parent)
    return model


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that is stored in a model: initializers and attributes, in bodies and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for item in graph.sparse_initializer:
        yield item.values
        yield item.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for item in node.attribute:
        if item.type == AttributeProto.TENSOR:
            yield item.t
        elif item.type == AttributeProto.TENSORS:
            yield from item.tensors
        elif item.type == AttributeProto.GRAPH:
            yield from _graph_tensors(item.g)
        elif item.type == AttributeProto.GRAPHS:
            for graph in item.graphs:
                yield from _graph_tensors(graph)


def external_file(tensor: TensorProto, folder: Path) -> Path:
    """The file that holds an external tensor.

    Raises:
        InputFileError: if it is missing, too short, or outside the model's folder.
    """
    entries = {item.key: item.value for item in tensor.external_data}
    location = entries.get("location", "")
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise InputFileError(f"tensor {tensor.name!r} keeps its data at {location!r}, outside the model's folder")
    path = folder / location
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise InputFileError(
            f"tensor {tensor.name!r} keeps its data at {location!r}, which leads outside the model's folder"
        )
    if not path.is_file():
        raise InputFileError(f"external data file {location!r} is missing; put it beside the model")
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        raise InputFileError(f"tensor {tensor.name!r} has an external offset or length that is not a number") from None
    if offset < 0 or length < 0 or offset + length > path.stat().st_size:
        raise InputFileError(f"external data file {location!r} is too short for tensor {tensor.name!r}")
    return path


def _sorted_nodes(
    proto: GraphProto, initializers: dict[str, TensorProto], sparse: set[str]
) -> tuple[list[NodeProto], bool]:
    """Nodes in topological order, and whether they already were."""
    nodes = list(proto.node)
    known = {item.name for item in proto.input} | set(initializers) | sparse
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if not name:
                continue
            if name in producer or name in known:
                raise InputFileError(f"tensor {name!r} is written more than once; the file is not valid ONNX")
            producer[name] = index
    waiting = [0] * len(nodes)
    readers: dict[int, list[int]] = defaultdict(list)
    in_order = True
    for index, node in enumerate(nodes):
        for name in set(all_inputs(node)):
            if name in producer:
                if producer[name] == index:
                    raise InputFileError(f"node {node.name or node.op_type!r} reads its own output {name!r}")
                in_order &= producer[name] < index
                waiting[index] += 1
                readers[producer[name]].append(index)
            elif name not in known:
                raise InputFileError(
                    f"node {node.name or node.op_type!r} reads {name!r}, which nothing in the file computes"
                )
    for item in proto.output:
        if item.name not in producer and item.name not in known:
            raise InputFileError(f"graph output {item.name!r} is computed by nothing in the file")
    if in_order:
        return nodes, True
    ready = [index for index, count in enumerate(waiting) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) != len(nodes):
        stuck = next(node for index, node in enumerate(nodes) if waiting[index] > 0)
        raise InputFileError(f"the graph has a cycle through node {stuck.name or stuck.op_type!r}")
    return [nodes[index] for index in order], False


def order_nodes(graph: GraphProto) -> None:
    """Put the nodes of a graph into topological order, in place; nothing happens where they are."""
    produced = {name for node in graph.node for name in node.output}
    known: set[str] = set()
    for node in graph.node:
        if any(name in produced and name not in known for name in all_inputs(node)):
            break
        known.update(node.output)
    else:
        return
    shell = GraphProto()
    shell.node.extend(graph.node)
    names = {item.name: item for item in graph.initializer}
    free = {name for node in graph.node for name in all_inputs(node)} - produced - set(names)
    shell.input.extend(onnx.ValueInfoProto(name=name) for name in sorted(free))
    ordered, _ = _sorted_nodes(shell, names, set())
    del graph.node[:]
    graph.node.extend(ordered)
