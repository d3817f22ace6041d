"""What onnx-graphsurgeon (0.6.1) cannot do, in one place: reading files of anyone, and writing back all that it would drop.

graphsurgeon reads, edits, cleans up and writes the graph. Each of these stays here for the reason given:

- `load_model`: a file that breaks ONNX's rules must end in one line that says why; graphsurgeon fills gaps silently
  (`check_names`: a tensor written twice, or read and never written, and cycles, which end in its RecursionError).
- `import_model` keeps the order of the file where it is valid; `Graph.toposort` sorts by level, which moves every node.
- `ExternalValues`: weights outside the file are read from the file's folder when looked at; graphsurgeon reads them from the
  working directory.
- `stored_value` looks at a constant without loading it for good: `Constant.values` replaces what is stored, so that it would be
  written again, inside the file.
- `export_model`: a node, tensor or function that nobody changed is written as it was read, bit for bit. graphsurgeon drops doc
  strings, metadata and overloads of nodes, attributes of rare types, names and metadata of the model, quantisation annotations,
  inputs with a default value, and initializers that only a body reads.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, update_import_domains
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from fna.errors import InputFileError

MAX_PROTOBUF_BYTES = 2**31 - 1
"""A protobuf message cannot be larger; such models keep their weights in external data."""

LARGE_WEIGHT = 1 << 16
"""Elements."""


class ExternalValues(LazyValues):
    """Values that lie in a file beside the model, read when they are looked at."""

    def __init__(self, tensor: TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        self.folder = folder

    def load(self) -> NDArray[Any]:
        """Read them."""
        return np.array(numpy_helper.to_array(self.tensor, base_dir=str(self.folder)))


def stored_value(constant: gs.Constant) -> NDArray[Any]:
    """A constant's value; what is stored stays as it is."""
    values = constant._values
    if not isinstance(values, LazyValues):
        return np.asarray(values)
    folder = str(values.folder) if isinstance(values, ExternalValues) else ""
    return numpy_helper.to_array(values.tensor, base_dir=folder)


def tensor_proto(constant: gs.Constant) -> TensorProto:
    """A constant as a file has it; what lies outside the file is not loaded."""
    return OnnxExporter.export_tensor_proto(constant)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


# ---------------------------------------------------------------- reading


def open_graph(path: Path) -> gs.Graph:
    """Read an ONNX file as an onnx-graphsurgeon graph; weights in external files are not loaded.

    Raises:
        InputFileError: if the file cannot be read, or breaks the rules of ONNX.
    """
    return import_model(load_model(path), path.parent)


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


def import_model(model: ModelProto, folder: Path) -> gs.Graph:
    """A graph of a model, its nodes in topological order; `export_model` writes what nobody changes as it is in `model`.

    Raises:
        InputFileError: if the model breaks the rules of ONNX.
    """
    if not any(opset.domain in ("", "ai.onnx") for opset in model.opset_import):
        raise InputFileError("the file imports no standard operator set, so its operators have no meaning")
    order = check_names(model.graph)
    with _quiet():
        try:
            graph = gs.import_onnx(model)
        except OnnxGraphSurgeonException as error:
            raise InputFileError(f"the file cannot be read by onnx-graphsurgeon: {one_line(error)}") from None
    graph.import_domains = list(model.opset_import)
    vars(graph).update(original=model, folder=folder, was_sorted=order is None)
    for node, original in zip(graph.nodes, model.graph.node, strict=True):
        vars(node)["original"] = original
    for owner in [graph, *graph.subgraphs(recursive=True)]:
        for tensor in owner.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.data_location == TensorProto.EXTERNAL:
                tensor.values = ExternalValues(tensor._values.tensor, folder)
    if order is not None:
        graph.nodes = [graph.nodes[index] for index in order]
    return graph


def original_model(graph: gs.Graph) -> ModelProto:
    """The model that `import_model` read a graph from."""
    return vars(graph)["original"]


def was_sorted(graph: gs.Graph) -> bool:
    """Whether the nodes stood in topological order already when the graph was read."""
    return bool(vars(graph)["was_sorted"])


def folder_of(graph: gs.Graph) -> Path:
    """Where the external data of a graph lies."""
    return Path(vars(graph).get("folder", "."))


def check_names(graph: GraphProto) -> list[int] | None:
    """Check that every tensor is written once and before it can be read; return the valid order if the file has another.

    Raises:
        InputFileError: with the tensor or node that breaks the rules.
    """
    nodes = list(graph.node)
    known = {value.name for value in graph.input} | {value.name for value in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
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
        for name in set(names_read(node)):
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
    for output in graph.output:
        if output.name not in producer and output.name not in known:
            raise InputFileError(f"graph output {output.name!r} is computed by nothing in the file")
    if in_order:
        return None
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
    return order


def _quiet() -> Any:
    """Graphsurgeon prints its warnings; what they warn of (kept types, repeated names) does no harm here."""
    return G_LOGGER.suppress(G_LOGGER.CRITICAL + 1)


def node_proto(node: gs.Node) -> NodeProto:
    """A node of a graph that nobody has edited, as onnx's inference and reference operators take it."""
    original: NodeProto | None = vars(node).get("original")
    return OnnxExporter.export_node(node) if original is None else original


# ---------------------------------------------------------------- writing


def export_model(graph: gs.Graph, weights: dict[str, TensorProto] | None = None) -> ModelProto:
    """A model of a graph; what was not changed since `import_model` is written as it was read.

    Args:
        graph: any graph of onnx-graphsurgeon's.
        weights: where given, large initializers are put here, not copied, and the model says that they lie outside of it;
            `put_weights_in` puts them back.
    """
    original: ModelProto = vars(graph).get("original") or ModelProto()
    old = original.graph
    with _quiet():
        nodes = [write_node(node) for node in graph.nodes]
        tensors = graph.tensors()
        stored = {
            name: OnnxExporter.export_tensor_proto(tensor)
            for name, tensor in tensors.items()
            if isinstance(tensor, gs.Constant) and not isinstance(tensor._values, SparseValues)
        }
        functions = _write_functions(graph, original)
        domains = update_import_domains(graph)
    model = ModelProto()
    for descriptor, value in original.ListFields():
        if descriptor.name in ("graph", "functions", "opset_import"):
            continue
        if hasattr(value, "extend"):
            getattr(model, descriptor.name).extend(value)
        else:
            setattr(model, descriptor.name, value)
    if not model.ir_version:
        model.ir_version = graph.ir_version or onnx.IR_VERSION
        model.producer_name, model.producer_version = graph.producer_name, graph.producer_version
    model.opset_import.extend(domains)
    model.functions.extend(functions)
    target = model.graph
    target.name = graph.name
    if graph.doc_string:
        target.doc_string = graph.doc_string
    target.node.extend(nodes)
    _write_initializers(target, old, stored, weights)
    target.sparse_initializer.extend(old.sparse_initializer)
    defaults = {tensor.name for tensor in old.initializer}
    infos = {value.name: value for value in (*old.value_info, *old.output, *old.input)}
    shown = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    inputs = {tensor.name: _write_info(tensor, infos) for tensor in graph.inputs}
    for info in old.input:
        if info.name in inputs or info.name in defaults:
            target.input.append(inputs.pop(info.name, info))
    target.input.extend(inputs.values())
    target.output.extend(_write_info(tensor, infos) for tensor in graph.outputs)
    kept = {value.name: value for value in old.value_info}
    for name, tensor in tensors.items():
        if name in kept or (name not in shown and isinstance(tensor, gs.Variable) and tensor.dtype is not None):
            if isinstance(tensor, gs.Constant):
                target.value_info.append(kept[name])
            elif tensor.dtype is not None or tensor.shape is not None:
                target.value_info.append(_write_info(tensor, infos))
    target.quantization_annotation.extend(note for note in old.quantization_annotation if note.tensor_name in tensors)
    target.metadata_props.extend(old.metadata_props)
    return model


def _write_initializers(
    target: GraphProto, old: GraphProto, stored: dict[str, TensorProto], weights: dict[str, TensorProto] | None
) -> None:
    """Those that are read, those of inputs with a default value, and those that nothing read before either."""
    read = {name for node in target.node for name in names_read(node)}
    read_before = {name for node in old.node for name in names_read(node)} | {output.name for output in old.output}
    declared = {value.name for value in old.input}
    before = {tensor.name for tensor in old.initializer}
    written: list[TensorProto] = []
    for constant in old.initializer:
        if constant.name in stored:
            written.append(stored[constant.name])
        elif constant.name in read or constant.name in declared or constant.name not in read_before:
            written.append(constant)
    written += [tensor for name, tensor in stored.items() if name not in before]
    for tensor in written:
        if weights is None or not _is_large(tensor):
            target.initializer.append(tensor)
            continue
        weights[tensor.name] = tensor
        stub = target.initializer.add(
            name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
        )
        stub.external_data.add(key="location", value="in memory")


def _is_large(tensor: TensorProto) -> bool:
    """Whether a weight is worth handing on beside the model; NumPy and onnxruntime must know its type alike."""
    plain = tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    size = np.prod(tensor.dims, dtype=np.float64)
    return plain and tensor.data_location != TensorProto.EXTERNAL and bool(size >= LARGE_WEIGHT)


def put_weights_in(model: ModelProto, weights: dict[str, TensorProto]) -> None:
    """Undo what `export_model` did with `weights`."""
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])


def write_node(node: gs.Node) -> NodeProto:
    """A node's protobuf: the one that it was read from, unless it was changed since."""
    original: NodeProto | None = vars(node).get("original")
    if original is not None and _same_node(node, original):
        return original
    written: NodeProto = OnnxExporter.export_node(node)
    if original is None:
        return written
    written.doc_string = original.doc_string
    written.metadata_props.extend(original.metadata_props)
    if original.HasField("overload"):
        written.overload = original.overload
    written.attribute.extend(attribute for attribute in original.attribute if attribute.type in UNKNOWN_ATTRIBUTES)
    return written


UNKNOWN_ATTRIBUTES = (
    AttributeProto.TENSORS, AttributeProto.GRAPHS, AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS,
    AttributeProto.TYPE_PROTO, AttributeProto.TYPE_PROTOS,
)  # fmt: skip
"""graphsurgeon skips these."""


def _same_node(node: gs.Node, original: NodeProto) -> bool:
    known = {attribute.name: attribute for attribute in original.attribute if attribute.type not in UNKNOWN_ATTRIBUTES}
    return (
        (node.op, node.name, node.domain or "") == (original.op_type, original.name, original.domain)
        and [tensor.name for tensor in node.inputs] == list(original.input)
        and [tensor.name for tensor in node.outputs] == list(original.output)
        and list(node.attrs) == list(known)
        and all(_same_attribute(value, known[name]) for name, value in node.attrs.items())
    )


def _same_attribute(value: Any, original: AttributeProto) -> bool:
    if isinstance(value, gs.Constant):
        return _same_constant(value, original.t)
    if isinstance(value, gs.Graph):
        return _same_body(value, original.g)
    if isinstance(value, gs.Node.AttributeRef):
        return bool(value.name == original.ref_attr_name)
    plain = onnx.helper.get_attribute_value(original)
    if original.type == AttributeProto.STRING:
        plain = plain.decode()
    elif original.type == AttributeProto.STRINGS:
        plain = [text.decode() for text in plain]
    return bool(value == plain)


def _same_constant(constant: gs.Constant, original: TensorProto) -> bool:
    return isinstance(constant._values, LazyValues) and bool(constant._values.tensor == original)


def _same_body(body: gs.Graph, original: GraphProto) -> bool:
    stored = {name: tensor for name, tensor in body.tensors().items() if isinstance(tensor, gs.Constant)}
    return (
        len(body.nodes) == len(original.node)
        and all(_same_node(*pair) for pair in zip(body.nodes, original.node, strict=True))
        and [tensor.name for tensor in body.inputs] == [value.name for value in original.input]
        and [tensor.name for tensor in body.outputs] == [value.name for value in original.output]
        and all(_same_constant(stored[tensor.name], tensor) for tensor in original.initializer if tensor.name in stored)
    )


def _write_functions(graph: gs.Graph, original: ModelProto) -> list[FunctionProto]:
    known = {(function.domain, function.name): function for function in original.functions}
    functions = []
    for function in graph.functions:
        old = known.get((function.domain, function.name))
        same = (
            old is not None
            and len(function.nodes) == len(old.node)
            and all(_same_node(*pair) for pair in zip(function.nodes, old.node, strict=True))
        )
        functions.append(old if same else OnnxExporter.export_function(function))
    return functions


def _write_info(tensor: gs.Tensor, infos: dict[str, ValueInfoProto]) -> ValueInfoProto:
    old = infos.get(tensor.name)
    if old is not None:
        again = OnnxImporter.import_tensor(old)
        if isinstance(tensor, gs.Constant) or (
            (again.dtype, again.shape, again.type) == (tensor.dtype, tensor.shape, tensor.type)
        ):
            return old
    written: ValueInfoProto = OnnxExporter.export_value_info_proto(tensor, do_type_check=False)
    return written


# ---------------------------------------------------------------- protobufs


def names_read(node: NodeProto) -> Iterator[str]:
    """Names that a node of a file reads, those that its bodies take from outside included."""
    for name in node.input:
        if name:
            yield name
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        for body in bodies:
            yield from _captured(body)


def _captured(body: GraphProto) -> Iterator[str]:
    own = {value.name for value in body.input} | {value.name for value in body.initializer}
    own |= {name for node in body.node for name in node.output}
    for node in body.node:
        yield from (name for name in names_read(node) if name not in own)
    yield from (output.name for output in body.output if output.name not in own)


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that is stored in a model: initializers and attributes, in bodies and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for tensor in graph.sparse_initializer:
        yield tensor.values
        yield tensor.indices
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            yield attribute.t
        elif attribute.type == AttributeProto.TENSORS:
            yield from attribute.tensors
        elif attribute.type == AttributeProto.GRAPH:
            yield from _graph_tensors(attribute.g)
        elif attribute.type == AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield from _graph_tensors(graph)


def external_file(tensor: TensorProto, folder: Path) -> Path:
    """The file that holds an external tensor.

    Raises:
        InputFileError: if it is missing, too short, or outside the model's folder.
    """
    fields = {field.key: field.value for field in tensor.external_data}
    location = fields.get("location", "")
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
        offset, length = int(fields.get("offset") or 0), int(fields.get("length") or 0)
    except ValueError:
        raise InputFileError(f"tensor {tensor.name!r} has an external offset or length that is not a number") from None
    if offset < 0 or length < 0 or offset + length > path.stat().st_size:
        raise InputFileError(f"external data file {location!r} is too short for tensor {tensor.name!r}")
    return path
