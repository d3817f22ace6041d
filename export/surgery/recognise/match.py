"""Finding attention: from each softmax outward, until query, key, value, scale, mask and output are known.

A softmax is the anchor. Below it lies the product with the values, above it the scale, the mask and the product of queries
and keys. What is neither understood nor provably without effect is a reason to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from fna.export.surgery.graph.bounds import BoundsFinder
from fna.export.surgery.graph.fold import CannotFoldError
from fna.export.surgery.graph.index import MICROSOFT, STANDARD_DOMAINS, Graph, attribute, words
from fna.export.surgery.graph.shapes import Point
from fna.export.surgery.recognise.layout import is_view, scalar_factor, scalar_of
from fna.export.surgery.recognise.rows import RefusedError
from fna.export.surgery.recognise.token_labels import run_view

NEGLIGIBLE = -1e4
"""Mask values below this remove a key from the softmax."""

PRODUCTS = words("MatMul FusedMatMul Einsum Gemm")
NOT_A_MASK = "scores altered by"


@dataclass(frozen=True)
class Axes:
    """What the axes of a product's operand are: the batch axes (heads among them), the token axis, the summed axis."""

    batch: tuple[int, ...]
    token: int
    channel: int


@dataclass(frozen=True)
class Side:
    """One operand of an attention product."""

    tensor: str
    axes: Axes


@dataclass
class Core:
    """Softmax(scale * Q K^T) V as found, before its layouts are understood."""

    query: Side
    key: Side
    value: Side
    scale: float
    output: str
    output_axes: Axes
    family: str
    packed_heads: int | None = None
    """Where given, the channel axis of query, key, value and output holds this many heads, one after another."""


class Context:
    """What matching looks things up in."""

    def __init__(self, graph: Graph, points: list[Point]) -> None:
        self.graph = graph
        self.points = points
        self.bounds = BoundsFinder(graph, points)

    def rank(self, name: str) -> int:
        """Rank of a tensor; refuses where it is not known."""
        shape = self.points[0].shapes.get(name)
        if shape is None:
            raise RefusedError(f"the shape of {name!r} could not be inferred")
        return len(shape)

    def shape(self, name: str, point: Point | None = None) -> tuple[int, ...]:
        """Shape of a tensor at one of the points; refuses where it is not known."""
        shape = (point or self.points[0]).shapes.get(name)
        if shape is None:
            raise RefusedError(f"the shape of {name!r} could not be inferred")
        return shape


# ---------------------------------------------------------------- below the softmax


@dataclass(frozen=True)
class Below:
    """The product that the attention weights end in."""

    product: int
    weights: str
    axis: int


def walk_down(context: Context, weights: str, axis: int) -> Below:
    """Follow the attention weights to their product with the values; `axis` is the one the softmax sums over."""
    graph = context.graph
    for _ in range(64):
        if weights in graph.outputs:
            raise RefusedError("its attention weights are an output of the graph")
        readers = [i for i in graph.readers(weights) if graph.nodes[i].op_type not in ("Shape", "Size")]
        guard = _nan_guard(graph, weights, readers)
        if guard is not None:
            weights = guard
            continue
        if not readers:
            raise RefusedError("nothing reads its attention weights")
        if len(readers) > 1:
            named = ", ".join(sorted({_describe(graph.nodes[i]) for i in readers}))
            raise RefusedError(f"its attention weights are read by more than the product with the values: {named}")
        index = readers[0]
        node = graph.nodes[index]
        if node.op_type in PRODUCTS:
            others = [name for name in node.input[:2] if name != weights]
            if len(others) == 1 and others[0] in graph.data:
                return Below(index, weights, axis)
            raise RefusedError(
                f"head mixing after the softmax ({_describe(node)} with constant weights: talking heads)"
            )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            raise RefusedError("its attention weights are quantized")
        if node.op_type in ("Cast", "Identity", "Dropout", "CastLike"):
            if (
                node.op_type == "Dropout"
                and len(node.output) > 1
                and any(graph.readers(n) for n in node.output[1:] if n)
            ):
                raise RefusedError("the mask of a Dropout on its attention weights is read")
            if node.op_type == "Dropout" and not _dropout_is_off(context, node):
                raise RefusedError("a Dropout in training mode acts on its attention weights")
            weights = node.output[0]
            continue
        if is_view(node) and node.input[0] == weights and len(node.output) == 1:
            axis = _axis_through_view(context, node, axis)
            weights = node.output[0]
            continue
        scaled = scalar_factor(graph, context.points, node)
        if scaled is not None and abs(scaled[1] - 1.0) < 1e-9:
            weights = node.output[0]
            continue
        if node.op_type in ("Conv", "Concat"):
            raise RefusedError(f"head mixing after the softmax ({_describe(node)})")
        raise RefusedError(f"its attention weights are altered by {_describe(node)}")
    raise RefusedError("its attention weights pass through too many nodes")


def _nan_guard(graph: Graph, weights: str, readers: Sequence[int]) -> str | None:
    """`Where(IsNaN(w), 0, w)`, which only acts where a whole row is masked."""
    kinds = {graph.nodes[i].op_type for i in readers}
    if not readers or not kinds <= {"IsNaN", "Where"} or "Where" not in kinds:
        return None
    wheres = [graph.nodes[i] for i in readers if graph.nodes[i].op_type == "Where"]
    checks = [graph.nodes[i] for i in readers if graph.nodes[i].op_type == "IsNaN"]
    if len(wheres) != 1 or len(checks) != 1:
        return None
    where, check = wheres[0], checks[0]
    alone = [graph.nodes[i] for i in graph.readers(check.output[0])] == [where]
    if where.input[0] == check.output[0] and where.input[2] == weights and where.input[1] not in graph.data and alone:
        return where.output[0]
    return None


def _dropout_is_off(context: Context, node: NodeProto) -> bool:
    if len(node.input) < 3 or not node.input[2]:
        return True
    return context.bounds.find(node.input[2]).high == 0


# ---------------------------------------------------------------- above the softmax


@dataclass
class Above:
    """The product that the scores come from."""

    product: int
    scores: str
    axis: int
    factor: float


def walk_up(context: Context, scores: str, axis: int) -> Above | None:
    """Follow the scores to the product of queries and keys; None if they come from no product at all.

    Refusals carry the reason; the caller decides whether this softmax is attention.
    """
    graph = context.graph
    factor = 1.0
    for _ in range(64):
        node = graph.source(scores)
        if node is None:
            return None
        index = graph.producer[scores]
        op_type = node.op_type
        _check_single_reader(graph, scores)
        if op_type in PRODUCTS and node.domain in (*STANDARD_DOMAINS, MICROSOFT):
            return Above(index, scores, axis, factor)
        if op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise RefusedError("its scores are quantized (attention inside quantize/dequantize pairs)")
        if op_type in ("Cast", "Identity", "CastLike") or (op_type == "Dropout" and _dropout_is_off(context, node)):
            if op_type == "Cast" and context.points[0].types.get(node.input[0]) not in (1, 10, 11, 16):
                raise RefusedError(f"{NOT_A_MASK} {_describe(node)}")
            scores = node.input[0]
            continue
        if is_view(node):
            axis = _axis_through_view(context, node, axis, upward=True)
            scores = node.input[0]
            continue
        scaled = scalar_factor(graph, context.points, node)
        if scaled is not None:
            scores, number = scaled
            factor *= number
            continue
        if op_type in ("Mul", "Div"):
            raise RefusedError(_temperature_reason(context, node))
        if op_type == "Neg":
            scores, factor = node.input[0], -factor
            continue
        if op_type in ("Add", "Sub", "Sum", "BiasSoftmax"):
            scores = _through_addition(context, node)
            continue
        if op_type == "Where":
            scores = _through_where(context, node)
            continue
        if op_type in ("Max", "Clip", "Min"):
            scores = _through_clip(context, node)
            continue
        if op_type == "Tanh":
            raise RefusedError("its scores are capped by Tanh (softcap)")
        if op_type in ("Conv", "ConvTranspose"):
            raise RefusedError(f"head mixing before the softmax ({_describe(node)}: talking heads)")
        if op_type == "Concat":
            raise RefusedError(f"its scores are joined with others ({_describe(node)}: attention sink or bias token)")
        raise RefusedError(f"{NOT_A_MASK} {_describe(node)}")
    raise RefusedError("its scores pass through too many nodes")


def _check_single_reader(graph: Graph, scores: str) -> None:
    """Scores that something else needs would still be computed in full, so nothing would be gained."""
    if scores in graph.outputs:
        raise RefusedError("its scores are an output of the graph")
    harmless = ("Shape", "Size", "ReduceMax", "ReduceLogSumExp", "IsNaN", "CastLike")
    readers = [graph.nodes[i] for i in graph.readers(scores) if graph.nodes[i].op_type not in harmless]
    if len(readers) > 1:
        raise RefusedError(f"its scores are read by {' and '.join(sorted({_describe(node) for node in readers}))}")


def _temperature_reason(context: Context, node: NodeProto) -> str:
    graph = context.graph
    constants = [name for name in node.input if name not in graph.data]
    if not constants:
        return f"its scores are multiplied by a value that depends on data ({_describe(node)})"
    shape = context.points[0].shapes.get(constants[0])
    if scalar_of(context.points[:1], graph, constants[0]) is not None:
        return f"its scale changes with the input's size ({_describe(node)})"
    return f"its temperature is not one scalar (shape {list(shape or ())}: per head or learned, {_describe(node)})"


def _through_addition(context: Context, node: NodeProto) -> str:
    """The operand of an addition that carries the scores, once the other is proven to be without effect."""
    graph = context.graph
    names = list(node.input)
    if node.op_type == "Sub":
        main, other = names
        source = graph.source(other)
        if source is not None and source.op_type == "ReduceMax" and source.input[0] == main:
            return main
        candidates = [main]
    else:
        candidates = [name for name in names if name in graph.data and _reaches_product(context, name)]
    if not candidates:
        if any(_mixes_heads(context, name) for name in names):
            raise RefusedError(f"head mixing before the softmax ({_describe(node)}: talking heads)")
        raise RefusedError(f"{NOT_A_MASK} {_describe(node)}")
    if len(candidates) > 1:
        raise RefusedError(
            f"a position bias computed from the queries, or a second product, is added to its scores ({_describe(node)})"
        )
    main = candidates[0]
    for other in names:
        if other == main:
            continue
        bounds = context.bounds.find(other)
        if bounds.single is not None and not _widens(context, main, node.output[0]):
            continue
        raise RefusedError(_mask_reason(context, other, node))
    return main


def _widens(context: Context, data: str, result: str) -> bool:
    return any(point.shapes.get(data) != point.shapes.get(result) for point in context.points)


def _reaches_product(context: Context, name: str) -> bool:
    """Whether a tensor comes, through elementwise operators and views only, from a product of two tensors of data."""
    graph = context.graph
    todo: list[str] = [name]
    seen: set[str] = set()
    while todo and len(seen) < 48:
        current = todo.pop()
        node = graph.source(current)
        if node is None or current in seen:
            continue
        seen.add(current)
        if node.op_type in PRODUCTS:
            if all(item in graph.data for item in node.input[:2]):
                return True
            if node.op_type != "Einsum":
                continue
        if node.op_type in ("Softmax", "LayerNormalization", "Conv"):
            continue
        todo.extend(item for item in node.input if item in graph.data)
    return False


def _mixes_heads(context: Context, name: str) -> bool:
    """Whether a tensor comes from a product of data through products with weights, with views between them only."""
    graph = context.graph
    for _ in range(16):
        node = graph.source(name)
        if node is None:
            return False
        data = [item for item in node.input if item in graph.data]
        if node.op_type in PRODUCTS and len(data) == 2:
            return True
        if len(data) != 1 or not (
            node.op_type in PRODUCTS or is_view(node) or node.op_type in ("Add", "Mul", "Div", "Cast", "Conv")
        ):
            return False
        name = data[0]
    return False


def _mask_reason(context: Context, mask: str, node: NodeProto) -> str:
    """Say what kind of mask or bias this is."""
    graph = context.graph
    if mask in graph.data:
        return f"its mask or bias depends on data ({_describe(node)}: padding mask or position bias)"
    value = context.points[0].values.get(mask)
    if value is None:
        value = graph.constant(mask)
    return f"{constant_mask_kind(context, mask, value)} ({_describe(node)})"


def constant_mask_kind(context: Context, mask: str, value: np.ndarray | None) -> str:
    """Say what a constant mask is: causal, a position bias, or another mask; `value` is its value where that is known."""
    if value is None:
        bounds = context.bounds.find(mask)
        if bounds.high <= 0 and bounds.low < NEGLIGIBLE:
            return "an attention mask that is not provably without effect"
        return "a position bias is added to its scores"
    array = np.asarray(value, np.float64) if value.dtype != bool else np.where(value, 0.0, -np.inf)
    blocked = array < NEGLIGIBLE
    if not blocked.any():
        return "a position bias is added to its scores"
    if array.ndim >= 2 and array.shape[-1] == array.shape[-2]:
        plane = blocked.reshape(-1, *array.shape[-2:])[0]
        if (plane == np.triu(np.ones_like(plane), 1)).all():
            return "a causal mask"
    return "an attention mask"


def _through_where(context: Context, node: NodeProto) -> str:
    graph = context.graph
    condition, yes, no = node.input
    bounds = context.bounds.find(condition)
    chosen = yes if bounds.low > 0 else no if bounds.high == 0 else None
    if chosen is not None and not _widens(context, chosen, node.output[0]):
        return chosen
    fills = [name for name in (yes, no) if name not in graph.data]
    if fills and condition not in graph.data:
        value = context.points[0].values.get(condition)
        if value is None:
            value = graph.constant(condition)
        if value is not None and fills[0] == yes:
            value = ~value.astype(bool)
        raise RefusedError(f"{constant_mask_kind(context, condition, value)} ({_describe(node)})")
    if condition in graph.data:
        raise RefusedError(f"its mask depends on data ({_describe(node)}: padding mask)")
    raise RefusedError(f"{NOT_A_MASK} {_describe(node)}")


def _through_clip(context: Context, node: NodeProto) -> str:
    """A lower limit at the type's lowest value, or an upper one at its highest, does nothing."""
    graph = context.graph
    names = [name for name in node.input if name]
    data = [name for name in names if name in graph.data]
    if len(data) == 1:
        limits = [context.bounds.find(name) for name in names if name != data[0]]
        largest = 6.5e4 if context.points[0].types.get(data[0]) == 10 else 1e30
        harmless = {
            "Max": all(item.high <= -largest for item in limits),
            "Min": all(item.low >= largest for item in limits),
            "Clip": all(item.high <= -largest or item.low >= largest for item in limits),
        }
        if harmless[node.op_type] and not _widens(context, data[0], node.output[0]):
            return data[0]
    raise RefusedError(f"{NOT_A_MASK} {_describe(node)}")


# ---------------------------------------------------------------- axes


def _axis_through_view(context: Context, node: NodeProto, axis: int, *, upward: bool = False) -> int:
    """Where one axis of a tensor goes through a view, found by running the view on that axis's coordinates."""
    source, target = node.input[0], node.output[0]
    inside, outside = context.shape(source), context.shape(target)
    try:
        if not upward:
            return _follow_axis(node, inside, outside, axis, context.points[0])
        for candidate in range(len(inside)):
            if inside[candidate] == outside[axis]:
                try:
                    if _follow_axis(node, inside, outside, candidate, context.points[0]) == axis:
                        return candidate
                except RefusedError:
                    continue
    except (CannotFoldError, ValueError, IndexError):
        pass
    raise RefusedError(f"a view of its scores splits or merges the axis of the keys ({_describe(node)})")


def _follow_axis(node: NodeProto, inside: Sequence[int], outside: Sequence[int], axis: int, point: Point) -> int:
    coordinate = np.arange(inside[axis]).reshape([-1 if i == axis else 1 for i in range(len(inside))])
    moved = run_view(node, np.broadcast_to(coordinate, inside), point)[0]
    if moved.shape != tuple(outside):
        raise RefusedError(f"a view of its scores is not understood ({_describe(node)})")
    for candidate in range(len(outside)):
        if outside[candidate] != inside[axis] or outside[candidate] < 2:
            continue
        wanted = np.arange(outside[candidate]).reshape([-1 if i == candidate else 1 for i in range(len(outside))])
        if (moved == wanted).all():
            return candidate
    raise RefusedError(f"a view of its scores splits or merges the axis of the keys ({_describe(node)})")


def _describe(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type


# ---------------------------------------------------------------- products


@dataclass(frozen=True)
class Product:
    """A product of two tensors, by the meaning of its axes.

    `out_batch`, `out_left` and `out_right` are axes of the output: shared by both operands, of the left only, of the right only.
    """

    left: Side
    right: Side
    out_batch: tuple[int, ...]
    out_left: int
    out_right: int
    factor: float


def understand_product(context: Context, node: NodeProto) -> Product:
    """Read MatMul, FusedMatMul, Gemm and Einsum alike."""
    left, right = node.input[0], node.input[1]
    rank_left, rank_right = context.rank(left), context.rank(right)
    if node.op_type == "Einsum":
        return _einsum_product(context, node)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    if bias and context.bounds.find(bias).single != 0:
        raise RefusedError(f"a bias is added to its scores ({_describe(node)})")
    if rank_left != rank_right or rank_left < 2:
        raise RefusedError(f"operands of different ranks ({_describe(node)}): not self-attention over all heads alike")
    batch_left, row, inner = _matrix_axes(rank_left, node, "A")
    batch_right, inner_right, column = _matrix_axes(rank_right, node, "B")
    shape_left, shape_right = context.shape(left), context.shape(right)
    outer_left, outer_right = [shape_left[axis] for axis in batch_left], [shape_right[axis] for axis in batch_right]
    if outer_left != outer_right:
        raise RefusedError(
            f"operands with batch and head sizes {outer_left} and {outer_right} "
            "(grouped or multi-query heads, or a learned query)"
        )
    return Product(
        Side(left, Axes(batch_left, row, inner)),
        Side(right, Axes(batch_right, column, inner_right)),
        tuple(range(rank_left - 2)),
        rank_left - 2,
        rank_left - 1,
        float(attribute(node, "alpha", 1.0)),
    )


def _matrix_axes(rank: int, node: NodeProto, side: str) -> tuple[tuple[int, ...], int, int]:
    """Batch axes, rows and columns of a MatMul operand.

    ONNX Runtime's `transBatch` moves the first axis behind the batch axes: `[M, batch..., K]`, or `[K, batch..., M]` with `trans`.
    """
    if attribute(node, f"transBatch{side}", 0):
        first, last = (rank - 1, 0) if attribute(node, f"trans{side}", 0) else (0, rank - 1)
        return tuple(range(1, rank - 1)), first, last
    rows, columns = (rank - 1, rank - 2) if attribute(node, f"trans{side}", 0) else (rank - 2, rank - 1)
    return tuple(range(rank - 2)), rows, columns


def _einsum_product(context: Context, node: NodeProto) -> Product:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    problem = RefusedError(
        f"the equation {equation!r} of {_describe(node)} is not a product of queries and keys or values"
    )
    if equation.count("->") != 1 or len(node.input) != 2:
        raise problem
    terms, out = equation.split("->")
    parts = terms.split(",")
    if len(parts) != 2:
        raise problem
    if "..." in equation:
        parts, out = _spell_out_ellipsis(context, node, parts, out)
    a, b = parts
    if any(len(set(term)) != len(term) for term in (a, b, out)):
        raise problem
    both = [letter for letter in out if letter in a and letter in b]
    summed = [letter for letter in a if letter in b and letter not in out]
    only_a = [letter for letter in a if letter not in b]
    only_b = [letter for letter in b if letter not in a]
    if len(summed) != 1 or len(only_a) != 1 or len(only_b) != 1 or only_a[0] not in out or only_b[0] not in out:
        raise problem
    shape_a, shape_b = context.shape(node.input[0]), context.shape(node.input[1])
    if len(shape_a) != len(a) or len(shape_b) != len(b):
        raise problem
    if any(shape_a[a.index(letter)] != shape_b[b.index(letter)] for letter in both):
        raise RefusedError(
            f"operands with different batch or head sizes ({_describe(node)}: grouped or multi-query heads)"
        )
    return Product(
        Side(node.input[0], Axes(tuple(a.index(x) for x in both), a.index(only_a[0]), a.index(summed[0]))),
        Side(node.input[1], Axes(tuple(b.index(x) for x in both), b.index(only_b[0]), b.index(summed[0]))),
        tuple(out.index(x) for x in both),
        out.index(only_a[0]),
        out.index(only_b[0]),
        1.0,
    )


def _spell_out_ellipsis(context: Context, node: NodeProto, parts: list[str], out: str) -> tuple[list[str], str]:
    """Replace `...` by letters that are not used otherwise."""
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in "".join(parts) + out]
    count = 0
    for part, name in zip(parts, node.input, strict=True):
        if "..." in part:
            count = max(count, context.rank(name) - (len(part) - 3))
    letters = "".join(free[:count])
    spelt = []
    for part, name in zip(parts, node.input, strict=True):
        own = context.rank(name) - (len(part) - 3) if "..." in part else 0
        spelt.append(part.replace("...", letters[count - own :] if own else ""))
    return spelt, out.replace("...", letters)


def find_core(context: Context, scores: str, weights: str, axis: int, *, scale: float = 1.0) -> Core | None:
    """Understand what lies around a softmax of `scores` over `axis`, whose result is `weights`.

    Returns None if this is no attention: its result goes into no product with data, or its input comes from none.

    Raises:
        RefusedError: if it is attention, but not plain.
    """
    graph = context.graph
    below: Below | None = None
    trouble: RefusedError | None = None
    try:
        below = walk_down(context, weights, axis)
    except RefusedError as error:
        trouble = error
    above: Above | None = None
    above_trouble: RefusedError | None = None
    try:
        above = walk_up(context, scores, axis)
    except RefusedError as error:
        above_trouble = error
    if not _is_attention(context, scores, above, below):
        return None
    if above_trouble is not None:
        raise above_trouble
    if above is None:
        raise RefusedError("its scores come from no product of queries and keys (attention pooling)")
    product_node = graph.nodes[above.product]
    constants = [name for name in product_node.input[:2] if name not in graph.data]
    if constants and len(product_node.input) > 1:
        upper = next((name for name in product_node.input[:2] if name in graph.data), None)
        if upper is not None and _mixes_heads(context, upper):
            raise RefusedError(f"head mixing before the softmax ({_describe(product_node)}: talking heads)")
        raise RefusedError(f"a learned query: {constants[0]!r} does not depend on the image (pooling head)")
    if trouble is not None:
        raise trouble
    assert below is not None
    return _join(context, above, below, scale)


def _is_attention(context: Context, scores: str, above: Above | None, below: Below | None) -> bool:
    if scores not in context.graph.data:
        return False
    if below is not None:
        return True
    if above is not None and all(name in context.graph.data for name in context.graph.nodes[above.product].input[:2]):
        return len(context.shape(above.scores)) > 2
    if above is not None and not _mixes_heads(context, above.scores):
        return False
    from_product = _reaches_product(context, scores) or _mixes_heads(context, scores)
    return from_product and len(context.shape(scores)) > 2


def _join(context: Context, above: Above, below: Below, scale: float) -> Core:
    graph = context.graph
    first = understand_product(context, graph.nodes[above.product])
    if above.axis == first.out_right:
        query, key = first.left, first.right
    elif above.axis == first.out_left:
        query, key = first.right, first.left
    else:
        raise RefusedError("its softmax runs over the heads or the batch, not over the keys")
    node = graph.nodes[below.product]
    second = understand_product(context, node)
    weights, value = (second.left, second.right) if node.input[0] == below.weights else (second.right, second.left)
    if weights.axes.channel != below.axis:
        raise RefusedError("its softmax runs over another axis than the one that is summed with the values")
    out_token, out_channel = (
        (second.out_left, second.out_right) if weights is second.left else (second.out_right, second.out_left)
    )
    # in the product with the values, the summed axis of V is its tokens
    value_side = Side(value.tensor, Axes(value.axes.batch, value.axes.channel, value.axes.token))
    if second.factor != 1.0:
        raise RefusedError(f"its output is scaled inside {_describe(node)}, which is not supported")
    family = "+".join(dict.fromkeys([graph.nodes[above.product].op_type, "Softmax", node.op_type]))
    return Core(
        query,
        key,
        value_side,
        above.factor * first.factor * scale,
        node.output[0],
        Axes(second.out_batch, out_token, out_channel),
        family,
    )
