"""onnxruntime's Attention, which carries the projection of query, key and value itself."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import MICROSOFT, attribute
from fna.export.surgery.recognise.context import Context, Side
from fna.export.surgery.recognise.fused import (
    PACKED,
    Prelude,
    identify_packed_input,
    input_at,
    refuse_extra_outputs,
    refuse_mask,
    replace_operands,
    scale_of,
)
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Attention, RefusedError, Row


def read(context: Context, node: gs.Node, row: Row) -> Attention:
    """Take the projection, weights `[C, 3 * H * D]`, out of the operator."""
    if attribute(node, "unidirectional", 0):
        raise RefusedError("a causal mask (unidirectional)")
    if attribute(node, "do_rotary", 0):
        raise RefusedError("it applies rotary embeddings inside the operator, which is not supported")
    if input_at(node, 4) or input_at(node, 6):
        raise RefusedError("it reads a key and value cache")
    refuse_extra_outputs(context, node)
    if input_at(node, 3) and context.rank(node.inputs[3].name) < 2:
        raise RefusedError("its attention mask depends on sequence lengths")
    refuse_mask(context, input_at(node, 3), keep=1.0)
    refuse_mask(context, input_at(node, 5))
    source, weights, bias = (input_at(node, slot) for slot in range(3))
    if weights in context.graph.data:
        raise RefusedError("its projection weights depend on data")
    width = context.shape(weights)[1]
    qkv_sizes = attribute(node, "qkv_hidden_sizes")
    if qkv_sizes and len(set(qkv_sizes)) != 1:
        raise RefusedError(f"values have another head size than keys (qkv_hidden_sizes {list(qkv_sizes)})")
    heads = int(attribute(node, "num_heads", 0))
    if heads < 1 or width % (3 * heads):
        raise RefusedError(f"its projection of {width} channels cannot be divided into 3 x {heads} heads")
    head_size = width // (3 * heads)
    sizes = [(shape[0], heads, shape[1], head_size) for shape in (context.shape(source, p) for p in context.points)]
    attention = identify_packed_input(context, node, Side(source, PACKED), sizes, scale_of(node, "scale", head_size))
    prelude = Prelude(row.prefix)
    (projected,) = prelude.add("MatMul", [source, weights], ["projected"])
    if bias:
        (projected,) = prelude.add("Add", [projected, bias], ["projected_biased"])
    lengths = prelude.constant("split_sizes", np.asarray([heads * head_size] * 3, np.int64))
    tensors = prelude.add("Split", [projected, lengths], ["query", "key", "value"], axis=2)
    return replace_operands(attention, tensors, prelude, heads, head_size)


PATTERN = AttentionPattern(
    "com.microsoft.Attention", lambda node: node.op == "Attention" and node.domain == MICROSOFT, read
)
