"""Which tokens are massive and which are artifacts, block by block, in one instrumented run of a PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fna.observing import AttentionCall, observed
from fna.special_tokens import MINIMAL_GAP, class_attention, find_massive_tokens


@dataclass(frozen=True)
class BlockTokens:
    """What one block does to the tokens of a batch.

    Attributes:
        block: its number.
        name: the attention module's path.
        norms: of the block's output, `[B, N]`.
        massive: tokens of exceptional norm in the block's output, bool `[B, N]`; prefix tokens may be among them.
        gap: the largest gap in each item's sorted log norms, `[B]`.
        class_attention: the class token's attention, mean over heads, `[B, N]`; None without a class token, or where the block's
            attention is not plain.
        artifacts: patch tokens that draw more of it than the class token itself, bool `[B, N]`; None likewise.
    """

    block: int
    name: str
    norms: Tensor
    massive: Tensor
    gap: Tensor
    class_attention: Tensor | None
    artifacts: Tensor | None


def survey_tokens(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    prefix_tokens: int | None = None,
    minimal_gap: float = MINIMAL_GAP,
    observe: Callable[[AttentionCall], object] | None = None,
) -> list[BlockTokens]:
    """Run a model once, as it is, and report on the tokens of each attention block.

    Args:
        model: contains one vision transformer of the transformers library, not patched.
        run: calls the model on one batch; called once, without gradients.
        prefix_tokens: class and register tokens at the front; None detects them.
        minimal_gap: as for `find_massive_tokens`.
        observe: called in every block of plain self-attention as it runs.

    Returns:
        One entry per attention block that ran, in order. The model is left as it was.

    Raises:
        InvalidPlanError: if the model is patched.
        UnsupportedAttentionError: if it has no attention blocks.
    """
    outputs: dict[int, Tensor] = {}
    attended: dict[int, Tensor] = {}
    prefix = prefix_tokens

    def look(call: AttentionCall) -> None:
        if call.is_plain and prefix:
            attended[call.block] = class_attention(call.query, call.key, call.scale).detach()
        if call.is_plain and observe is not None:
            observe(call)

    with observed(model, look, leaving=lambda block, hidden: outputs.update({block: hidden.detach()})) as blocks:
        if prefix is None:
            prefix = blocks[0].prefix_tokens
        with torch.no_grad():
            run()
    return [
        _describe(block.number, block.name, outputs[block.number], attended.get(block.number), prefix, minimal_gap)
        for block in blocks
        if block.number in outputs
    ]


def _describe(
    number: int, name: str, hidden: Tensor, attention: Tensor | None, prefix: int, minimal_gap: float
) -> BlockTokens:
    massive, gap = find_massive_tokens(hidden, minimal_gap=minimal_gap)
    artifacts = None
    if attention is not None:
        artifacts = attention > attention[:, :1]
        artifacts[:, :prefix] = False
    return BlockTokens(number, name, hidden.float().norm(dim=-1), massive, gap, attention, artifacts)
