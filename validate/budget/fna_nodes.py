"""The FNA and focal nodes of a file, each compared with its twin in PyTorch on the very tensors that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from fna.attention import nystrom_attention_reference
from fna.chebyshev import chebyshev_from, core_settings
from fna.export.blocks import attention_block
from fna.export.metadata import FileMetadata
from fna.export.operators.fast_nystrom_attention import core_of
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import approximating_operators, fna_nodes, node_attributes, node_inputs
from fna.focal import focal_attention_reference
from fna.plan import ITERATIONS_OF_VERSION_1, Plan
from fna.runtime import Arrays
from fna.validate.budget.runners import OnnxRunner


@dataclass(frozen=True)
class FnaNode:
    """A node of a graph that takes the place of exact attention.

    Attributes:
        block: its number.
        name: the node's name.
        inputs: tensor names by the operator's own names for them.
        output: the tensor it writes.
        scale: factor on the scores.
        settings: the operator's other attributes: those of its core and `exact_rows`, or `prefix_tokens` and `hot`.
        sink: whether masked tokens attend to themselves; see `fna.attention`.
        is_focal: whether it is focal attention.
    """

    block: int
    name: str
    inputs: dict[str, str]
    output: str
    scale: float
    settings: dict[str, float]
    sink: bool = False
    is_focal: bool = False


def list_fna_nodes(model: ModelProto) -> list[FnaNode]:
    """Return the FNA and focal nodes, in the graph's order; none in a portable file, where they are inlined."""
    nodes = [node for node in fna_nodes(model.graph) if node.op_type in approximating_operators()]
    return [_describe(node, index) for index, node in enumerate(nodes)]


def _describe(node: NodeProto, index: int) -> FnaNode:
    attributes = {"iterations": ITERATIONS_OF_VERSION_1, "exact_rows": 0, **node_attributes(node)}
    is_focal = FOCAL_ATTENTION.is_called_by(node)
    if is_focal:
        settings: dict[str, float] = {name: int(attributes[name]) for name in ("prefix_tokens", "hot")}
    else:
        settings = core_settings(int(attributes["iterations"]), core_of(attributes))
        settings["exact_rows"] = int(attributes["exact_rows"])
    number = attention_block(node)
    return FnaNode(
        block=index if number is None else number,
        name=node.name,
        inputs=node_inputs(node),
        output=node.output[0],
        scale=float(attributes["scale"]),
        settings=settings,
        sink=bool(attributes.get("sink", 0)),
        is_focal=is_focal,
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
    settings: Mapping[str, float] | None = None,
) -> NDArray[np.float32]:  # [B, H, N, D]
    """FNA or focal attention in PyTorch fp32 on what a node was given, as the node says or as the arguments say.

    Args:
        node: which one.
        arrays: tensors by name, from `NodeProbe.run`.
        order: which of the node's inputs take the part of query, key and value.
        scale: instead of the node's.
        settings: instead of the node's, by name.
    """
    tensors = {name: torch.from_numpy(np.array(arrays[tensor])) for name, tensor in node.inputs.items()}
    query, key, value = (tensors[name].float() for name in order)
    factor = node.scale if scale is None else scale
    chosen = {**node.settings, **(settings or {})}
    with torch.inference_mode():
        if node.is_focal:
            lists = [tensors[name] for name in ("tile_queries", "tile_keys", "tile_bias", "places")]
            out = focal_attention_reference(
                query, key, value, lists[0], lists[1], lists[2], lists[3],
                tensors.get("key_mask"), int(chosen["prefix_tokens"]), int(chosen["hot"]), factor,
            )  # fmt: skip
        else:
            out = nystrom_attention_reference(
                query, key, value, tensors["landmarks"], tensors["landmark_bias"].float(), factor,
                int(chosen["iterations"]), bool(chosen["exact_rows"]), tensors.get("key_mask"), node.sink,
                chebyshev_from(int(chosen["steps"]), chosen["low"]),
            )  # fmt: skip
    return out.numpy()


def planned_settings(node: FnaNode, metadata: FileMetadata) -> dict[str, float]:
    """Return the scale and the settings that a node of a grafted file should have.

    The scale is the one that graft found in the original; where it noted none, the node's own.
    """
    rows = [row for row in metadata.attention_table or [] if row.get("block") == node.block]
    scale = rows[0].get("scale") if rows else None
    return {"scale": node.scale if scale is None else float(scale), **_planned_by_block(node, metadata.plan)}


def _planned_by_block(node: FnaNode, plan: Plan) -> dict[str, float]:
    nystrom, focal = plan.find(node.block), plan.find_focal(node.block)
    if node.is_focal:
        return {} if focal is None else {"hot": focal.hot}
    core = (plan.iterations, plan.chebyshev)
    if nystrom is not None:
        core = (plan.iterations_of(nystrom), plan.chebyshev_of(nystrom))
    return {**core_settings(*core), "exact_rows": int(plan.exact_rows)}


def planned_output(node: FnaNode, arrays: Arrays, metadata: FileMetadata) -> NDArray[np.float32]:  # [B, H, N, D]
    """As `expected_output`, with the settings that a grafted file's node should have."""
    needed = planned_settings(node, metadata)
    scale = needed.pop("scale")
    return expected_output(node, arrays, scale=scale, settings=needed)
