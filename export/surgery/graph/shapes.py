"""Shapes of every tensor at chosen input sizes, and the values of small tensors that depend on sizes only.

A size that the file leaves open is tried at several values. What holds of the shapes at all of them is taken to hold always;
what holds at the example's size only shows itself at the others. (Masks are proven for every size in `bounds`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, TypeProto

from fna.errors import InputFileError
from fna.export.operators.functions import ATTENTION, DOMAIN, MASKED_ATTENTION
from fna.export.surgery.graph import fold as folding
from fna.export.surgery.graph.index import MICROSOFT, STANDARD_DOMAINS, Graph, attribute, one_line, subgraphs, words
from fna.runtime import open_session, run_session

Shape = tuple[int, ...]

SAME_AS_FIRST = words("""
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh CumSum Dropout Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Hardmax Identity InstanceNormalization LeakyRelu Log LogSoftmax LpNormalization LRN MeanVarianceNormalization
    Mish Neg Not PRelu Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh
    ThresholdedRelu Trilu IsNaN IsInf CastLike BatchNormalization LayerNormalization RMSNormalization GroupNormalization
    QuantizeLinear DequantizeLinear ScatterND ScatterElements RotaryEmbedding BiasGelu FastGelu QuickGelu SkipLayerNormalization
    SimplifiedLayerNormalization SkipSimplifiedLayerNormalization BitmaskDropout RandomNormalLike RandomUniformLike
    EmbedLayerNormalizationDummy Bernoulli""")
BROADCAST = words("""
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul
    Or Pow Sub Sum Where Xor BiasSoftmax""")
BOOLEAN = words("And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor")


class ShapeConflictError(Exception):
    """The graph does not hold together at the sizes tried."""


@dataclass
class Point:
    """One choice of input sizes, and what follows from it."""

    batch: int
    feeds: dict[str, Shape]
    shapes: dict[str, Shape | None] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


def infer_point(graph: Graph, feeds: dict[str, Shape], batch: int) -> Point:
    """Propagate input shapes through the whole graph.

    Raises:
        ShapeConflictError: if an operator cannot take what reaches it.
    """
    point = Point(batch, dict(feeds))
    for item in graph.inputs:
        point.shapes[item.name] = feeds.get(item.name)
        point.types[item.name] = item.type.tensor_type.elem_type
    for name, tensor in graph.initializers.items():
        point.shapes[name] = tuple(tensor.dims)
        point.types[name] = tensor.data_type
        if int(np.prod(tensor.dims, dtype=np.float64)) <= 4096:
            value = graph.constant(name)
            if value is not None:
                point.values[name] = value
    for node in graph.nodes:
        _visit(graph, node, point)
    return point


def _visit(graph: Graph, node: NodeProto, point: Point) -> None:
    shapes = [point.shapes.get(name) if name else None for name in node.input]
    values = [point.values.get(name) if name else None for name in node.input]
    try:
        if node.op_type == "If" and values[0] is not None:
            _visit_branch(graph, node, bool(np.asarray(values[0]).reshape(-1)[0]), point)
            return
        if _try_fold(node, shapes, values, point):
            return
        results = _shape_rule(graph, node, shapes, values, point)
    except (ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
        raise ShapeConflictError(f"node {node.name or node.op_type!r}: {one_line(error)}") from None
    for name, result in zip(node.output, results, strict=False):
        if name:
            shape, element_type = result
            point.shapes[name] = shape
            point.types[name] = element_type


def _visit_branch(graph: Graph, node: NodeProto, condition: bool, point: Point) -> None:
    """An If whose condition depends on sizes only has the shapes of the branch that is taken."""
    body = attribute(node, "then_branch" if condition else "else_branch")
    for tensor in body.initializer:
        point.shapes[tensor.name], point.types[tensor.name] = tuple(tensor.dims), tensor.data_type
        if int(np.prod(tensor.dims, dtype=np.float64)) <= 4096:
            point.values[tensor.name] = onnx.numpy_helper.to_array(tensor, base_dir=str(graph.folder))
    for inner in body.node:
        _visit(graph, inner, point)
    for name, result in zip(node.output, body.output, strict=False):
        point.shapes[name] = point.shapes.get(result.name)
        point.types[name] = point.types.get(result.name, 0)
        if result.name in point.values:
            point.values[name] = point.values[result.name]


def _try_fold(node: NodeProto, shapes: list[Shape | None], values: list[NDArray[Any] | None], point: Point) -> bool:
    if node.domain not in STANDARD_DOMAINS:
        return False
    if node.op_type == "Shape" and shapes and shapes[0] is not None:
        start, end = int(attribute(node, "start", 0)), attribute(node, "end")
        results = [np.asarray(shapes[0][start : None if end is None else int(end)], np.int64)]
    elif node.op_type == "Size" and shapes and shapes[0] is not None:
        results = [np.asarray(np.prod(shapes[0], dtype=np.int64))]
    elif node.op_type == "CastLike" and values[0] is not None and point.types.get(node.input[1]):
        results = [values[0].astype(folding.numpy_type(point.types[node.input[1]]))]
    elif any(value is None and name for value, name in zip(values, node.input, strict=True)):
        return False
    else:
        try:
            results = folding.fold(node, values)
        except folding.CannotFoldError:
            return False
    for name, value in zip(node.output, results, strict=False):
        if name:
            point.shapes[name] = value.shape
            point.types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            point.values[name] = value
    return True


def _shape_rule(
    graph: Graph,
    node: NodeProto,
    shapes: list[Shape | None],
    values: list[NDArray[Any] | None],
    point: Point,
) -> list[tuple[Shape | None, int]]:
    op_type = node.op_type
    element_type = point.types.get(node.input[0], 0) if node.input else 0
    if op_type in BOOLEAN:
        element_type = TensorProto.BOOL
    elif op_type == "Cast":
        element_type = int(attribute(node, "to", element_type))
    elif op_type == "CastLike" or op_type == "Where":
        element_type = point.types.get(node.input[1], 0)
    first = shapes[0] if shapes else None
    if op_type in SAME_AS_FIRST and op_type not in ("QuantizeLinear", "DequantizeLinear"):
        if op_type in ("LayerNormalization", "SkipLayerNormalization", "BatchNormalization", "Dropout"):
            extra: Shape | None = first if op_type in ("Dropout",) else None
            results: list[tuple[Shape | None, int]] = [(first, element_type)] + [(extra, element_type)] * 3
            if op_type == "SkipLayerNormalization":
                results[3] = (first, element_type)
            return results
        return [(first, element_type)] * max(1, len(node.output))
    if op_type in ("QuantizeLinear", "DequantizeLinear"):
        return [(first, TensorProto.FLOAT if op_type == "DequantizeLinear" else TensorProto.UINT8)]
    if op_type in BROADCAST:
        if any(shape is None for shape in shapes):
            return [(None, element_type)]
        return [
            (
                tuple(int(size) for size in np.broadcast_shapes(*(shape for shape in shapes if shape is not None))),
                element_type,
            )
        ]
    if node.domain == MICROSOFT:
        return _microsoft_rule(node, shapes, element_type)
    if node.domain == DOMAIN and op_type in (ATTENTION, MASKED_ATTENTION):
        return [(first, element_type)]
    if node.domain not in STANDARD_DOMAINS:
        return [(None, element_type)] * len(node.output)
    if op_type == "MatMul" and first is not None and shapes[1] is not None:
        return [(_matmul_shape(first, shapes[1]), element_type)]
    if op_type == "Transpose" and first is not None:
        perm = attribute(node, "perm") or range(len(first) - 1, -1, -1)
        if sorted(perm) != list(range(len(first))):
            raise ValueError(f"perm {list(perm)} does not fit shape {list(first)}")
        return [(tuple(first[axis] for axis in perm), element_type)]
    if op_type == "Reshape" and first is not None and values[1] is not None:
        return [(folding.reshape_target(node, first, values[1].tolist()), element_type)]
    if op_type == "Expand" and first is not None and values[1] is not None:
        wanted = tuple(int(size) for size in values[1])
        return [(tuple(int(size) for size in np.broadcast_shapes(first, wanted)), element_type)]
    return _general_rule(graph, node, shapes, values, point)


def _matmul_shape(left: Shape, right: Shape) -> Shape:
    a, b = (left if len(left) > 1 else (1, *left)), (right if len(right) > 1 else (*right, 1))
    if a[-1] != b[-2]:
        raise ValueError(f"MatMul of {list(left)} with {list(right)}")
    result = [int(size) for size in np.broadcast_shapes(a[:-2], b[:-2])] + [a[-2], b[-1]]
    if len(left) == 1:
        del result[-2]
    if len(right) == 1:
        del result[-1]
    return tuple(result)


def _as_matrix(node: NodeProto, shape: Shape, side: str) -> Shape:
    """Shape of a FusedMatMul operand once its transpositions are done."""
    if attribute(node, f"transBatch{side}", 0):
        shape = (*shape[1:-1], shape[0], shape[-1])
    return (*shape[:-2], shape[-1], shape[-2]) if attribute(node, f"trans{side}", 0) else shape


def _microsoft_rule(node: NodeProto, shapes: list[Shape | None], element_type: int) -> list[tuple[Shape | None, int]]:
    first = shapes[0] if shapes else None
    result: Shape | None = None
    if node.op_type == "FusedMatMul" and first is not None and shapes[1] is not None:
        result = _matmul_shape(_as_matrix(node, first, "A"), _as_matrix(node, shapes[1], "B"))
    elif node.op_type == "Attention" and first is not None and shapes[1] is not None:
        sizes = attribute(node, "qkv_hidden_sizes")
        result = (*first[:2], int(sizes[2]) if sizes else shapes[1][1] // 3)
    elif node.op_type == "MultiHeadAttention" and first is not None:
        value = shapes[2] if len(shapes) > 2 else None
        if len(first) == 5:
            result = (first[0], first[1], first[2] * first[4])
        elif value is not None and len(value) == 4:
            result = (first[0], first[1], value[1] * value[3])
        else:
            result = (*first[:2], value[2]) if value is not None else first
    elif node.op_type in ("NhwcConv", "FusedConv"):
        return [(None, element_type)]
    return [(result, element_type)] + [(None, element_type)] * max(0, len(node.output) - 1)


def _general_rule(
    graph: Graph,
    node: NodeProto,
    shapes: list[Shape | None],
    values: list[NDArray[Any] | None],
    point: Point,
) -> list[tuple[Shape | None, int]]:
    """Ask onnx's own inference about one node."""
    unknown: list[tuple[Shape | None, int]] = [(None, point.types.get(node.input[0], 0) if node.input else 0)] * len(
        node.output
    )
    if any(True for _ in subgraphs(node)):
        return unknown
    types: dict[str, TypeProto] = {}
    data: dict[str, TensorProto] = {}
    bf16 = False
    for name, shape, value in zip(node.input, shapes, values, strict=True):
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
        schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version
        )
    except onnx.defs.SchemaError:
        return unknown
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
        return unknown
    results = [_from_type(found.get(name)) for name in node.output]
    back = {TensorProto.FLOAT: TensorProto.BFLOAT16} if bf16 else {}
    return [(shape, back.get(element_type, element_type)) for shape, element_type in results]


def _from_type(found: TypeProto | None) -> tuple[Shape | None, int]:
    if found is None or not found.HasField("tensor_type"):
        return None, 0
    tensor = found.tensor_type
    if not tensor.HasField("shape") or any(not dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None, tensor.elem_type
    return tuple(int(dim.dim_value) for dim in tensor.shape.dim), tensor.elem_type


IMAGE_SIZES = (224, 256, 384, 512, 518, 336, 448, 192, 160, 128, 112, 96, 64, 56, 48, 32, 640, 1024)
"""Tried for open heights and widths, the multiples of 14, 16 and 32 first."""

TOKEN_COUNTS = (197, 257, 577, 1025, 196, 256, 576, 1024, 50, 49, 65, 64, 17, 16, 145, 144, 128, 100)
TEXT_LENGTHS = (16, 77, 64, 128, 12, 8, 32, 20)
"""Tried for inputs that are tokens already, and for texts."""


def find_points(graph: Graph, overrides: dict[str, Shape] | None = None) -> list[Point]:
    """Choose up to three input sizes at which the graph holds together.

    Raises:
        ShapeConflictError: if it holds together at none; the message is that of the last size tried.
    """
    given = overrides or {}
    dims = {item.name: _declared(item.type) for item in graph.inputs}
    open_spatial = any(_is_open(name, dims, given, spatial=True) for name in dims)
    open_batch = any(_is_open(name, dims, given, spatial=False) for name in dims)
    points: list[Point] = []
    failure = "no input sizes fit"
    batches = (2, 3) if open_batch else (1,)
    first: int | None = None
    first_attempt = 0
    candidates = IMAGE_SIZES if open_spatial else IMAGE_SIZES[:1]
    for attempt, size in enumerate(candidates):
        for batch in batches[:1] + ((1,) if open_batch else ()):
            try:
                points.append(_point_at(graph, dims, given, batch, (size, size), attempt))
                first, first_attempt = size, attempt
                break
            except ShapeConflictError as error:
                failure = str(error)
        if first is not None:
            break
    if first is None:
        raise ShapeConflictError(failure)
    others: list[tuple[int, tuple[int, int]]] = []
    if open_batch and points[0].batch == 2:
        others.append((3, (first, first)))
    if open_spatial:
        others = [(batches[-1] if points[0].batch == 2 else points[0].batch, pair) for pair in _other_sizes(first)]
    for batch, pair in others:
        if len(points) == 3:
            break
        try:
            points.append(_point_at(graph, dims, given, batch, pair, first_attempt))
        except ShapeConflictError:
            continue
    return points


MOST_MEASUREMENTS = 4
LARGEST_MEASURED_INPUT = 1 << 26
"""Elements; larger inputs are not run just to see shapes."""


def _measure_unknown(graph: Graph, point: Point) -> None:
    """Learn the shapes that no rule gives (operators of other domains, loops) by running the file in onnxruntime."""
    if sum(int(np.prod(shape, dtype=np.float64)) for shape in point.feeds.values()) > LARGEST_MEASURED_INPUT:
        return
    feeds = {
        item.name: np.ones(point.feeds[item.name], folding.numpy_type(item.type.tensor_type.elem_type))
        for item in graph.inputs
    }
    for _ in range(MOST_MEASUREMENTS):
        frontier = [
            name
            for index in sorted(graph.live)
            for name in graph.nodes[index].output
            if name and point.shapes.get(name) is None and _inputs_known(graph.nodes[index], point)
        ]
        if not frontier:
            return
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        known = {item.name for item in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in frontier if name not in known)
        try:
            results = run_session(open_session(model, folder=graph.folder, optimise=False), feeds, frontier)
        except InputFileError:
            return
        for name, result in results.items():
            if isinstance(result, np.ndarray):
                point.shapes[name] = result.shape
                point.types[name] = onnx.helper.np_dtype_to_tensor_dtype(result.dtype)
        for node in graph.nodes:
            if any(name and point.shapes.get(name) is None for name in node.output):
                _visit(graph, node, point)


def _inputs_known(node: NodeProto, point: Point) -> bool:
    return all(point.shapes.get(name) is not None for name in node.input if name)


def _other_sizes(first: int) -> Sequence[tuple[int, int]]:
    return ((first, 2 * first), (2 * first, first), (first, 256), (first, 384), (256, 384), (2 * first, 2 * first))


def _declared(kind: TypeProto) -> list[int | str | None]:
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else (dim.dim_param or None)
        for dim in kind.tensor_type.shape.dim
    ]


def _is_open(name: str, dims: dict[str, list[int | str | None]], given: dict[str, Shape], *, spatial: bool) -> bool:
    if name in given:
        return False
    sizes = dims[name][1:] if spatial else dims[name][:1]
    return any(not isinstance(size, int) for size in sizes)


def _point_at(
    graph: Graph,
    dims: dict[str, list[int | str | None]],
    given: dict[str, Shape],
    batch: int,
    size: tuple[int, int],
    attempt: int = 0,
) -> Point:
    named: dict[str, int] = {}
    for sizes in dims.values():
        if sizes and isinstance(sizes[0], str):
            named[sizes[0]] = batch
    feeds = {name: given.get(name) or _concrete(sizes, batch, size, named, attempt) for name, sizes in dims.items()}
    if any(0 in shape for shape in feeds.values()):
        raise ShapeConflictError("an input has a dimension of size 0")
    batches = [feeds[item.name][0] for item in graph.inputs if len(feeds[item.name]) > 1]
    point = infer_point(graph, feeds, max(set(batches), key=batches.count) if batches else batch)
    if any(point.shapes.get(name) is None for index in graph.live for name in graph.nodes[index].output if name):
        _measure_unknown(graph, point)
    return point


def _concrete(
    sizes: list[int | str | None], batch: int, size: tuple[int, int], named: dict[str, int], attempt: int
) -> Shape:
    rank = len(sizes)
    wide = size[0] != size[1]
    result: list[int] = []
    for axis, declared in enumerate(sizes):
        if isinstance(declared, int):
            result.append(declared)
            continue
        if axis == 0:
            guess = batch
        elif rank == 2:
            guess = 24 if wide else TEXT_LENGTHS[attempt % len(TEXT_LENGTHS)]
        elif rank == 3:
            guess = 257 if wide else TOKEN_COUNTS[attempt % len(TOKEN_COUNTS)]
        elif axis == rank - 2:
            guess = size[0]
        elif axis == rank - 1:
            guess = size[1]
        else:
            guess = 3
        if isinstance(declared, str):
            guess = named.setdefault(declared, guess)
        result.append(guess)
    return tuple(result)
