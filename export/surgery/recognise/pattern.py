"""What a pattern of attention is; `patterns` has the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.rows import Attention, Row


@dataclass(frozen=True)
class AttentionPattern:
    """One way in which files spell attention.

    Attributes:
        name: of the operator, or of the family.
        starts_at: whether a node is the one that the pattern is told by: a softmax, a fused operator.
        read: what stands there: attention that FNA can stand for, or None where there is nothing to replace. It may fill in
            the row, and raises `RefusedError` with the reason why a block must stay as it is.
    """

    name: str
    starts_at: Callable[[gs.Node], bool]
    read: Callable[[Context, gs.Node, Row], Attention | None]
