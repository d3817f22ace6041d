"""What matching yields: one row per attention block, with all that replacing it needs, or the reason why it stays."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from onnx import NodeProto, TensorProto


class Decision(str, Enum):  # noqa: UP042  (StrEnum needs Python 3.11)
    """What became of a block."""

    ELIGIBLE = "eligible"
    REPLACED = "replaced"
    KEPT = "kept"
    REFUSED = "refused"


class RefusedError(Exception):
    """The block is not plain, full self-attention; the message is the reason that the table shows."""


@dataclass(frozen=True)
class Dim:
    """A size taken from a tensor when the model runs."""

    tensor: str
    axis: int


@dataclass(frozen=True)
class Operand:
    """How `[B, H, N, D]` is had from a tensor of the graph: a Reshape, then a Transpose, either left out where not needed."""

    tensor: str
    reshape: tuple[int | Dim, ...] | None = None
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Result:
    """How a tensor of the graph is had from `[B, H, N, D]`: a Transpose, then a Reshape, either left out where not needed."""

    tensor: str
    perm: tuple[int, ...] | None = None
    reshape: tuple[int | Dim, ...] | None = None


@dataclass
class Attention:
    """Plain, full self-attention, found and understood."""

    query: Operand
    key: Operand
    value: Operand
    result: Result
    scale: float
    heads: int
    head_size: int
    tokens: tuple[int, ...]
    element_type: int
    source: str | None
    prelude: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    label_axis: int = -1

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Query, key and value."""
        return self.query, self.key, self.value


@dataclass
class Row:
    """One attention block of the table."""

    block: int
    node: str
    family: str
    anchor: int
    decision: Decision
    reason: str = ""
    heads: int | None = None
    head_size: int | None = None
    tokens: tuple[int, ...] = ()
    scale: float | None = None
    attention: Attention | None = None

    @property
    def prefix(self) -> str:
        """What the names of new tensors start with."""
        return f"{self.node}/fna_{self.block}"

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON has it."""
        tokens: int | list[int] | None = None
        if self.tokens:
            tokens = self.tokens[0] if len(set(self.tokens)) == 1 else list(self.tokens)
        return {
            "block": self.block,
            "node": self.node,
            "family": self.family,
            "heads": self.heads,
            "head_size": self.head_size,
            "tokens": tokens,
            "scale": self.scale,
            "decision": self.decision.value,
            "reason": self.reason,
        }
