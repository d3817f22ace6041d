"""Changing a file's input size, where its graph computes everything that depends on it."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fna.errors import InputFileError, InvalidArgumentError
from fna.export.surgery.graph.shapes import ShapeConflictError, ShapePoint
from fna.export.surgery.graph.sizes import find_points
from fna.export.surgery.graph.view import STANDARD_DOMAINS, GraphView, attribute

LARGEST_SIDE = 16384


def set_resolution(graph: gs.Graph, size: tuple[int, int]) -> None:
    """Give the image input of a graph another height and width, in place.

    Args:
        graph: with one image input `[B, 3, H, W]`.
        size: height and width in pixels.

    Raises:
        InvalidArgumentError: if the size is not a multiple of the patch size, or out of range.
        InputFileError: if the graph has sizes baked in, naming the node that cannot take the new one.
    """
    image = _image_input(graph)
    view = GraphView(graph)
    _check_size(view, image, size)
    declared = [list(tensor.shape or ()) for tensor in graph.outputs]
    # sizes noted for tensors on the way are those of the old input
    for tensor in view.tensors.values():
        if isinstance(tensor, gs.Variable) and all(tensor is not kept for kept in (*graph.inputs, *graph.outputs)):
            tensor.dtype = tensor.shape = None
    image.shape = [*image.shape[:2], *size]
    for tensor in graph.outputs:
        if tensor.shape:
            tensor.shape = [tensor.shape[0], *[None] * (len(tensor.shape) - 1)]
    try:
        points = find_points(GraphView(graph))
    except ShapeConflictError as error:
        raise InputFileError(
            f"the file cannot take {size[0]}x{size[1]}: {error}; its position embedding or a shape is baked for one size, "
            "so export it again at the size wanted"
        ) from None
    for tensor, shape in zip(graph.outputs, declared, strict=True):
        _check_output(tensor, shape, points)
        _note_sizes(tensor, points)


def _image_input(graph: gs.Graph) -> gs.Variable:
    images = [tensor for tensor in graph.inputs if len(tensor.shape or ()) == 4]
    if len(images) != 1:
        raise InputFileError(
            f"the file has {len(images)} inputs of four dimensions, so --resolution does not know which is the image"
        )
    return images[0]


def _check_size(view: GraphView, image: gs.Variable, size: tuple[int, int]) -> None:
    if any(pixels < 1 or pixels > LARGEST_SIDE for pixels in size):
        raise InvalidArgumentError(f"resolution {size[0]}x{size[1]} is outside 1 to {LARGEST_SIDE}")
    for node in _first_convolutions(view, image.name):
        strides = attribute(node, "strides")
        if (
            strides
            and list(strides) == list(attribute(node, "kernel_shape", []))
            and any(pixels % int(stride) for pixels, stride in zip(size, strides, strict=False))
        ):
            raise InvalidArgumentError(
                f"resolution {size[0]}x{size[1]} is not a multiple of the patch size {int(strides[0])}; "
                f"take {size[0] // int(strides[0]) * int(strides[0])}"
            )


def _first_convolutions(view: GraphView, name: str) -> list[gs.Node]:
    """The convolutions that read the image, after normalisation at most."""
    convolutions: list[gs.Node] = []
    todo, seen = [name], {name}
    while todo:
        for index in view.readers(todo.pop()):
            node = view.nodes[index]
            result = node.outputs[0].name
            if node.op == "Conv" and node.domain in STANDARD_DOMAINS:
                convolutions.append(node)
            elif node.op in ("Add", "Sub", "Mul", "Div", "Cast", "Identity") and result not in seen:
                seen.add(result)
                todo.append(result)
    return convolutions


def _check_output(tensor: gs.Tensor, declared: list[int | str | None], points: list[ShapePoint]) -> None:
    """A Reshape with a size baked in can move tokens into the batch; then an output no longer has the input's batch."""
    for point in points:
        shape = point.shapes.get(tensor.name)
        if shape is None or not declared:
            continue
        wanted = declared[0] if isinstance(declared[0], int) else point.batch
        if len(shape) != len(declared) or (shape and shape[0] != wanted):
            raise InputFileError(
                f"the file cannot take that resolution: output {tensor.name!r} would have shape {list(shape)}; "
                "a shape in the graph is baked for one size"
            )


def _note_sizes(tensor: gs.Tensor, points: list[ShapePoint]) -> None:
    shapes = [point.shapes.get(tensor.name) for point in points]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not tensor.shape:
        return
    for axis in range(1, len(tensor.shape)):
        sizes = {shape[axis] for shape in known if len(shape) > axis}
        if len(sizes) == 1:
            tensor.shape[axis] = sizes.pop()
