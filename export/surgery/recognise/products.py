"""Products of two tensors, however they are spelt, by the meaning of their axes."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import attribute, input_names
from fna.export.surgery.recognise.context import PRODUCTS, Axes, Context, Side, describe
from fna.export.surgery.recognise.layout import is_view
from fna.export.surgery.recognise.rows import RefusedError


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


def understand_product(context: Context, node: gs.Node) -> Product:
    """Read MatMul, FusedMatMul, Gemm and Einsum alike."""
    left, right = node.inputs[0].name, node.inputs[1].name
    rank_left, rank_right = context.rank(left), context.rank(right)
    if node.op == "Einsum":
        return _einsum_product(context, node)
    bias = node.inputs[2].name if node.op == "Gemm" and len(node.inputs) > 2 else ""
    if bias and context.bounds.find(bias).single != 0:
        raise RefusedError(f"a bias is added to its scores ({describe(node)})")
    if rank_left != rank_right or rank_left < 2:
        raise RefusedError(f"operands of different ranks ({describe(node)}): not self-attention over all heads alike")
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


def _matrix_axes(rank: int, node: gs.Node, side: str) -> tuple[tuple[int, ...], int, int]:
    """Batch axes, rows and columns of a MatMul operand.

    ONNX Runtime's `transBatch` moves the first axis behind the batch axes: `[M, batch..., K]`, or `[K, batch..., M]` with `trans`.
    """
    if attribute(node, f"transBatch{side}", 0):
        first, last = (rank - 1, 0) if attribute(node, f"trans{side}", 0) else (0, rank - 1)
        return tuple(range(1, rank - 1)), first, last
    rows, columns = (rank - 1, rank - 2) if attribute(node, f"trans{side}", 0) else (rank - 2, rank - 1)
    return tuple(range(rank - 2)), rows, columns


def _einsum_product(context: Context, node: gs.Node) -> Product:
    equation = str(attribute(node, "equation", "")).replace(" ", "")
    problem = RefusedError(
        f"the equation {equation!r} of {describe(node)} is not a product of queries and keys or values"
    )
    if equation.count("->") != 1 or len(node.inputs) != 2:
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
    shape_a, shape_b = context.shape(node.inputs[0].name), context.shape(node.inputs[1].name)
    if len(shape_a) != len(a) or len(shape_b) != len(b):
        raise problem
    if any(shape_a[a.index(letter)] != shape_b[b.index(letter)] for letter in both):
        raise RefusedError(
            f"operands with different batch or head sizes ({describe(node)}: grouped or multi-query heads)"
        )
    return Product(
        Side(node.inputs[0].name, Axes(tuple(a.index(x) for x in both), a.index(only_a[0]), a.index(summed[0]))),
        Side(node.inputs[1].name, Axes(tuple(b.index(x) for x in both), b.index(only_b[0]), b.index(summed[0]))),
        tuple(out.index(x) for x in both),
        out.index(only_a[0]),
        out.index(only_b[0]),
        1.0,
    )


def _spell_out_ellipsis(context: Context, node: gs.Node, parts: list[str], out: str) -> tuple[list[str], str]:
    """Replace `...` by letters that are not used otherwise."""
    free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in "".join(parts) + out]
    count = 0
    for part, name in zip(parts, input_names(node), strict=True):
        if "..." in part:
            count = max(count, context.rank(name) - (len(part) - 3))
    letters = "".join(free[:count])
    spelt = []
    for part, name in zip(parts, input_names(node), strict=True):
        own = context.rank(name) - (len(part) - 3) if "..." in part else 0
        spelt.append(part.replace("...", letters[count - own :] if own else ""))
    return spelt, out.replace("...", letters)


def reaches_product(context: Context, name: str) -> bool:
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
        if node.op in PRODUCTS:
            if all(name in graph.data for name in input_names(node)[:2]):
                return True
            if node.op != "Einsum":
                continue
        if node.op in ("Softmax", "LayerNormalization", "Conv"):
            continue
        todo.extend(name for name in input_names(node) if name in graph.data)
    return False


def mixes_heads(context: Context, name: str) -> bool:
    """Whether a tensor comes from a product of data through products with weights, with views between them only."""
    graph = context.graph
    for _ in range(16):
        node = graph.source(name)
        if node is None:
            return False
        data = [name for name in input_names(node) if name in graph.data]
        if node.op in PRODUCTS and len(data) == 2:
            return True
        if len(data) != 1 or not (
            node.op in PRODUCTS or is_view(node) or node.op in ("Add", "Mul", "Div", "Cast", "Conv")
        ):
            return False
        name = data[0]
    return False
