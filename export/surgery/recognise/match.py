"""A core: softmax of one product, times another; from a softmax outward, until query, key, value, scale and output are known."""

from __future__ import annotations

from fna.export.surgery.graph.view import input_names
from fna.export.surgery.recognise.context import Axes, Context, Core, Side, describe
from fna.export.surgery.recognise.products import mixes_heads, reaches_product, understand_product
from fna.export.surgery.recognise.rows import RefusedError
from fna.export.surgery.recognise.scores import Above, walk_up
from fna.export.surgery.recognise.weights import Below, walk_down


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
    constants = [name for name in input_names(product_node)[:2] if name not in graph.data]
    if constants and len(product_node.inputs) > 1:
        upper = next((name for name in input_names(product_node)[:2] if name in graph.data), None)
        if upper is not None and mixes_heads(context, upper):
            raise RefusedError(f"head mixing before the softmax ({describe(product_node)}: talking heads)")
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
    if above is not None and all(
        name in context.graph.data for name in input_names(context.graph.nodes[above.product])[:2]
    ):
        return len(context.shape(above.scores)) > 2
    if above is not None and not mixes_heads(context, above.scores):
        return False
    from_product = reaches_product(context, scores) or mixes_heads(context, scores)
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
    weights, value = (
        (second.left, second.right) if node.inputs[0].name == below.weights else (second.right, second.left)
    )
    if weights.axes.channel != below.axis:
        raise RefusedError("its softmax runs over another axis than the one that is summed with the values")
    out_token, out_channel = (
        (second.out_left, second.out_right) if weights is second.left else (second.out_right, second.out_left)
    )
    # in the product with the values, the summed axis of V is its tokens
    value_side = Side(value.tensor, Axes(value.axes.batch, value.axes.channel, value.axes.token))
    if second.factor != 1.0:
        raise RefusedError(f"its output is scaled inside {describe(node)}, which is not supported")
    family = "+".join(dict.fromkeys([graph.nodes[above.product].op, "Softmax", node.op]))
    return Core(
        query,
        key,
        value_side,
        above.factor * first.factor * scale,
        node.outputs[0].name,
        Axes(second.out_batch, out_token, out_channel),
        family,
    )
