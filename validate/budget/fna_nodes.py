"""The FNA nodes of a file, each compared with FNA in PyTorch on the very tensors that it was given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from fna.attention import nystrom_attention_reference
from fna.export.blocks import attention_block
from fna.export.metadata import FileMetadata
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import fna_nodes, node_attributes
from fna.plan import ITERATIONS_OF_VERSION_1
from fna.runtime import Arrays
from fna.validate.budget.runners import OnnxRunner

_INPUTS = ("query", "key", "value", "landmarks", "landmark_bias", "key_mask")


@dataclass(frozen=True)
class FnaNode:
    """An FNA attention node of a graph.

    Attributes:
        block: its number.
        name: the node's name.
        inputs: tensor names by the operator's own names for them.
        output: the tensor it writes.
        scale: factor on the scores.
        iterations: of Newton-Schulz.
        exact_rows: whether landmark rows are written exactly.
        sink: whether masked tokens attend to themselves; see `fna.attention`.
    """

    block: int
    name: str
    inputs: dict[str, str]
    output: str
    scale: float
    iterations: int
    exact_rows: bool
    sink: bool = False


def list_fna_nodes(model: ModelProto) -> list[FnaNode]:
    """Return the FNA attention nodes, in the graph's order; none in a portable file, where they are inlined."""
    nodes = [node for node in fna_nodes(model.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node)]
    return [_describe(node, index) for index, node in enumerate(nodes)]


def _describe(node: NodeProto, index: int) -> FnaNode:
    attributes = node_attributes(node)
    number = attention_block(node)
    return FnaNode(
        block=index if number is None else number,
        name=node.name,
        inputs={name: tensor for name, tensor in zip(_INPUTS, node.input, strict=False) if tensor},
        output=node.output[0],
        scale=float(attributes["scale"]),
        iterations=int(attributes.get("iterations", ITERATIONS_OF_VERSION_1)),
        exact_rows=bool(attributes.get("exact_rows", 0)),
        sink=bool(attributes.get("sink", 0)),
    )


def mark_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """Return a copy of a model that also hands out the named tensors, by Polygraphy."""
    from polygraphy.backend.onnx import modify_outputs
    from polygraphy.logger import G_LOGGER

    kept = [output.name for output in model.graph.output]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        marked: ModelProto = modify_outputs(model, outputs=list(dict.fromkeys([*kept, *names])), copy=True)
    declared = {output.name: output for output in model.graph.output}
    for output in marked.graph.output:
        if output.name in declared:  # Polygraphy drops the shapes of outputs that were there before
            output.CopyFrom(declared[output.name])
    return marked


class NodeProbe:
    """Runs a file and hands back what its FNA nodes were given and gave."""

    def __init__(self, model: ModelProto, folder: Path, name: str) -> None:
        """Mark every FNA node's inputs and output; see `OnnxRunner` for the arguments and errors."""
        self.nodes = list_fna_nodes(model)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        tensors = [tensor for node in self.nodes for tensor in (*node.inputs.values(), node.output)]
        self._constants: Arrays = {
            tensor: numpy_helper.to_array(constants[tensor]) for tensor in tensors if tensor in constants
        }
        self._runner = OnnxRunner(
            mark_outputs(model, [tensor for tensor in tensors if tensor not in constants]), folder, name
        )

    def run(self, pixels: NDArray[np.float32]) -> Arrays:
        """Run one image `[1, 3, H, W]` and return the marked tensors by name."""
        return {**self._constants, **self._runner.run(pixels)}


def expected_output(
    node: FnaNode,
    arrays: Arrays,
    *,
    order: tuple[str, str, str] = ("query", "key", "value"),
    scale: float | None = None,
    iterations: int | None = None,
    exact_rows: bool | None = None,
) -> NDArray[np.float32]:  # [B, H, N, D]
    """FNA in PyTorch fp32 on what a node was given, as the node says or as the arguments say.

    Args:
        node: which one.
        arrays: tensors by name, from `NodeProbe.run`.
        order: which of the node's inputs take the part of query, key and value.
        scale: instead of the node's.
        iterations: instead of the node's.
        exact_rows: instead of the node's.
    """
    query, key, value, landmarks, bias = (
        torch.from_numpy(np.array(arrays[node.inputs[name]])) for name in (*order, "landmarks", "landmark_bias")
    )
    mask = node.inputs.get("key_mask")
    with torch.inference_mode():
        out = nystrom_attention_reference(
            query.float(), key.float(), value.float(), landmarks, bias.float(),
            node.scale if scale is None else scale,
            node.iterations if iterations is None else iterations,
            node.exact_rows if exact_rows is None else exact_rows,
            key_mask=None if mask is None else torch.from_numpy(np.array(arrays[mask])),
            sink=node.sink,
        )  # fmt: skip
    return out.numpy()


def planned_settings(node: FnaNode, metadata: FileMetadata) -> dict[str, float]:
    """Return the scale, iterations and exact_rows that a node of a grafted file should have.

    The scale is the one that graft found in the original; where it noted none, the node's own.
    """
    plan = metadata.plan
    rows = [row for row in metadata.attention_table or [] if row.get("block") == node.block]
    scale = rows[0].get("scale") if rows else None
    block_plan = plan.find(node.block)
    iterations = block_plan.iterations if block_plan is not None else None
    return {
        "scale": node.scale if scale is None else float(scale),
        "iterations": plan.iterations if iterations is None else iterations,
        "exact_rows": int(plan.exact_rows),
    }


def planned_output(node: FnaNode, arrays: Arrays, metadata: FileMetadata) -> NDArray[np.float32]:  # [B, H, N, D]
    """As `expected_output`, with the settings that a grafted file's node should have."""
    needed = planned_settings(node, metadata)
    return expected_output(
        node,
        arrays,
        scale=needed["scale"],
        iterations=int(needed["iterations"]),
        exact_rows=bool(needed["exact_rows"]),
    )
