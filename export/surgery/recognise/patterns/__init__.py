"""The table of patterns: a module each, and the first that knows a node reads it."""

from __future__ import annotations

from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.patterns import (
    fna_nodes,
    multi_head_attention,
    projected_attention,
    softmax_chain,
    standard_attention,
    unknown_attention,
)

PATTERNS: tuple[AttentionPattern, ...] = (
    fna_nodes.PATTERN,
    standard_attention.PATTERN,
    multi_head_attention.PATTERN,
    projected_attention.PATTERN,
    unknown_attention.PATTERN,
    softmax_chain.PATTERN,
)
