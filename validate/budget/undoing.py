"""A file in which some FNA nodes compute exact attention again, on their own query, key and value: ONNX only, no PyTorch."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from fna.export.blocks import attention_block
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.registry import (
    OVERLOAD_IR_VERSION,
    fna_nodes,
    is_attention,
    model_opset,
    node_attributes,
    node_inputs,
    variant_of,
)
from fna.export.types import tensor_types

_NO_MASK = "fna/no_mask"


def undo_nodes(model: ModelProto, blocks: Collection[int], *, keep_masks: bool = True) -> ModelProto:
    """Return a copy of a model in which the FNA nodes of some blocks are exact attention, without the plan's correction.

    The operator of exact attention with masked keys takes their place; where nothing is masked, with a mask that says so.

    Args:
        model: with `fna` nodes, as `fna graft` wrote it.
        blocks: block numbers.
        keep_masks: whether keys that the plan masks stay masked, in these blocks and in the others that are exact.
    """
    undone = ModelProto()
    undone.CopyFrom(model)
    nodes = [node for node in fna_nodes(undone.graph) if _is_undone(node, blocks, keep_masks)]
    types = tensor_types(undone) if nodes else {}
    variants = {}
    for node in nodes:
        mask = _mask_of(node) if keep_masks else None
        sink = mask is not None and bool(node_attributes(node).get("sink", 0))
        exact = _exact_node(node, mask or _NO_MASK, sink)
        variant = variant_of(exact, types.get(node.input[0], TensorProto.UNDEFINED))
        exact.overload = f"undone_{variant.overload}"
        variants[exact.overload] = variant
        node.CopyFrom(exact)
        _cancel_correction(undone, node.name)
    for overload, variant in variants.items():
        undone.functions.append(variant.make_function(model_opset(undone), overload))
    if nodes:
        undone.ir_version = max(undone.ir_version, OVERLOAD_IR_VERSION)
        undone.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 1), np.int32), _NO_MASK))
    return undone


def _is_undone(node: NodeProto, blocks: Collection[int], keep_masks: bool) -> bool:
    if MASKED_ATTENTION.is_called_by(node):
        return not keep_masks
    return is_attention(node.domain, node.op_type) and attention_block(node) in blocks


def _mask_of(node: NodeProto) -> str | None:
    return node_inputs(node).get("key_mask")


def _exact_node(node: NodeProto, mask: str, sink: bool) -> NodeProto:
    scale = float(node_attributes(node)["scale"])
    return MASKED_ATTENTION.make_node(
        [*node.input[:3], mask], list(node.output), node.name, scale=scale, sink=int(sink)
    )


def _cancel_correction(model: ModelProto, name: str) -> None:
    """Make the correction behind a node, as `fna.export.surgery.rewrite.compose` writes it, add nothing and scale by 1."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        wanted = {"local_image": 0.0, "scaled": 1.0}
        for step, value in wanted.items():
            if node.output[0].startswith(f"{name}/correction_{step}"):
                neutral = _filled(tensors[node.input[1]], value, f"{node.output[0]}/neutral")
                model.graph.initializer.append(neutral)
                node.input[1] = neutral.name


def _filled(tensor: TensorProto, value: float, name: str) -> TensorProto:
    return numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), value), name)
