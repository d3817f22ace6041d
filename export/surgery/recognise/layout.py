"""Views: which tensors hold the same elements, and the cheapest way from one layout to another.

A view is judged by running it on element numbers, so that Reshape, Transpose, Squeeze, Split and the rest need no rules of
their own, and so that equal sizes (heads of 3 beside a packed 3, N equal to D) cannot be mistaken for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from fna.export.surgery.graph.fold import CannotFoldError
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import STANDARD_DOMAINS, GraphView, input_names, output_names, words
from fna.export.surgery.recognise.rows import Dim, Operand, RefusedError, Result
from fna.export.surgery.recognise.token_labels import VIEWS, run_view

Index = NDArray[np.int64]
PERMS = sorted(permutations(range(4)), key=lambda perm: sum(perm[axis] != axis for axis in range(4)))
LONGEST_CHAIN = 24


@dataclass(frozen=True)
class Link:
    """One tensor above an operand: `steps` lead from it down to the operand, which is `factor` times its elements.

    A step is a view and the one of its outputs that the way goes through.
    """

    tensor: str
    steps: tuple[tuple[gs.Node, str], ...]
    factor: float


REARRANGES = words("Reshape Transpose Squeeze Unsqueeze Flatten Identity Slice Split")
"""Views that hand on no element twice."""


def is_view(node: gs.Node | None) -> bool:
    """Whether a node only rearranges its first input."""
    return node is not None and node.op in VIEWS and node.op != "Concat" and node.domain in STANDARD_DOMAINS


def scalar_of(points: Sequence[ShapePoint], graph: GraphView, name: str) -> float | None:
    """The one finite number that a tensor holds at all sizes tried, if so."""
    numbers: set[float] = set()
    for point in points:
        value = point.values.get(name)
        if value is None:
            value = graph.constant(name)
        if value is None or value.size == 0 or value.dtype.kind in "OSU":
            return None
        flat = np.asarray(value, np.float64).reshape(-1)
        if not np.isfinite(flat[0]) or not (flat == flat[0]).all():
            return None
        numbers.add(float(flat[0]))
    return numbers.pop() if len(numbers) == 1 else None


def widens(points: Sequence[ShapePoint], data: str, result: str) -> bool:
    """Whether an elementwise result is larger than the operand (it was broadcast)."""
    return any(point.shapes.get(data) != point.shapes.get(result) for point in points)


def scalar_factor(graph: GraphView, points: Sequence[ShapePoint], node: gs.Node) -> tuple[str, float] | None:
    """For `x * c`, `c * x` and `x / c` with one number c: x and the factor."""
    if node.op not in ("Mul", "Div") or node.domain not in STANDARD_DOMAINS or len(node.inputs) != 2:
        return None
    left, right = input_names(node)
    sides = [(left, right)] if node.op == "Div" else [(left, right), (right, left)]
    for data, constant in sides:
        number = scalar_of(points, graph, constant)
        if (
            number is None
            or constant in graph.data
            or data not in graph.data
            or widens(points, data, node.outputs[0].name)
        ):
            continue
        if node.op == "Div":
            if number == 0:
                return None
            number = 1.0 / number
        return data, number
    return None


def chain_above(graph: GraphView, points: Sequence[ShapePoint], name: str) -> list[Link]:
    """The operand itself, then the tensors above it through views and multiplications by one number."""
    links = [Link(name, (), 1.0)]
    steps: list[tuple[gs.Node, str]] = []
    factor = 1.0
    while len(links) < LONGEST_CHAIN:
        node = graph.source(name)
        if node is None:
            break
        scaled = scalar_factor(graph, points, node)
        if scaled is not None:
            name, number = scaled
            factor *= number
        elif is_view(node) and node.inputs[0].name in graph.data:
            steps.insert(0, (node, name))
            name = node.inputs[0].name
        else:
            break
        links.append(Link(name, tuple(steps), factor))
    return links


def numbered(shape: Sequence[int]) -> Index:
    """An array of that shape whose elements are numbered; not to be written to."""
    return _numbers(int(np.prod(shape, dtype=np.int64))).reshape(shape)


@lru_cache(maxsize=8)
def _numbers(count: int) -> Index:
    """0 to `count` - 1; the blocks of a model ask for the same ones again and again."""
    numbers = np.arange(count, dtype=np.int64)
    numbers.flags.writeable = False
    return numbers


def run_steps(
    graph: GraphView, steps: Sequence[tuple[gs.Node, str]], array: NDArray[Any], point: ShapePoint
) -> NDArray[Any]:
    """Apply views in turn."""
    for node, name in steps:
        array = run_view(node, array, point, graph)[output_names(node).index(name)]
    return array


def describe_sizes(
    points: Sequence[ShapePoint], shapes: Sequence[Sequence[int]], dims: Sequence[Dim | None]
) -> tuple[int | Dim, ...]:
    """A Reshape target: sizes that never change as numbers, at most one open size as -1, further ones read at run time."""
    target: list[int | Dim] = []
    changing = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
    for axis in range(len(shapes[0])):
        target.append(shapes[0][axis] if axis not in changing else -1)
    known = [axis for axis in changing if dims[axis] is not None]
    while sum(1 for size in target if size == -1) > 1:
        if not known:
            raise RefusedError("its sizes change in more than one dimension that cannot be read from a tensor")
        axis = known.pop()
        dim = dims[axis]
        assert dim is not None
        target[axis] = dim
    return tuple(target)


def find_operand(
    graph: GraphView,
    points: Sequence[ShapePoint],
    name: str,
    in_order: Callable[[Index], Index],  # an array of the operand's shape at points[0] -> [B, H, N, D]
    all_wanted: Sequence[tuple[int, int, int, int]],  # [B, H, N, D] at every point
    links: Sequence[Link],
) -> tuple[Operand, float]:
    """Choose the tensor from which `[B, H, N, D]` is had with fewest nodes, beyond scalings where possible."""
    best: tuple[tuple[int, int], Operand, float] | None = None
    elements = int(np.prod(all_wanted[0], dtype=np.int64))
    for link in links:
        shape = points[0].shapes.get(link.tensor)
        if shape is None or int(np.prod(shape, dtype=np.int64)) != elements:
            break
        try:
            down = run_steps(graph, link.steps, numbered(shape), points[0])
        except (CannotFoldError, ValueError, IndexError):
            break
        recipe = _operand_recipe(points, link.tensor, shape, in_order(down), all_wanted)
        if recipe is None:
            continue
        nodes = (recipe.reshape is not None) + (recipe.perm is not None)
        rank = (int(link.factor != links[-1].factor), nodes)
        if best is None or rank <= best[0]:
            best = (rank, recipe, link.factor)
    if best is None:
        raise RefusedError(f"no layout [batch, heads, tokens, channels] could be made from {name!r}")
    return best[1], best[2]


def _operand_recipe(
    points: Sequence[ShapePoint],
    tensor: str,
    shape: Sequence[int],
    wanted: Index,  # [B, H, N, D], numbers of the elements of `tensor`
    all_wanted: Sequence[tuple[int, int, int, int]],
) -> Operand | None:
    if tuple(shape) == wanted.shape and (wanted == numbered(shape)).all():
        return Operand(tensor)
    for perm in PERMS:
        inverse = tuple(int(axis) for axis in np.argsort(perm))
        # before the Transpose the tensor has this shape
        before = tuple(wanted.shape[axis] for axis in inverse)
        if not _same(np.transpose(numbered(before), perm), wanted):
            continue
        used_perm = None if perm == (0, 1, 2, 3) else perm
        if tuple(shape) == before:
            return Operand(tensor, None, used_perm)
        shapes = [tuple(sizes[axis] for axis in inverse) for sizes in all_wanted]
        dims = _matching_dims(points, tensor, shapes)
        return Operand(tensor, describe_sizes(points, shapes, dims), used_perm)
    return None


def _same(left: Index, right: Index) -> bool:
    """Equality of two arrays of rank 4 and of one shape, after a look at their edges."""
    edges = ((left[:, 0, 0, 0], right[:, 0, 0, 0]), (left[0, :, 0, 0], right[0, :, 0, 0]), (left[0, 0], right[0, 0]))
    return all(bool((one == other).all()) for one, other in edges) and bool((left == right).all())


def _matching_dims(points: Sequence[ShapePoint], tensor: str, shapes: Sequence[Sequence[int]]) -> list[Dim | None]:
    """For each dimension wanted, a dimension of `tensor` that has its size at all points."""
    own = [point.shapes[tensor] for point in points]
    dims: list[Dim | None] = []
    for axis in range(len(shapes[0])):
        sizes = [shape[axis] for shape in shapes]
        match = None
        if all(size is not None for size in own):
            ranks = range(len(own[0] or ()))
            match = next((a for a in ranks if [size[a] for size in own if size is not None] == sizes), None)
        dims.append(None if match is None else Dim(tensor, match))
    return dims


def find_result(
    graph: GraphView,
    points: Sequence[ShapePoint],
    name: str,
    index: Index,  # for each element of tensor `name`, the number of the element of [B, H, N, D] that it is
    sizes: Sequence[tuple[int, int, int, int]],
    query: Operand,
) -> Result:
    """Choose the tensor, the product's output or a view below it, that FNA's output becomes with fewest nodes."""
    best: tuple[int, Result] | None = None
    current, array = name, index
    full = numbered(sizes[0])
    while True:
        recipe = _result_recipe(points, current, array, full, sizes, query)
        if recipe is not None:
            cost = (recipe.perm is not None) + (recipe.reshape is not None)
            if best is None or cost < best[0]:
                best = (cost, recipe)
        readers = graph.readers(current)
        if current in graph.outputs or len(readers) != 1:
            break
        node = graph.nodes[readers[0]]
        if (
            not is_view(node)
            or len(node.outputs) != 1
            or node.inputs[0].name != current
            or input_names(node).count(current) > 1
        ):
            break
        try:
            array = run_view(node, array, points[0], graph)[0]
        except (CannotFoldError, ValueError, IndexError):
            break
        current = node.outputs[0].name
        if array.size != full.size:
            break
    if best is None:
        raise RefusedError(f"the layout of the output {name!r} is not understood")
    return best[1]


def _result_recipe(
    points: Sequence[ShapePoint],
    tensor: str,
    array: Index,
    full: Index,
    sizes: Sequence[tuple[int, int, int, int]],
    query: Operand,
) -> Result | None:
    for perm in PERMS:
        moved = np.transpose(full, perm)
        if not _same(moved, array.reshape(moved.shape)):
            continue
        used_perm = None if perm == (0, 1, 2, 3) else perm
        if moved.shape == array.shape:
            return Result(tensor, used_perm, None)
        shapes = [point.shapes.get(tensor) for point in points]
        if any(shape is None for shape in shapes):
            return None
        known = [shape for shape in shapes if shape is not None]
        dims = _matching_dims(points, query.tensor, known)
        try:
            return Result(tensor, used_perm, describe_sizes(points, known, dims))
        except RefusedError:
            return None
    return None
