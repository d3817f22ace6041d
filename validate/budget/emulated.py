"""A file whose FNA nodes run in the real plugin library, its kernels in the PTX machine; everything else on onnxruntime.

The file is cut at its FNA nodes into pieces of standard operators. A piece runs as soon as its inputs are there, then the nodes
that it feeds, and so on. In fp16 and bf16 files every tensor of a piece is rounded to its type, as in the file that this is
compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from torch import Tensor

from fna.arithmetic import nystrom_products
from fna.errors import InputFileError
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import core_of
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import OPERATORS, fna_nodes, node_attributes
from fna.export.passes.lower import lower
from fna.plan import ITERATIONS_OF_VERSION_1
from fna.plugins.ptx.emulated_plugin import emulate_attention, emulate_focal, emulate_sampling
from fna.runtime import Arrays, open_session, run_session
from fna.validate.budget.rounding import has_low_types, round_everywhere

PRODUCTS_A_SECOND = 5e7
"""Multiply-adds that the PTX machine emulates on one core of an AMD EPYC server, in fp16; for a first estimate."""

_TORCH_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}


@dataclass
class Piece:
    """Standard operators that can run once `inputs` are there, and the FNA nodes that can run after them."""

    nodes: list[NodeProto]
    inputs: list[str]
    outputs: list[str]
    fna: list[NodeProto]
    session: Any = field(default=None, repr=False)


class EmulatedFile:
    """An ONNX file with the plugin in the place of its FNA nodes."""

    def __init__(
        self, model: ModelProto, folder: Path, name: str, plugin: ProcessPoolExecutor, say: Callable[..., None]
    ) -> None:
        """Cut the file.

        Args:
            model: with the functions of its FNA nodes and all tensors.
            folder: where external data lies.
            name: of the file, for messages.
            plugin: from `fna.plugins.ptx.emulated_plugin.emulated_plugin`.
            say: called before every FNA node with what runs, its number and how many there are.
        """
        self._folder, self._name, self._plugin, self._say = folder, name, plugin, say
        plain = lower(model, "plugin")
        self.nodes = list(fna_nodes(plain.graph))
        self._types = _element_types(model, self.nodes)
        cut = _cut(plain, self.nodes, self._types)
        self._model = round_everywhere(cut) if has_low_types(cut) else cut
        graph = self._model.graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        (self._input,) = [value.name for value in plain.graph.input if value.name not in self._constants]
        self._outputs = [value.name for value in plain.graph.output]
        self._pieces = _divide(graph, self.nodes, self._input, self._outputs)

    def run(self, pixels: NDArray[np.float32]) -> Arrays:
        """Run one image `[1, 3, H, W]` and return the outputs by name."""
        arrays: Arrays = {name: numpy_helper.to_array(tensor) for name, tensor in self._constants.items()}
        arrays[self._input] = pixels
        done, start = 0, time.monotonic()
        for piece in self._pieces:
            if piece.nodes:
                arrays.update(self._run_piece(piece, arrays))
            for node in piece.fna:
                left = self._seconds(node, arrays) if done == 0 else (time.monotonic() - start) / done
                left *= len(self.nodes) - done
                self._say(f"emulating {node.name or node.op_type}, about {left:.0f} s left", done, len(self.nodes))
                arrays[node.output[0]] = self._emulate(node, arrays)
                done += 1
        return {name: _plain_floats(arrays[name]) for name in self._outputs}

    def _seconds(self, node: NodeProto, arrays: Arrays) -> float:
        """About how long a node takes to emulate."""
        if FARTHEST_POINT_SAMPLING.is_called_by(node):
            return arrays[node.input[0]].size * int(node_attributes(node)["num_landmarks"]) / PRODUCTS_A_SECOND
        batch, heads, tokens, head_size = arrays[node.input[0]].shape
        if FOCAL_ATTENTION.is_called_by(node):
            tiles, rows = arrays[node.input[3]].shape
            whole = int(node_attributes(node)["prefix_tokens"]) * tokens
            pairs = whole + tiles * rows * (arrays[node.input[4]].shape[1] + int(node_attributes(node)["hot"]))
            return 2 * batch * heads * pairs * head_size / PRODUCTS_A_SECOND
        given = node_attributes(node)
        core = int(given.get("iterations", ITERATIONS_OF_VERSION_1)), core_of(given)
        landmarks = arrays[node.input[3]].shape[1]
        return batch * nystrom_products(tokens, landmarks, heads, head_size, *core) / PRODUCTS_A_SECOND

    def _run_piece(self, piece: Piece, arrays: Arrays) -> Arrays:
        if piece.session is None:
            model = self._piece_model(piece, arrays)
            piece.session = open_session(model, name=self._name, folder=self._folder)
        inputs = {name: arrays[name] for name in piece.inputs}
        return run_session(piece.session, inputs, piece.outputs, name=self._name)

    def _piece_model(self, piece: Piece, arrays: Arrays) -> ModelProto:
        kinds = {name: helper.np_dtype_to_tensor_dtype(arrays[name].dtype) for name in piece.inputs}
        used = {name for node in piece.nodes for name in node.input} | set(piece.outputs)
        graph = helper.make_graph(
            piece.nodes, "piece",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [helper.make_empty_tensor_value_info(name) for name in piece.outputs],
            [tensor for name, tensor in self._constants.items() if name in used],
        )  # fmt: skip
        return helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            ir_version=self._model.ir_version,
            functions=self._model.functions,
        )

    def _emulate(self, node: NodeProto, arrays: Arrays) -> NDArray[Any]:
        given = node_attributes(node)
        kind = _TORCH_TYPES[self._types[node.output[0]]]
        tensors = [_tensor(arrays[name]) for name in node.input if name]
        if FARTHEST_POINT_SAMPLING.is_called_by(node):
            submitted = self._plugin.submit(emulate_sampling, tensors[0].to(kind), int(given["num_landmarks"]))
            return submitted.result().out.numpy()
        typed = [tensor.to(kind) for tensor in tensors[:3]]
        if FOCAL_ATTENTION.is_called_by(node):
            queries, keys, bias, *rest = tensors[3:]
            submitted = self._plugin.submit(
                emulate_focal, [*typed, queries.int(), keys.int(), bias.float(), *(t.int() for t in rest)],
                scale=float(given["scale"]), prefix_tokens=int(given["prefix_tokens"]), hot=int(given.get("hot", 0)),
            )  # fmt: skip
            return submitted.result().out.float().numpy()
        landmarks, bias, *mask = tensors[3:]
        submitted = self._plugin.submit(
            emulate_attention, [*typed, landmarks.int(), bias.float(), *(m.int() for m in mask)],
            scale=float(given["scale"]), iterations=int(given.get("iterations", ITERATIONS_OF_VERSION_1)),
            exact_rows=bool(given.get("exact_rows", 0)), sink=bool(given.get("sink", 0)), chebyshev=core_of(given),
        )  # fmt: skip
        return submitted.result().out.float().numpy()


def _element_types(model: ModelProto, nodes: list[NodeProto]) -> dict[str, int]:
    """The floating-point type that each FNA node takes, by its output's name."""
    inferred = shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    types.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    unknown = [node.name for node in nodes if types.get(node.input[0]) not in _TORCH_TYPES]
    if unknown:
        raise InputFileError(f"the type of what node {unknown[0]} takes cannot be inferred, so it cannot be emulated")
    return {node.output[0]: types[node.input[0]] for node in nodes}


def _cut(plain: ModelProto, nodes: list[NodeProto], types: dict[str, int]) -> ModelProto:
    """The file without its FNA nodes: what they give are inputs, what they take are outputs."""
    cut = ModelProto()
    cut.CopyFrom(plain)
    graph = cut.graph
    names = {node.output[0] for node in nodes}
    kept = [node for node in graph.node if not names & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    there = (
        {value.name for value in (*graph.output, *graph.input)} | {tensor.name for tensor in graph.initializer} | names
    )
    for node in nodes:
        sampled = FARTHEST_POINT_SAMPLING.is_called_by(node)
        kind = TensorProto.INT32 if sampled else types[node.output[0]]
        graph.input.append(helper.make_tensor_value_info(node.output[0], kind, None))
        for position, name in enumerate(node.input):
            if name and name not in there:
                there.add(name)
                graph.output.append(helper.make_tensor_value_info(name, _input_type(node, position, types), None))
    return cut


def _input_type(node: NodeProto, position: int, types: dict[str, int]) -> int:
    formal = OPERATORS[node.op_type].inputs[position]
    fixed = {"FLOAT": TensorProto.FLOAT, "INT32": TensorProto.INT32}
    return fixed.get(formal.type, types[node.output[0]])


def _divide(graph: GraphProto, fna: list[NodeProto], pixels: str, outputs: list[str]) -> list[Piece]:
    """Pieces in the order in which they can run."""
    constants = {tensor.name for tensor in graph.initializer}
    there = {"", pixels} | constants
    waiting, undone, pieces = list(graph.node), list(fna), []
    while waiting or undone:
        nodes, later = [], []
        for node in waiting:
            if _needs(node) <= there:
                there.update(node.output)
                nodes.append(node)
            else:
                later.append(node)
        ready = [node for node in undone if set(node.input) <= there]
        if not nodes and not ready:
            raise InputFileError(f"node {waiting[0].name if waiting else undone[0].name} waits for what nothing gives")
        there.update(output for node in ready for output in node.output)
        undone = [node for node in undone if node not in ready]
        waiting = later
        pieces.append(Piece(nodes, [], [], ready))
    _connect(pieces, constants, outputs)
    return pieces


def _connect(pieces: list[Piece], constants: set[str], outputs: list[str]) -> None:
    """Give every piece the tensors that it takes from others and that others take from it."""
    wanted = set(outputs)
    for piece in reversed(pieces):
        wanted |= {name for node in piece.fna for name in node.input}
        made = {name for node in piece.nodes for name in node.output}
        needed = {name for node in piece.nodes for name in _needs(node)}
        piece.outputs = sorted(made & wanted)
        piece.inputs = sorted(needed - made - constants - {""})
        wanted |= needed


def _needs(node: NodeProto) -> set[str]:
    """What a node reads, its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {output for each in graph.node for output in each.output} | {value.name for value in graph.input}
            inner |= {tensor.name for tensor in graph.initializer}
            names |= {name for each in graph.node for name in _needs(each)} - inner
    return names


def _tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array))


def _plain_floats(array: NDArray[Any]) -> NDArray[Any]:
    return array.astype(np.float32) if array.dtype.kind == "f" else array
