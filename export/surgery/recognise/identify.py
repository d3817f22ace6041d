"""From a core (softmax of one product, times another) to self-attention that FNA can stand for, or a reason why not.

Three questions: do query, key and value hold the same tokens, which of their axes are batch and heads, and is every token of
an image there once? They are answered by token labels (`tokens`), at every size tried.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fna.export.surgery.graph.fold import CannotFoldError
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import STANDARD_DOMAINS, input_names, output_names, words
from fna.export.surgery.recognise.context import Axes, Context, Core, Side
from fna.export.surgery.recognise.layout import (
    REARRANGES,
    chain_above,
    find_operand,
    find_result,
    is_view,
    numbered,
    run_steps,
)
from fna.export.surgery.recognise.rows import Attention, RefusedError
from fna.export.surgery.recognise.token_labels import LARGEST_LABELLED, MIXED, CannotLabelError, Labels, label_tokens

LARGEST_SEARCH = 4000
QUANTIZERS = words("QuantizeLinear DequantizeLinear QLinearMatMul QLinearConv")
FLOATS = (1, 10, 16)


def identify(context: Context, core: Core) -> Attention:
    """Turn a core into self-attention with layouts.

    Raises:
        RefusedError: with the reason, in the words of the table.
    """
    _check_sizes(context, core)
    tensors = (core.query.tensor, core.key.tensor, core.value.tensor)
    source, axis, tables = _same_tokens(context, core)
    split = _split_batch(tables[0], len(core.query.axes.batch))
    sizes = [_sizes_at(context, core, point, split) for point in context.points]
    _check_groups(context, source, sizes)
    _check_repeats(context, core, source)
    factor = core.scale
    operands = []
    for name, side, table in zip(("query", "key", "value"), (core.query, core.key, core.value), tables, strict=True):
        own_split = _split_batch(table, len(side.axes.batch))
        in_order = partial(_in_order, axes=side.axes, split=own_split, packed_heads=core.packed_heads)
        links = chain_above(context.graph, context.points, side.tensor)
        if name == "value":
            links = [link for link in links if link.factor == 1.0]
        if name == "key" or name == "query":
            _check_per_head_factor(context, side, links[-1].tensor)
        operand, number = find_operand(context.graph, context.points, side.tensor, in_order, sizes, links)
        operands.append(operand)
        factor *= number
    _check_output(context, core)
    order = _in_order(numbered(context.shape(core.output)), core.output_axes, own_split, core.packed_heads)
    index = np.empty(order.size, np.int64)
    index[order.reshape(-1)] = numbered((order.size,))
    result = find_result(
        context.graph, context.points, core.output, index.reshape(context.shape(core.output)), sizes, operands[0]
    )
    if not np.isfinite(factor) or factor == 0.0:
        raise RefusedError(f"its scale is {factor}")
    return Attention(
        operands[0],
        operands[1],
        operands[2],
        result,
        factor,
        heads=sizes[0][1],
        head_size=sizes[0][3],
        tokens=tuple(size[2] for size in sizes),
        element_type=context.points[0].types[tensors[0]],
        source=source,
        label_axis=axis,
    )


# ---------------------------------------------------------------- sizes


def _check_sizes(context: Context, core: Core) -> None:
    if any(np.prod(context.shape(side.tensor), dtype=np.float64) > LARGEST_LABELLED for side in (core.query, core.key)):
        raise RefusedError(
            f"its queries of shape {list(context.shape(core.query.tensor))} are too large to be followed"
        )
    types = {context.points[0].types.get(side.tensor, 0) for side in (core.query, core.key, core.value)}
    types.add(context.points[0].types.get(core.output, 0))
    if len(types) != 1 or not types <= set(FLOATS):
        raise RefusedError(
            f"query, key, value and output are not of one floating-point type (ONNX types {sorted(types)})"
        )
    for point in context.points:
        query, key, value = (context.shape(side.tensor, point) for side in (core.query, core.key, core.value))
        queries, keys = query[core.query.axes.token], key[core.key.axes.token]
        if queries != keys:
            raise RefusedError(f"{queries} queries but {keys} keys (cross-attention, pooling head or reduced keys)")
        if value[core.value.axes.token] != keys:
            raise RefusedError(f"{keys} keys but {value[core.value.axes.token]} values")
        head_sizes = query[core.query.axes.channel], value[core.value.axes.channel]
        if head_sizes[0] != head_sizes[1]:
            raise RefusedError(f"values have head size {head_sizes[1]}, queries and keys {head_sizes[0]}")


def _check_output(context: Context, core: Core) -> None:
    """The output's batch axes are those of the value, in the same order."""
    shape, out_shape = context.shape(core.value.tensor), context.shape(core.output)
    if [shape[axis] for axis in core.value.axes.batch] != [out_shape[axis] for axis in core.output_axes.batch]:
        raise RefusedError("the output's batch and heads are not those of the values")


def _check_groups(context: Context, source: str, sizes: Sequence[tuple[int, int, int, int]]) -> None:
    for point, size in zip(context.points, sizes, strict=True):
        allowed = _batches(context, point, source)
        if size[0] not in allowed:
            raise RefusedError(
                f"{size[0]} groups of {size[2]} tokens attend separately for a batch of {sorted(allowed)[0]} "
                "(windowed, axial or otherwise divided attention)"
            )


def _batches(context: Context, point: ShapePoint, source: str) -> set[int]:
    """Batch sizes that the inputs behind `source` can be said to have: their first dimension; 1 for inputs without a batch."""
    batches = set()
    for name in _inputs_behind(context, source):
        shape = point.feeds[name]
        if len(shape) > 1:
            batches.add(shape[0])
        if len(shape) <= 3 and not _is_open(context, name):
            batches.add(1)
    return batches or {1}


def _inputs_behind(context: Context, name: str) -> list[str]:
    """Inputs whose values a tensor is computed from."""
    graph = context.graph
    inputs = {tensor.name for tensor in graph.inputs}
    todo, seen = [name], {name}
    while todo:
        node = graph.source(todo.pop())
        if node is None or node.op in ("Shape", "Size"):
            continue
        for source in input_names(node):
            if source in graph.data and source not in seen:
                seen.add(source)
                todo.append(source)
    return sorted(seen & inputs)


def _is_open(context: Context, name: str) -> bool:
    return len({point.feeds[name] for point in context.points}) > 1


# ---------------------------------------------------------------- tokens


def _common_sources(context: Context, tensors: Sequence[str]) -> list[str]:
    """Tensors that all of `tensors` are computed from, the nearest first."""
    graph = context.graph
    full = (1 << len(tensors)) - 1
    marks: dict[str, int] = {}
    heap: list[tuple[int, str]] = []

    def push(name: str, mark: int) -> None:
        if name not in graph.data:
            return
        if name not in marks:
            heapq.heappush(heap, (-graph.producer.get(name, -1), name))
        marks[name] = marks.get(name, 0) | mark

    for position, name in enumerate(tensors):
        push(name, 1 << position)
    sources: list[str] = []
    steps = 0
    while heap and steps < LARGEST_SEARCH and len(sources) < 4:
        steps += 1
        _, name = heapq.heappop(heap)
        node = graph.source(name)
        if marks[name] == full and (
            node is None or len([output for output in output_names(node) if output in marks]) <= 1
        ):
            sources.append(name)
        if node is None or node.op in ("Shape", "Size"):
            continue
        together = marks[name]
        for source in input_names(node):
            push(source, together)
    return sources


def _same_tokens(context: Context, core: Core) -> tuple[str, int, list[NDArray[np.int32]]]:
    """The tensor whose tokens query, key and value share, its channel axis, and the token table of each of the three.

    The nearest common tensor may already be divided into heads, so tensors further up are tried as well, until the images
    are as many as the input's.
    """
    sides = (core.query, core.key, core.value)
    tensors = [side.tensor for side in sides]
    sources = [_above_views(context, name) for name in _common_sources(context, tensors)]
    if not sources:
        _refuse_no_source(context, tensors)
    point = context.points[0]
    reason = "queries, keys and values are not computed token by token from the same tokens (cross-attention)"
    divided: tuple[str, int, list[NDArray[np.int32]]] | None = None
    for source in dict.fromkeys(sources):
        shape = point.shapes.get(source)
        if shape is None or len(shape) < 2:
            continue
        for axis in dict.fromkeys((-1, 1 % len(shape))):
            try:
                labels = label_tokens(context.graph, point, source, tensors, axis)
            except CannotLabelError as error:
                reason = str(error)
                continue
            tables = [_table(labels[side.tensor], side.axes) for side in sides]
            if any((table < 0).any() for table in tables):
                if any(_is_channel_attention(context, side, labels) for side in sides[:2]):
                    reason = "attention between channels, not tokens (XCiT)"
                continue
            problem = _compare_tables(tables)
            if problem is not None:
                reason = problem
                continue
            groups = tables[0].size // tables[0].shape[-1] // _repeats(tables[0])
            if groups in _batches(context, point, source):
                return source, axis, tables
            divided = divided or (source, axis, tables)
    if divided is not None:
        return divided
    raise RefusedError(reason)


def _repeats(table: NDArray[np.int32]) -> int:
    """How many rows of a token table are the same, that is, how many heads there are."""
    rows = table.reshape(-1, table.shape[-1])
    return len(rows) // len(_sorted_groups(rows))


def _above_views(context: Context, name: str) -> str:
    """The tensor that a view, or a view of views, is taken of."""
    node = context.graph.source(name)
    while node is not None and is_view(node) and node.inputs[0].name in context.graph.data:
        name = node.inputs[0].name
        node = context.graph.source(name)
    return name


def _refuse_no_source(context: Context, tensors: Sequence[str]) -> None:
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        if tensor not in context.graph.data:
            raise RefusedError(f"a learned {name}: it does not depend on the image (pooling head)")
    raise RefusedError("queries, keys and values come from different inputs (cross-attention)")


def _table(labels: Labels, axes: Axes) -> NDArray[np.int32]:
    """Token of each row, `[batch axes..., tokens]`; `MIXED` where a row's channels are of several tokens."""
    ordered = np.transpose(labels, (*axes.batch, axes.token, axes.channel))
    first = ordered[..., 0]
    if ordered.strides[-1] == 0 or ordered.shape[-1] == 1:
        return np.ascontiguousarray(first)
    return np.where((ordered == first[..., None]).all(axis=-1), first, np.int32(MIXED))


def _is_channel_attention(context: Context, side: Side, labels: dict[str, Labels]) -> bool:
    """Whether the summed axis of the scores' product runs over tokens (before a division by a norm over the tokens)."""
    top = chain_above(context.graph, context.points, side.tensor)[-1]
    node = context.graph.source(top.tensor)
    name = node.inputs[0].name if node is not None and node.op in ("Div", "Mul", "LpNormalization") else top.tensor
    if name not in labels or context.points[0].shapes.get(name) != context.points[0].shapes.get(top.tensor):
        return False
    try:
        moved = run_steps(context.graph, top.steps, labels[name], context.points[0])
    except (CannotFoldError, ValueError, IndexError):
        return False
    ordered = np.transpose(moved, (*side.axes.batch, side.axes.channel, side.axes.token))
    return bool((ordered >= 0).all() and (ordered == ordered[..., :1]).all())


def _compare_tables(tables: Sequence[NDArray[np.int32]]) -> str | None:
    try:
        rows = [table.reshape(-1, table.shape[-1]) for table in tables]
        groups = [_sorted_groups(row) for row in rows]
    except ValueError as error:
        return str(error)
    if any(group.shape != groups[0].shape or (group != groups[0]).any() for group in groups[1:]):
        return "queries, keys and values do not hold the same tokens in the same order (cross-attention or shifted windows)"
    if len(np.unique(groups[0])) != groups[0].size:
        return "a token occurs more than once among its queries (overlapping windows or repeated tokens)"
    return None


def _sorted_groups(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """The distinct rows, in order of first appearance."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.tobytes(), index)
    return rows[list(first.values())]


# ---------------------------------------------------------------- batch and heads


def _split_batch(table: NDArray[np.int32], count: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Which batch axes are images and which are heads: tokens change along images, not along heads.

    Returns axes of images, axes of heads, and for an axis that holds both `images` or `heads`: which of the two is outer.
    """
    images: list[int] = []
    heads: list[int] = []
    for axis in range(count):
        first = np.take(table, [0], axis=axis)
        if table.shape[axis] == 1:
            (images if axis == 0 else heads).append(axis)
        elif (table == first).all():
            heads.append(axis)
        else:
            images.append(axis)
    if not heads and len(images) == 1:
        rows = table.reshape(table.shape[images[0]], -1)
        groups = len(_sorted_groups(rows))
        each = len(rows) // groups
        if groups * each == len(rows) and each > 1:
            blocks = rows.reshape(groups, each, -1)
            if (blocks == blocks[:, :1]).all():
                return tuple(images), (), f"images {groups}"
            blocks = rows.reshape(each, groups, -1)
            if (blocks == blocks[:1]).all():
                return tuple(images), (), f"heads {groups}"
            raise RefusedError("its batch axis mixes images and heads in an order that is not understood")
    return tuple(images), tuple(heads), ""


def _sizes_at(
    context: Context, core: Core, point: ShapePoint, split: tuple[tuple[int, ...], tuple[int, ...], str]
) -> tuple[int, int, int, int]:
    """`[B, H, N, D]` at one point."""
    images, heads, merged = split
    shape = context.shape(core.query.tensor, point)
    first = context.shape(core.query.tensor)
    axes = core.query.axes
    outer = int(np.prod([shape[axes.batch[axis]] for axis in images], dtype=np.int64))
    inner = int(np.prod([shape[axes.batch[axis]] for axis in heads], dtype=np.int64))
    if core.packed_heads:
        return outer * inner, core.packed_heads, shape[axes.token], shape[axes.channel] // core.packed_heads
    if merged:
        groups = int(merged.split()[1])
        inner = first[axes.batch[images[0]]] // groups
        if outer % inner:
            raise RefusedError("its number of heads changes with the input's size")
        outer //= inner
    return outer, inner, shape[axes.token], shape[axes.channel]


def _in_order(
    array: NDArray[np.int64],
    axes: Axes,
    split: tuple[tuple[int, ...], tuple[int, ...], str],
    packed_heads: int | None,
) -> NDArray[np.int64]:  # [B, H, N, D]
    """An array of a tensor's shape, in the order `[B, H, N, D]`."""
    images, heads, merged = split
    shape = array.shape
    order = [axes.batch[axis] for axis in (*images, *heads)] + [axes.token, axes.channel]
    moved = np.transpose(array, order)
    tokens, channels = shape[axes.token], shape[axes.channel]
    outer = int(np.prod([shape[axes.batch[axis]] for axis in images], dtype=np.int64))
    if packed_heads:
        return np.swapaxes(moved.reshape(-1, tokens, packed_heads, channels // packed_heads), 1, 2)
    if merged:
        kind, groups_text = merged.split()
        groups = int(groups_text)
        if kind == "images":
            return moved.reshape(groups, outer // groups, tokens, channels)
        return np.swapaxes(moved.reshape(outer // groups, groups, tokens, channels), 0, 1)
    return moved.reshape(outer, -1, tokens, channels)


# ---------------------------------------------------------------- repeated heads, quantization


def _check_repeats(context: Context, core: Core, source: str) -> None:
    """Refuse grouped heads (one key for several queries) and quantized operands."""
    graph = context.graph
    for side in (core.query, core.key, core.value):
        _check_distinct(context, side)
        todo, seen = [side.tensor], set()
        while todo:
            name = todo.pop()
            node = graph.source(name)
            if name == source or node is None or name in seen or name not in graph.data:
                continue
            seen.add(name)
            if node.op in QUANTIZERS:
                raise RefusedError("it lies inside quantize/dequantize pairs")
            if node.op in ("Expand", "Tile") and node.domain in STANDARD_DOMAINS:
                inside, outside = context.shape(node.inputs[0].name), context.shape(node.outputs[0].name)
                wider = [axis for axis in range(-len(inside), 0) if inside[axis] != outside[axis]]
                # one number per token spread over its channels is a norm, not a repeated head
                if wider not in ([], [-1]):
                    raise RefusedError("grouped or multi-query heads: keys or values are repeated over the heads")
            if node.op == "Concat" and len(set(input_names(node))) < len(node.inputs):
                raise RefusedError("grouped or multi-query heads: keys or values are repeated over the heads")
            todo.extend(input_names(node))
    for index in graph.readers(core.output):
        if graph.nodes[index].op == "QuantizeLinear":
            raise RefusedError("it lies inside quantize/dequantize pairs")


def _check_distinct(context: Context, side: Side) -> None:
    """Every element of an operand must be an element of its own of the tensor that it is a view of."""
    links = chain_above(context.graph, context.points, side.tensor)
    top = links[-1]
    shape = context.points[0].shapes.get(top.tensor)
    if shape is None or all(node.op in REARRANGES for node, _ in top.steps):
        return
    try:
        index = run_steps(context.graph, top.steps, numbered(shape), context.points[0])
    except (CannotFoldError, ValueError, IndexError):
        return
    if int(np.bincount(index.reshape(-1)).max(initial=0)) > 1:
        raise RefusedError("grouped or multi-query heads: keys or values are repeated over the heads")


def _check_per_head_factor(context: Context, side: Side, top: str) -> None:
    """Refuse a constant that differs from head to head and only so: a temperature per head."""
    node = context.graph.source(top)
    if node is None or node.op not in ("Mul", "Div"):
        return
    for name in input_names(node):
        if name in context.graph.data:
            continue
        shape = context.points[0].shapes.get(name) or ()
        whole = context.points[0].shapes.get(top) or ()
        own = (1,) * (len(whole) - len(shape)) + tuple(shape)
        wide = [axis for axis, size in enumerate(own) if size > 1]
        if len(wide) == 1 and len(whole) == 4 and wide[0] == 1 and whole == context.shape(side.tensor)[: len(whole)]:
            raise RefusedError(f"its temperature is not one scalar (shape {list(shape)}: per head or learned)")


def check_packed_input(context: Context, tensor: str, sizes: Sequence[tuple[int, int, int, int]]) -> None:
    """Checks for operators that make query, key and value from one tensor themselves.

    Raises:
        RefusedError: if images are divided into windows, or the tensor does not depend on the image.
    """
    if tensor not in context.graph.data:
        raise RefusedError("its input does not depend on the image")
    if context.points[0].types.get(tensor) not in FLOATS:
        raise RefusedError("its input is not of a floating-point type")
    _check_groups(context, tensor, sizes)
