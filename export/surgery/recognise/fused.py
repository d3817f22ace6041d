"""Fused attention operators: the standard Attention (opset 23), and what ONNX Runtime's optimiser writes."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fna.export.surgery.graph.index import MICROSOFT, STANDARD_DOMAINS, attribute
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.match import Axes, Context, Core, Side, constant_mask_kind
from fna.export.surgery.recognise.rows import Attention, Operand, RefusedError

PACKED = Axes((0,), 1, 2)
"""`[B, N, H * D]`"""
SPREAD = Axes((0, 1), 2, 3)
"""`[B, H, N, D]`"""


def is_fused_attention(node: NodeProto) -> bool:
    """Whether an operator is attention by its name, in any domain but ours."""
    return "Attention" in node.op_type and node.domain != "fna"


def identify_fused(context: Context, node: NodeProto, prefix: str) -> Attention:
    """Understand a fused operator.

    Raises:
        RefusedError: if it is not plain, full self-attention, or an operator that is not known.
    """
    if node.op_type == "Attention" and node.domain in STANDARD_DOMAINS:
        return _standard(context, node)
    if node.op_type == "MultiHeadAttention" and node.domain == MICROSOFT:
        return _multi_head(context, node, prefix)
    if node.op_type == "Attention" and node.domain == MICROSOFT:
        return _packed_projection(context, node, prefix)
    raise RefusedError(f"operator {node.domain or 'ai.onnx'}::{node.op_type} is not plain self-attention")


def _input(node: NodeProto, slot: int) -> str:
    return node.input[slot] if len(node.input) > slot else ""


def _refuse_extra_outputs(context: Context, node: NodeProto) -> None:
    for name in node.output[1:]:
        if name and (context.graph.readers(name) or name in context.graph.outputs):
            raise RefusedError(f"its second output {name!r} (cache or attention weights) is read")


def _refuse_mask(context: Context, name: str, *, keep: float = 0.0) -> None:
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


def _standard(context: Context, node: NodeProto) -> Attention:
    if attribute(node, "is_causal", 0):
        raise RefusedError("a causal mask (is_causal)")
    if attribute(node, "softcap", 0.0):
        raise RefusedError("its scores are capped by Tanh (softcap)")
    if any(_input(node, slot) for slot in (4, 5, 6)):
        raise RefusedError("it reads a key and value cache, or key lengths")
    _refuse_extra_outputs(context, node)
    _refuse_mask(context, _input(node, 3))
    query, key, value = node.input[:3]
    ranks = {context.rank(name) for name in (query, key, value)}
    if ranks == {4}:
        shapes = [context.shape(name) for name in (query, key, value)]
        if shapes[0][1] != shapes[1][1] or shapes[0][1] != shapes[2][1]:
            raise RefusedError("grouped or multi-query heads")
        scale = _scale(node, "scale", shapes[0][3])
        core = Core(
            Side(query, SPREAD), Side(key, SPREAD), Side(value, SPREAD), scale, node.output[0], SPREAD, "Attention"
        )
        return identify(context, core)
    if ranks != {3}:
        raise RefusedError(f"its inputs have ranks {sorted(ranks)}")
    heads, key_heads = int(attribute(node, "q_num_heads", 0)), int(attribute(node, "kv_num_heads", 0))
    if heads != key_heads or heads < 1:
        raise RefusedError("grouped or multi-query heads")
    return identify(context, _packed_core(context, query, key, value, heads, node, "scale"))


def _scale(node: NodeProto, name: str, head_size: int) -> float:
    given = float(attribute(node, name, 0.0) or 0.0)
    return given if given else float(head_size) ** -0.5


def _packed_core(
    context: Context, query: str, key: str, value: str, heads: int, node: NodeProto, scale_name: str
) -> Core:
    width = context.shape(query)[2]
    if width % heads:
        raise RefusedError(f"{width} channels cannot be divided into {heads} heads")
    scale = _scale(node, scale_name, width // heads)
    sides = [Side(name, PACKED) for name in (query, key, value)]
    return Core(sides[0], sides[1], sides[2], scale, node.output[0], PACKED, node.op_type, packed_heads=heads)


class _Prelude:
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


def _replace_operands(found: Attention, tensors: list[str], prelude: _Prelude, heads: int, head_size: int) -> Attention:
    """Point query, key and value at the rebuilt tensors `[B, N, H * D]`."""
    shape, perm = (0, 0, heads, head_size), (0, 2, 1, 3)
    found.query, found.key, found.value = (Operand(name, shape, perm) for name in tensors)
    found.prelude, found.initializers = prelude.nodes, prelude.initializers
    return found


def _multi_head(context: Context, node: NodeProto, prefix: str) -> Attention:
    if attribute(node, "unidirectional", 0):
        raise RefusedError("a causal mask (unidirectional)")
    if any(_input(node, slot) for slot in range(6, 10)):
        raise RefusedError("it reads a key and value cache")
    _refuse_extra_outputs(context, node)
    _refuse_mask(context, _input(node, 4), keep=1.0)
    _refuse_mask(context, _input(node, 5))
    heads = int(attribute(node, "num_heads", 0))
    query, key, value, bias = (_input(node, slot) for slot in range(4))
    rank = context.rank(query)
    prelude = _Prelude(prefix)
    if rank == 5 and not key and not value:
        return _packed_five(context, node, prelude, heads)
    if rank != 3 or not key or not value:
        raise RefusedError("its packed key and value layout is not supported")
    if context.rank(key) == 4:
        raise RefusedError("its keys are given per head (cross-attention cache)")
    if context.rank(key) != 3 or context.rank(value) != 3:
        raise RefusedError("its packed key and value layout is not supported")
    core = _packed_core(context, query, key, value, heads, node, "scale")
    found = identify(context, core)
    if not bias:
        return found
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
    found.scale = core.scale
    return _replace_operands(found, tensors, prelude, heads, found.head_size)


def _packed_five(context: Context, node: NodeProto, prelude: _Prelude, heads: int) -> Attention:
    """Packed `[B, N, H, 3, D]` is taken apart by Gather."""
    query = node.input[0]
    shape = context.shape(query)
    if _input(node, 3):
        raise RefusedError("its packed projection has biases inside the operator, which is not supported")
    if shape[3] != 3 or shape[2] != heads:
        raise RefusedError("its packed key and value layout is not supported")
    axes = Axes((0,), 1, 4)
    side = Side(query, axes)
    sizes = [context.shape(query, point) for point in context.points]
    stub = _identify_packed_input(
        context, node, side, [(s[0], s[2], s[1], s[4]) for s in sizes], _scale(node, "scale", shape[4])
    )
    operands = []
    for position, name in enumerate(("query", "key", "value")):
        index = prelude.constant(f"{name}_at", np.asarray(position, np.int64))
        (picked,) = prelude.add("Gather", [query, index], [name], axis=3)
        operands.append(Operand(picked, None, (0, 2, 1, 3)))
    stub.query, stub.key, stub.value = operands
    stub.prelude, stub.initializers = prelude.nodes, prelude.initializers
    return stub


def _identify_packed_input(
    context: Context, node: NodeProto, side: Side, sizes: list[tuple[int, int, int, int]], scale: float
) -> Attention:
    """Self-attention by construction: query, key and value are made from one input."""
    from fna.export.surgery.recognise.identify import check_packed_input
    from fna.export.surgery.recognise.rows import Result

    check_packed_input(context, side.tensor, sizes)
    heads, head_size = sizes[0][1], sizes[0][3]
    return Attention(
        Operand(side.tensor),
        Operand(side.tensor),
        Operand(side.tensor),
        Result(node.output[0], (0, 2, 1, 3), (0, 0, heads * head_size)),
        scale,
        heads=heads,
        head_size=head_size,
        tokens=tuple(size[2] for size in sizes),
        element_type=context.points[0].types.get(side.tensor, 0),
        source=side.tensor,
    )


def _packed_projection(context: Context, node: NodeProto, prefix: str) -> Attention:
    """com.microsoft::Attention carries the projection weights `[C, 3 * H * D]` itself."""
    if attribute(node, "unidirectional", 0):
        raise RefusedError("a causal mask (unidirectional)")
    if attribute(node, "do_rotary", 0):
        raise RefusedError("it applies rotary embeddings inside the operator, which is not supported")
    if _input(node, 4) or _input(node, 6):
        raise RefusedError("it reads a key and value cache")
    _refuse_extra_outputs(context, node)
    if _input(node, 3) and context.rank(node.input[3]) < 2:
        raise RefusedError("its attention mask depends on sequence lengths")
    _refuse_mask(context, _input(node, 3), keep=1.0)
    _refuse_mask(context, _input(node, 5))
    source, weights, bias = (_input(node, slot) for slot in range(3))
    if weights in context.graph.data:
        raise RefusedError("its projection weights depend on data")
    width = context.shape(weights)[1]
    given = attribute(node, "qkv_hidden_sizes")
    if given and len(set(given)) != 1:
        raise RefusedError(f"values have another head size than keys (qkv_hidden_sizes {list(given)})")
    heads = int(attribute(node, "num_heads", 0))
    if heads < 1 or width % (3 * heads):
        raise RefusedError(f"its projection of {width} channels cannot be divided into 3 x {heads} heads")
    head_size = width // (3 * heads)
    sizes = [(shape[0], heads, shape[1], head_size) for shape in (context.shape(source, p) for p in context.points)]
    found = _identify_packed_input(context, node, Side(source, PACKED), sizes, _scale(node, "scale", head_size))
    prelude = _Prelude(prefix)
    (projected,) = prelude.add("MatMul", [source, weights], ["projected"])
    if bias:
        (projected,) = prelude.add("Add", [projected, bias], ["projected_biased"])
    lengths = prelude.constant("split_sizes", np.asarray([heads * head_size] * 3, np.int64))
    tensors = prelude.add("Split", [projected, lengths], ["query", "key", "value"], axis=2)
    return _replace_operands(found, tensors, prelude, heads, head_size)
