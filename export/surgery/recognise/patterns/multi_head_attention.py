"""onnxruntime's MultiHeadAttention."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import MICROSOFT, attribute
from fna.export.surgery.recognise.context import Axes, Context, Side
from fna.export.surgery.recognise.fused import (
    Prelude,
    identify_packed_input,
    input_at,
    packed_core,
    refuse_extra_outputs,
    refuse_mask,
    replace_operands,
    scale_of,
)
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Attention, Operand, RefusedError, Row


def read(context: Context, node: gs.Node, row: Row) -> Attention:
    """Query, key and value are three tensors, or one `[B, N, H, 3, D]`; biases may be inside the operator."""
    if attribute(node, "unidirectional", 0):
        raise RefusedError("a causal mask (unidirectional)")
    if any(input_at(node, slot) for slot in range(6, 10)):
        raise RefusedError("it reads a key and value cache")
    refuse_extra_outputs(context, node)
    refuse_mask(context, input_at(node, 4), keep=1.0)
    refuse_mask(context, input_at(node, 5))
    heads = int(attribute(node, "num_heads", 0))
    query, key, value, bias = (input_at(node, slot) for slot in range(4))
    rank = context.rank(query)
    prelude = Prelude(row.prefix)
    if rank == 5 and not key and not value:
        return _packed_five(context, node, prelude, heads)
    if rank != 3 or not key or not value:
        raise RefusedError("its packed key and value layout is not supported")
    if context.rank(key) == 4:
        raise RefusedError("its keys are given per head (cross-attention cache)")
    if context.rank(key) != 3 or context.rank(value) != 3:
        raise RefusedError("its packed key and value layout is not supported")
    core = packed_core(context, query, key, value, heads, node, "scale")
    attention = identify(context, core)
    if not bias:
        return attention
    array = context.graph.constant(bias)
    if array is None or array.ndim != 1 or array.size % 3:
        raise RefusedError("its projection biases are not constants")
    tensors = []
    for name, tensor, part in zip(("query", "key", "value"), (query, key, value), np.split(array, 3), strict=True):
        if np.any(part):
            added = prelude.add("Add", [tensor, prelude.constant(f"{name}_bias", part)], [f"{name}_biased"])
            tensors.append(added[0])
        else:
            tensors.append(tensor)
    attention.scale = core.scale
    return replace_operands(attention, tensors, prelude, heads, attention.head_size)


def _packed_five(context: Context, node: gs.Node, prelude: Prelude, heads: int) -> Attention:
    """Packed `[B, N, H, 3, D]` is taken apart by Gather."""
    query = node.inputs[0].name
    shape = context.shape(query)
    if input_at(node, 3):
        raise RefusedError("its packed projection has biases inside the operator, which is not supported")
    if shape[3] != 3 or shape[2] != heads:
        raise RefusedError("its packed key and value layout is not supported")
    axes = Axes((0,), 1, 4)
    side = Side(query, axes)
    sizes = [context.shape(query, point) for point in context.points]
    stub = identify_packed_input(
        context, node, side, [(s[0], s[2], s[1], s[4]) for s in sizes], scale_of(node, "scale", shape[4])
    )
    operands = []
    for position, name in enumerate(("query", "key", "value")):
        index = prelude.constant(f"{name}_at", np.asarray(position, np.int64))
        (picked,) = prelude.add("Gather", [query, index], [name], axis=3)
        operands.append(Operand(picked, None, (0, 2, 1, 3)))
    stub.query, stub.key, stub.value = operands
    stub.prelude, stub.initializers = prelude.nodes, prelude.initializers
    return stub


PATTERN = AttentionPattern(
    "MultiHeadAttention", lambda node: node.op == "MultiHeadAttention" and node.domain == MICROSOFT, read
)
