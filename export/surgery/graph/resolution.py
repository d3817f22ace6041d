"""Changing a file's input size, where its graph computes everything that depends on it."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, NodeProto, ValueInfoProto

from fna.errors import InputFileError, InvalidArgumentError
from fna.export.surgery.graph.index import STANDARD_DOMAINS, Graph, attribute
from fna.export.surgery.graph.shapes import Point, ShapeConflictError, find_points

LARGEST_SIDE = 16384


def set_resolution(model: ModelProto, folder: Path, size: tuple[int, int]) -> ModelProto:
    """Return a copy of `model` whose image input has another height and width.

    Args:
        model: with one image input `[B, 3, H, W]`.
        folder: where its external data lies.
        size: height and width in pixels.

    Raises:
        InvalidArgumentError: if the size is not a multiple of the patch size, or out of range.
        InputFileError: if the graph has sizes baked in, naming the node that cannot take the new one.
    """
    graph = Graph(model, folder)
    image = _image_input(graph)
    _check_size(graph, image, size)
    changed = ModelProto()
    changed.CopyFrom(model)
    for item in changed.graph.input:
        if item.name == image.name:
            for dim, pixels in zip(item.type.tensor_type.shape.dim[2:4], size, strict=True):
                dim.Clear()
                dim.dim_value = pixels
    # sizes noted for tensors on the way are those of the old input
    del changed.graph.value_info[:]
    outputs = [_without_sizes(item) for item in changed.graph.output]
    del changed.graph.output[:]
    changed.graph.output.extend(outputs)
    new_graph = Graph(changed, folder)
    try:
        points = find_points(new_graph)
    except ShapeConflictError as error:
        raise InputFileError(
            f"the file cannot take {size[0]}x{size[1]}: {error}; its position embedding or a shape is baked for one size, "
            "so export it again at the size wanted"
        ) from None
    _check_outputs(new_graph, points)
    _note_output_sizes(changed, points)
    return changed


def _image_input(graph: Graph) -> ValueInfoProto:
    images = [item for item in graph.inputs if len(item.type.tensor_type.shape.dim) == 4]
    if len(images) != 1:
        raise InputFileError(
            f"the file has {len(images)} inputs of four dimensions, so --resolution does not know which is the image"
        )
    return images[0]


def _check_size(graph: Graph, image: ValueInfoProto, size: tuple[int, int]) -> None:
    if any(pixels < 1 or pixels > LARGEST_SIDE for pixels in size):
        raise InvalidArgumentError(f"resolution {size[0]}x{size[1]} is outside 1 to {LARGEST_SIDE}")
    for node in _first_convolutions(graph, image.name):
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


def _first_convolutions(graph: Graph, name: str) -> list[NodeProto]:
    """The convolutions that read the image, after normalisation at most."""
    found: list[NodeProto] = []
    todo, seen = [name], {name}
    while todo:
        for index in graph.readers(todo.pop()):
            node = graph.nodes[index]
            if node.op_type == "Conv" and node.domain in STANDARD_DOMAINS:
                found.append(node)
            elif node.op_type in ("Add", "Sub", "Mul", "Div", "Cast", "Identity") and node.output[0] not in seen:
                seen.add(node.output[0])
                todo.append(node.output[0])
    return found


def _without_sizes(item: ValueInfoProto) -> ValueInfoProto:
    """An output with its rank but without the sizes that follow from the image's."""
    bare = ValueInfoProto()
    bare.CopyFrom(item)
    for dim in bare.type.tensor_type.shape.dim[1:]:
        dim.Clear()
    return bare


def _check_outputs(graph: Graph, points: list[Point]) -> None:
    """A Reshape with a size baked in can move tokens into the batch; then an output no longer has the input's batch."""
    for item in graph.proto.output:
        declared = item.type.tensor_type.shape.dim
        for point in points:
            shape = point.shapes.get(item.name)
            if shape is None or not len(declared):
                continue
            open_batch = not declared[0].HasField("dim_value")
            wanted = point.batch if open_batch else int(declared[0].dim_value)
            if len(shape) != len(declared) or (shape and shape[0] != wanted):
                raise InputFileError(
                    f"the file cannot take that resolution: output {item.name!r} would have shape {list(shape)}; "
                    "a shape in the graph is baked for one size"
                )


def _note_output_sizes(model: ModelProto, points: list[Point]) -> None:
    for item in model.graph.output:
        shapes = [point.shapes.get(item.name) for point in points]
        for axis, dim in enumerate(item.type.tensor_type.shape.dim):
            sizes = {shape[axis] for shape in shapes if shape is not None and len(shape) > axis}
            if axis > 0 and len(sizes) == 1 and None not in shapes:
                dim.dim_value = sizes.pop()
