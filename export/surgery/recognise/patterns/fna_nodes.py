"""Our own nodes, from an earlier export or graft: listed, and kept."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION, core_of
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import is_attention
from fna.export.surgery.graph.view import attribute
from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Decision, Row

_KINDS = {
    FAST_NYSTROM_ATTENTION.name: ("FNA", "it is FNA"),
    FOCAL_ATTENTION.name: ("focal", "it is focal attention"),
}
"""Family and reason by operator; what is left attends to keys that are masked."""


def read(context: Context, node: gs.Node, row: Row) -> None:
    """Fill in what the table shows of them."""
    row.family, reason = _KINDS.get(node.op, ("masked", "its keys are masked"))
    core = core_of(node.attrs)
    steps = "" if core is None else f", with {core.steps} Chebyshev steps from {core.low:g}"
    row.decision, row.reason = Decision.KEPT, f"{reason} already{steps}"
    row.scale = float(attribute(node, "scale", 0.0))
    shape = context.points[0].shapes.get(node.inputs[0].name)
    if shape is not None and len(shape) == 4:
        row.heads, row.head_size, row.tokens = shape[1], shape[3], (shape[2],)


PATTERN = AttentionPattern("fna", lambda node: is_attention(node.domain, node.op), read)
