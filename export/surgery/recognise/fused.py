"""What readers of fused attention operators share: masks, scales, layouts, and nodes that rebuild query, key and value."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fna.export.surgery.graph.view import attribute, output_names
from fna.export.surgery.recognise.context import Axes, Context, Core, Side
from fna.export.surgery.recognise.identify import check_packed_input
from fna.export.surgery.recognise.masks import constant_mask_kind
from fna.export.surgery.recognise.rows import Attention, Operand, RefusedError, Result

PACKED = Axes((0,), 1, 2)
"""`[B, N, H * D]`"""
SPREAD = Axes((0, 1), 2, 3)
"""`[B, H, N, D]`"""


def input_at(node: gs.Node, slot: int) -> str:
    """Name of an input, empty where it is left out."""
    return str(node.inputs[slot].name) if len(node.inputs) > slot else ""


def refuse_extra_outputs(context: Context, node: gs.Node) -> None:
    """Refuse a block whose cache or attention weights are read."""
    for name in output_names(node)[1:]:
        if name and (context.graph.readers(name) or name in context.graph.outputs):
            raise RefusedError(f"its second output {name!r} (cache or attention weights) is read")


def refuse_mask(context: Context, name: str, *, keep: float = 0.0) -> None:
    """Refuse a mask or bias that is not the same number, at least `keep`, for all scores."""
    if not name:
        return
    bounds = context.bounds.find(name)
    boolean = context.points[0].types.get(name) == TensorProto.BOOL
    if boolean and bounds.low > 0:
        return
    if not boolean and bounds.single is not None and (keep == 0.0 or bounds.low >= keep):
        return
    if name in context.graph.data:
        raise RefusedError("its mask or bias depends on data (padding mask or position bias)")
    value = context.points[0].values.get(name)
    value = context.graph.constant(name) if value is None else value
    raise RefusedError(constant_mask_kind(context, name, value))


def scale_of(node: gs.Node, name: str, head_size: int) -> float:
    """The scale of an attribute; 0 and none at all mean `head_size ** -0.5`."""
    number = float(attribute(node, name, 0.0) or 0.0)
    return number if number else float(head_size) ** -0.5


def packed_core(context: Context, query: str, key: str, value: str, heads: int, node: gs.Node, scale_name: str) -> Core:
    """A core whose query, key and value `[B, N, H * D]` hold the heads one after another."""
    width = context.shape(query)[2]
    if width % heads:
        raise RefusedError(f"{width} channels cannot be divided into {heads} heads")
    scale = scale_of(node, scale_name, width // heads)
    sides = [Side(name, PACKED) for name in (query, key, value)]
    return Core(sides[0], sides[1], sides[2], scale, node.outputs[0].name, PACKED, node.op, packed_heads=heads)


class Prelude:
    """Nodes and constants that rebuild query, key and value."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def add(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> list[str]:
        """Add a node; returns its outputs' names."""
        names = [f"{self.prefix}/{output}" for output in outputs]
        self.nodes.append(
            helper.make_node(op_type, inputs, names, name=f"{self.prefix}/{outputs[0]}_node", **attributes)
        )
        return names

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initializer; returns its name."""
        full = f"{self.prefix}/{name}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), full))
        return full


def replace_operands(
    attention: Attention, tensors: list[str], prelude: Prelude, heads: int, head_size: int
) -> Attention:
    """ShapePoint query, key and value at the rebuilt tensors `[B, N, H * D]`."""
    shape, perm = (0, 0, heads, head_size), (0, 2, 1, 3)
    attention.query, attention.key, attention.value = (Operand(name, shape, perm) for name in tensors)
    attention.prelude, attention.initializers = prelude.nodes, prelude.initializers
    return attention


def identify_packed_input(
    context: Context, node: gs.Node, side: Side, sizes: list[tuple[int, int, int, int]], scale: float
) -> Attention:
    """Self-attention by construction: query, key and value are made from one input."""
    check_packed_input(context, side.tensor, sizes)
    heads, head_size = sizes[0][1], sizes[0][3]
    return Attention(
        Operand(side.tensor),
        Operand(side.tensor),
        Operand(side.tensor),
        Result(node.outputs[0].name, (0, 2, 1, 3), (0, 0, heads * head_size)),
        scale,
        heads=heads,
        head_size=head_size,
        tokens=tuple(size[2] for size in sizes),
        element_type=context.points[0].types.get(side.tensor, 0),
        source=side.tensor,
    )
