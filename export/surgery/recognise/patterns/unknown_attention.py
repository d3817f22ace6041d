"""Operators that are attention by their name, and that no other pattern reads: listed, and refused."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.rows import Attention, RefusedError, Row


def read(context: Context, node: gs.Node, row: Row) -> Attention:
    """Refuse it."""
    raise RefusedError(f"operator {node.domain or 'ai.onnx'}::{node.op} is not plain self-attention")


PATTERN = AttentionPattern("unknown", lambda node: "Attention" in node.op and node.domain != "fna", read)
