"""Shapes of every tensor at chosen input sizes, and the values of small tensors that depend on sizes only.

A size that the file leaves open is tried at several values. What holds of the shapes at all of them is taken to hold always;
what holds at the example's size only shows itself at the others. (Masks are proven for every size in `bounds`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, TypeProto

from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import OPERATORS
from fna.export.surgery.graph import fold as folding
from fna.export.surgery.graph.files import node_proto, one_line, stored_value
from fna.export.surgery.graph.view import (
    MICROSOFT,
    STANDARD_DOMAINS,
    GraphView,
    attribute,
    element_type,
    input_names,
    output_names,
    subgraphs,
    words,
)

Shape = tuple[int, ...]

SAME_AS_FIRST = words("""
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh CumSum Dropout Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Hardmax Identity InstanceNormalization LeakyRelu Log LogSoftmax LpNormalization LRN MeanVarianceNormalization
    Mish Neg Not PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh
    ThresholdedRelu Trilu IsNaN IsInf CastLike BatchNormalization LayerNormalization RMSNormalization GroupNormalization
    ScatterND ScatterElements RotaryEmbedding BiasGelu FastGelu QuickGelu SkipLayerNormalization
    SimplifiedLayerNormalization SkipSimplifiedLayerNormalization BitmaskDropout RandomNormalLike RandomUniformLike
    Bernoulli""")
BROADCAST = words("""
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul
    Or Pow Sub Sum Where Xor BiasSoftmax""")
BOOLEAN = words("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor")


class ShapeConflictError(Exception):
    """The graph does not hold together at the sizes tried."""


@dataclass
class ShapePoint:
    """One choice of input sizes, and what follows from it."""

    batch: int
    feeds: dict[str, Shape]
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


def infer_point(graph: GraphView, feeds: dict[str, Shape], batch: int) -> ShapePoint:
    """Propagate input shapes through the whole graph.

    Raises:
        ShapeConflictError: if an operator cannot take what reaches it.
    """
    point = ShapePoint(batch, dict(feeds))
    for tensor in graph.inputs:
        point.shapes[tensor.name] = feeds.get(tensor.name)
        point.types[tensor.name] = element_type(tensor)
    for name, tensor in graph.initializers.items():
        point.shapes[name] = tuple(tensor.shape)
        point.types[name] = element_type(tensor)
        if int(np.prod(tensor.shape, dtype=np.float64)) <= 4096:
            value = graph.constant(name)
            if value is not None:
                point.values[name] = value
    for node in graph.nodes:
        visit(graph, node, point)
    return point


def visit(graph: GraphView, node: gs.Node, point: ShapePoint) -> None:
    """Add what one node yields to a point; its inputs must be known there already.

    Raises:
        ShapeConflictError: if the operator cannot take what reaches it.
    """
    shapes = [point.shapes.get(name) if name else None for name in input_names(node)]
    values = [point.values.get(name) if name else None for name in input_names(node)]
    try:
        if node.op == "If" and values[0] is not None:
            _visit_branch(graph, node, bool(np.asarray(values[0]).reshape(-1)[0]), point)
            return
        if _try_fold(graph, node, shapes, values, point):
            return
        results = _rule_of(node)(NodeOperands(graph, node, shapes, values, point))
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ShapeConflictError(f"node {node.name or node.op!r}: {one_line(error)}") from None
    for name, result in zip(output_names(node), results, strict=False):
        if name:
            point.shapes[name], point.types[name] = result


def _visit_branch(graph: GraphView, node: gs.Node, condition: bool, point: ShapePoint) -> None:
    """An If whose condition depends on sizes only has the shapes of the branch that is taken."""
    body = attribute(node, "then_branch" if condition else "else_branch")
    for constant in body.tensors().values():
        if isinstance(constant, gs.Constant):
            point.shapes[constant.name], point.types[constant.name] = tuple(constant.shape), element_type(constant)
            if int(np.prod(constant.shape, dtype=np.float64)) <= 4096:
                point.values[constant.name] = stored_value(constant)
    for inner in body.nodes:
        visit(graph, inner, point)
    for name, result in zip(output_names(node), body.outputs, strict=False):
        point.shapes[name] = point.shapes.get(result.name)
        point.types[name] = point.types.get(result.name, 0)
        if result.name in point.values:
            point.values[name] = point.values[result.name]


def _try_fold(
    graph: GraphView,
    node: gs.Node,
    shapes: list[Shape | None],
    values: list[NDArray[Any] | None],
    point: ShapePoint,
) -> bool:
    if node.domain not in STANDARD_DOMAINS:
        return False
    if node.op == "Shape" and shapes and shapes[0] is not None:
        start, end = int(attribute(node, "start", 0)), attribute(node, "end")
        results = [np.asarray(shapes[0][start : None if end is None else int(end)], np.int64)]
    elif node.op == "Size" and shapes and shapes[0] is not None:
        results = [np.asarray(np.prod(shapes[0], dtype=np.int64))]
    elif node.op == "CastLike" and values[0] is not None and point.types.get(node.inputs[1].name):
        results = [values[0].astype(folding.numpy_type(point.types[node.inputs[1].name]))]
    elif any(value is None and name for value, name in zip(values, input_names(node), strict=True)):
        return False
    else:
        try:
            results = folding.fold(node, values, graph.opset)
        except folding.CannotFoldError:
            return False
    for name, value in zip(output_names(node), results, strict=False):
        if name:
            point.shapes[name] = value.shape
            point.types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            point.values[name] = value
    return True


Typed = tuple[Shape | None, int]
"""Shape and ONNX element type of one result."""


@dataclass(frozen=True)
class NodeOperands:
    """What a rule of shapes looks at: a node, and the shapes and values of its inputs at one point."""

    graph: GraphView
    node: gs.Node
    shapes: list[Shape | None]
    values: list[NDArray[Any] | None]
    point: ShapePoint

    @property
    def first(self) -> Shape | None:
        """Shape of the first input."""
        return self.shapes[0] if self.shapes else None

    @property
    def element_type(self) -> int:
        """Type of the first result."""
        node = self.node
        if node.op in BOOLEAN:
            return int(TensorProto.BOOL)
        if node.op in ("CastLike", "Where"):
            return self.point.types.get(node.inputs[1].name, 0)
        known = self.point.types.get(node.inputs[0].name, 0) if node.inputs else 0
        return int(attribute(node, "to", known)) if node.op == "Cast" else known


ShapeRule = Callable[[NodeOperands], list[Typed]]


def _same(at: NodeOperands) -> list[Typed]:
    return [(at.first, at.element_type)] * max(1, len(at.node.outputs))


def _only_first(at: NodeOperands) -> list[Typed]:
    return [(at.first, at.element_type)] + [(None, at.element_type)] * 3


def _normed_sum(at: NodeOperands) -> list[Typed]:
    """The fourth result is the sum that was normed."""
    return [*_only_first(at)[:3], (at.first, at.element_type)]


def _broadcast(at: NodeOperands) -> list[Typed]:
    known = [shape for shape in at.shapes if shape is not None]
    if len(known) < len(at.shapes):
        return [(None, at.element_type)]
    return [(_whole_numbers(np.broadcast_shapes(*known)), at.element_type)]


def _matmul(at: NodeOperands) -> list[Typed]:
    left, right = at.shapes[:2]
    return _infer(at) if left is None or right is None else [(_matmul_shape(left, right), at.element_type)]


def _transpose(at: NodeOperands) -> list[Typed]:
    if at.first is None:
        return _infer(at)
    perm = attribute(at.node, "perm") or range(len(at.first) - 1, -1, -1)
    if sorted(perm) != list(range(len(at.first))):
        raise ValueError(f"perm {list(perm)} does not fit shape {list(at.first)}")
    return [(tuple(at.first[axis] for axis in perm), at.element_type)]


def _reshape(at: NodeOperands) -> list[Typed]:
    if at.first is None or at.values[1] is None:
        return _infer(at)
    return [(folding.reshape_target(at.node, at.first, at.values[1].tolist()), at.element_type)]


def _expand(at: NodeOperands) -> list[Typed]:
    if at.first is None or at.values[1] is None:
        return _infer(at)
    return [(_whole_numbers(np.broadcast_shapes(at.first, _whole_numbers(at.values[1]))), at.element_type)]


def _fused_matmul(at: NodeOperands) -> list[Typed]:
    left, right = at.shapes[:2]
    shape = None
    if left is not None and right is not None:
        shape = _matmul_shape(_as_matrix(at.node, left, "A"), _as_matrix(at.node, right, "B"))
    return _and_unknown(at, shape)


def _packed_attention(at: NodeOperands) -> list[Typed]:
    weights, shape = at.shapes[1], None
    if at.first is not None and weights is not None:
        sizes = attribute(at.node, "qkv_hidden_sizes")
        shape = (*at.first[:2], int(sizes[2]) if sizes else weights[1] // 3)
    return _and_unknown(at, shape)


def _multi_head_attention(at: NodeOperands) -> list[Typed]:
    query, value = at.first, at.shapes[2] if len(at.shapes) > 2 else None
    shape = query
    if query is not None and len(query) == 5:
        shape = (query[0], query[1], query[2] * query[4])
    elif query is not None and value is not None and len(value) == 4:
        shape = (query[0], query[1], value[1] * value[3])
    elif query is not None and value is not None:
        shape = (*query[:2], value[2])
    return _and_unknown(at, shape)


def _and_unknown(at: NodeOperands, shape: Shape | None) -> list[Typed]:
    """A first result of known shape; nothing is known of the others."""
    return [(shape, at.element_type)] + [(None, at.element_type)] * max(0, len(at.node.outputs) - 1)


def _unknown(at: NodeOperands) -> list[Typed]:
    return [(None, at.element_type)] * len(at.node.outputs)


def _whole_numbers(sizes: Sequence[Any] | NDArray[Any]) -> Shape:
    return tuple(int(size) for size in sizes)


def _matmul_shape(left: Shape, right: Shape) -> Shape:
    a, b = (left if len(left) > 1 else (1, *left)), (right if len(right) > 1 else (*right, 1))
    if a[-1] != b[-2]:
        raise ValueError(f"MatMul of {list(left)} with {list(right)}")
    result = [*_whole_numbers(np.broadcast_shapes(a[:-2], b[:-2])), a[-2], b[-1]]
    if len(left) == 1:
        del result[-2]
    if len(right) == 1:
        del result[-1]
    return tuple(result)


def _as_matrix(node: gs.Node, shape: Shape, side: str) -> Shape:
    """Shape of a FusedMatMul operand once its transpositions are done."""
    if attribute(node, f"transBatch{side}", 0):
        shape = (*shape[1:-1], shape[0], shape[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if attribute(node, f"trans{side}", 0) else shape


def _infer(at: NodeOperands) -> list[Typed]:
    """Ask onnx's own inference about one node."""
    graph, node, point = at.graph, at.node, at.point
    unknown: list[Typed] = [(None, point.types.get(node.inputs[0].name, 0) if node.inputs else 0)] * len(node.outputs)
    if subgraphs(node):
        return unknown
    types: dict[str, TypeProto] = {}
    data: dict[str, TensorProto] = {}
    bf16 = False
    for name, shape, value in zip(input_names(node), at.shapes, at.values, strict=True):
        if not name:
            continue
        if name not in point.types:
            return unknown
        # old schemas do not list bf16, but shapes do not depend on the type
        known_type = TensorProto.FLOAT if point.types[name] == TensorProto.BFLOAT16 else point.types[name]
        bf16 |= known_type != point.types[name]
        types[name] = onnx.helper.make_tensor_type_proto(known_type, shape)
        if value is not None and value.size <= 64:
            data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value))
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, "")
        inferred = onnx.shape_inference.infer_node_outputs(
            schema,
            node_proto(node),
            types,
            data,
            opset_imports=list(graph.graph.import_domains),
            ir_version=graph.graph.ir_version or onnx.IR_VERSION,
        )
    except onnx.defs.SchemaError:
        return unknown
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
        return unknown
    results = [_from_type(inferred.get(name)) for name in output_names(node)]
    back = {TensorProto.FLOAT: TensorProto.BFLOAT16} if bf16 else {}
    return [(shape, back.get(element_type, element_type)) for shape, element_type in results]


def _from_type(inferred: TypeProto | None) -> Typed:
    if inferred is None or not inferred.HasField("tensor_type"):
        return None, 0
    tensor = inferred.tensor_type
    if not tensor.HasField("shape") or any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None, tensor.elem_type
    return tuple(int(dim.dim_value) for dim in tensor.shape.dim), tensor.elem_type


ANY_DOMAIN: dict[str, ShapeRule] = {
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(SAME_AS_FIRST, _same),
    **dict.fromkeys(("LayerNormalization", "BatchNormalization"), _only_first),
    "SkipLayerNormalization": _normed_sum,
    "QuantizeLinear": lambda at: [(at.first, TensorProto.UINT8)],
    "DequantizeLinear": lambda at: [(at.first, TensorProto.FLOAT)],
}
"""Operators that onnxruntime has under other domains as well."""

STANDARD: dict[str, ShapeRule] = {"MatMul": _matmul, "Transpose": _transpose, "Reshape": _reshape, "Expand": _expand}
"""Those that are met most often, or refuse less than onnx's inference does."""

MICROSOFT_RULES: dict[str, ShapeRule] = {
    "FusedMatMul": _fused_matmul,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head_attention,
}
OURS: dict[str, ShapeRule] = {operator.name: _same for operator in OPERATORS.values() if operator.attends}


def _rule_of(node: gs.Node) -> ShapeRule:
    """The rule for an operator: a table for each domain, and onnx's own inference for other standard operators."""
    if node.op in ANY_DOMAIN:
        return ANY_DOMAIN[node.op]
    if node.domain == MICROSOFT:
        return MICROSOFT_RULES.get(node.op, _unknown)
    if node.domain == DOMAIN:
        return OURS.get(node.op, _unknown)
    return STANDARD.get(node.op, _infer) if node.domain in STANDARD_DOMAINS else _unknown
