"""Which tokens are massive and which are artifacts, block by block, in one instrumented run of a PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fna.errors import InvalidPlanError
from fna.patching import find_attention_blocks, is_patched
from fna.special_tokens import MINIMAL_GAP, class_attention, detect_prefix_tokens, find_massive_tokens

SURVEY_NAME = "fna_survey"

Observer = Callable[[int, Tensor, Tensor, Tensor, float], None]
"""Called with a block's number, its query, key and value `[B, H, N, D]`, and the scale."""

_RECORD = "_fna_survey"


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
    observe: Observer | None = None,
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
    if is_patched(model):
        raise InvalidPlanError("the model is patched; call fna.unpatch(model) to survey the tokens of the model itself")
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    blocks = find_attention_blocks(model)
    prefix = detect_prefix_tokens(blocks[0].tower) if prefix_tokens is None else prefix_tokens
    AttentionInterface.register(SURVEY_NAME, _record_class_attention)
    AttentionMaskInterface.register(SURVEY_NAME, sdpa_mask)
    outputs: dict[int, Tensor] = {}
    configs = {id(block.attention.config): block.attention.config for block in blocks}.values()
    before = [(config, config._attn_implementation) for config in configs]
    hooks = []
    try:
        for block in blocks:
            setattr(block.attention, _RECORD, {"prefix": prefix, "block": block.number, "observe": observe})
            hooks.append(block.layer.register_forward_hook(_keep_output(outputs, block.number)))
        for config in configs:
            config._attn_implementation = SURVEY_NAME
        with torch.no_grad():
            run()
        recorded = [getattr(block.attention, _RECORD).get("attention") for block in blocks]
    finally:
        for hook in hooks:
            hook.remove()
        for config, implementation in before:
            config._attn_implementation = implementation
        for block in blocks:
            if hasattr(block.attention, _RECORD):
                delattr(block.attention, _RECORD)
    return [
        _describe(block.number, block.name, outputs[block.number], attention, prefix, minimal_gap)
        for block, attention in zip(blocks, recorded, strict=True)
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


def _keep_output(outputs: dict[int, Tensor], number: int) -> Callable[..., None]:
    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        outputs[number] = (output[0] if isinstance(output, tuple) else output).detach()

    return keep


def _record_class_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention by `sdpa`, and what the class token attends to where it is plain self-attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    record = getattr(module, _RECORD, None)
    if record is not None and attention_mask is None and key.shape == query.shape:
        factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        if record["prefix"]:
            record["attention"] = class_attention(query, key, factor).detach()
        if record["observe"] is not None:
            record["observe"](record["block"], query, key, value, factor)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, Tensor | None] = sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return result
