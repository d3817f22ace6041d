"""The standard Attention operator (opset 23 and up)."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fna.export.surgery.graph.view import STANDARD_DOMAINS, attribute, input_names
from fna.export.surgery.recognise.context import Context, Core, Side
from fna.export.surgery.recognise.fused import (
    SPREAD,
    input_at,
    packed_core,
    refuse_extra_outputs,
    refuse_mask,
    scale_of,
)
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Attention, RefusedError, Row


def read(context: Context, node: gs.Node, row: Row) -> Attention:
    """Refuse all but full attention; find the layout of the rest."""
    if attribute(node, "is_causal", 0):
        raise RefusedError("a causal mask (is_causal)")
    if attribute(node, "softcap", 0.0):
        raise RefusedError("its scores are capped by Tanh (softcap)")
    if any(input_at(node, slot) for slot in (4, 5, 6)):
        raise RefusedError("it reads a key and value cache, or key lengths")
    refuse_extra_outputs(context, node)
    refuse_mask(context, input_at(node, 3))
    query, key, value = input_names(node)[:3]
    ranks = {context.rank(name) for name in (query, key, value)}
    if ranks == {4}:
        shapes = [context.shape(name) for name in (query, key, value)]
        if shapes[0][1] != shapes[1][1] or shapes[0][1] != shapes[2][1]:
            raise RefusedError("grouped or multi-query heads")
        scale = scale_of(node, "scale", shapes[0][3])
        core = Core(
            Side(query, SPREAD),
            Side(key, SPREAD),
            Side(value, SPREAD),
            scale,
            node.outputs[0].name,
            SPREAD,
            "Attention",
        )
        return identify(context, core)
    if ranks != {3}:
        raise RefusedError(f"its inputs have ranks {sorted(ranks)}")
    heads, key_heads = int(attribute(node, "q_num_heads", 0)), int(attribute(node, "kv_num_heads", 0))
    if heads != key_heads or heads < 1:
        raise RefusedError("grouped or multi-query heads")
    return identify(context, packed_core(context, query, key, value, heads, node, "scale"))


PATTERN = AttentionPattern("Attention", lambda node: node.op == "Attention" and node.domain in STANDARD_DOMAINS, read)
