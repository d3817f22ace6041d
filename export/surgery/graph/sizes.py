"""Choosing input sizes at which a graph holds together, where the file leaves them open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from fna.errors import InputFileError
from fna.export.surgery.graph.files import export_model
from fna.export.surgery.graph.fold import numpy_type
from fna.export.surgery.graph.shapes import Shape, ShapeConflictError, ShapePoint, infer_point, visit
from fna.export.surgery.graph.view import GraphView, element_type, input_names, output_names
from fna.runtime import open_session, run_session

IMAGE_SIZES = (224, 256, 384, 512, 518, 336, 448, 192, 160, 128, 112, 96, 64, 56, 48, 32, 640, 1024)
"""Tried for open heights and widths, the multiples of 14, 16 and 32 first."""

TOKEN_COUNTS = (197, 257, 577, 1025, 196, 256, 576, 1024, 50, 49, 65, 64, 17, 16, 145, 144, 128, 100)
TEXT_LENGTHS = (16, 77, 64, 128, 12, 8, 32, 20)
"""Tried for inputs that are tokens already, and for texts."""


def find_points(graph: GraphView, overrides: dict[str, Shape] | None = None) -> list[ShapePoint]:
    """Choose up to three input sizes at which the graph holds together.

    Raises:
        ShapeConflictError: if it holds together at none; the message is that of the last size tried.
    """
    fixed = overrides or {}
    dims = {tensor.name: _declared(tensor) for tensor in graph.inputs}
    open_spatial = any(_is_open(name, dims, fixed, spatial=True) for name in dims)
    open_batch = any(_is_open(name, dims, fixed, spatial=False) for name in dims)
    points: list[ShapePoint] = []
    failure = "no input sizes fit"
    batches = (2, 3) if open_batch else (1,)
    first: int | None = None
    first_attempt = 0
    candidates = IMAGE_SIZES if open_spatial else IMAGE_SIZES[:1]
    for attempt, size in enumerate(candidates):
        for batch in batches[:1] + ((1,) if open_batch else ()):
            try:
                points.append(_point_at(graph, dims, fixed, batch, (size, size), attempt))
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
            points.append(_point_at(graph, dims, fixed, batch, pair, first_attempt))
        except ShapeConflictError:
            continue
    return points


MOST_MEASUREMENTS = 4
LARGEST_MEASURED_INPUT = 1 << 26
"""Elements; larger inputs are not run just to see shapes."""


def _measure_unknown(graph: GraphView, point: ShapePoint) -> None:
    """Learn the shapes that no rule gives (operators of other domains, loops) by running the file in onnxruntime."""
    if sum(int(np.prod(shape, dtype=np.float64)) for shape in point.feeds.values()) > LARGEST_MEASURED_INPUT:
        return
    feeds = {
        tensor.name: np.ones(point.feeds[tensor.name], numpy_type(element_type(tensor))) for tensor in graph.inputs
    }
    for _ in range(MOST_MEASUREMENTS):
        frontier = [
            name
            for index in sorted(graph.live)
            for name in output_names(graph.nodes[index])
            if name and point.shapes.get(name) is None and _inputs_known(graph.nodes[index], point)
        ]
        if not frontier:
            return
        model = export_model(graph.graph)
        known = {output.name for output in model.graph.output}
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
            if any(name and point.shapes.get(name) is None for name in output_names(node)):
                visit(graph, node, point)


def _inputs_known(node: gs.Node, point: ShapePoint) -> bool:
    return all(point.shapes.get(name) is not None for name in input_names(node) if name)


def _other_sizes(first: int) -> Sequence[tuple[int, int]]:
    return ((first, 2 * first), (2 * first, first), (first, 256), (first, 384), (256, 384), (2 * first, 2 * first))


def _declared(tensor: gs.Variable) -> list[int | str | None]:
    return [size if not isinstance(size, int) or size > 0 else None for size in tensor.shape or ()]


def _is_open(name: str, dims: dict[str, list[int | str | None]], fixed: dict[str, Shape], *, spatial: bool) -> bool:
    if name in fixed:
        return False
    sizes = dims[name][1:] if spatial else dims[name][:1]
    return any(not isinstance(size, int) for size in sizes)


def _point_at(
    graph: GraphView,
    dims: dict[str, list[int | str | None]],
    fixed: dict[str, Shape],
    batch: int,
    size: tuple[int, int],
    attempt: int = 0,
) -> ShapePoint:
    named: dict[str, int] = {}
    for sizes in dims.values():
        if sizes and isinstance(sizes[0], str):
            named[sizes[0]] = batch
    feeds = {name: fixed.get(name) or _concrete(sizes, batch, size, named, attempt) for name, sizes in dims.items()}
    if any(0 in shape for shape in feeds.values()):
        raise ShapeConflictError("an input has a dimension of size 0")
    batches = [feeds[tensor.name][0] for tensor in graph.inputs if len(feeds[tensor.name]) > 1]
    point = infer_point(graph, feeds, max(set(batches), key=batches.count) if batches else batch)
    if any(point.shapes.get(name) is None for index in graph.live for name in output_names(graph.nodes[index]) if name):
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
        if declared and isinstance(declared, str):
            guess = named.setdefault(declared, guess)
        result.append(guess)
    return tuple(result)
