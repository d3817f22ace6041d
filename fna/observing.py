"""Looking into a model's attention while it runs, exactly as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fna.patching import AttentionBlock, exact_attention_forward, find_attention_blocks, make_mask

OBSERVED_NAME = "fna-observed"
_OBSERVER = "_fna_observer"

Observer = Callable[[int, Tensor, Tensor, Tensor, float, Tensor], Tensor]
"""Block number, query, key, value `[B, H, N, D]`, scale, exact output `[B, H, N, D]`; returns the output to go on with."""


@contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[list[AttentionBlock]]:
    """Call `observer` with the inputs and the output of every attention block that runs within the block.

    Args:
        model: as for `fna.patch`; not patched.
        observer: what it returns takes the place of the attention's output.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(OBSERVED_NAME, _observed_forward)
    AttentionMaskInterface.register(OBSERVED_NAME, make_mask)
    blocks = find_attention_blocks(model)
    configs = list({id(block.attention.config): block.attention.config for block in blocks}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for block in blocks:
            exact = block.attention.config._attn_implementation or "sdpa"
            setattr(block.attention, _OBSERVER, (block.number, observer, exact))
        for config in configs:
            config._attn_implementation = OBSERVED_NAME
        yield blocks
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        for block in blocks:
            if hasattr(block.attention, _OBSERVER):
                delattr(block.attention, _OBSERVER)


def _observed_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    number, observer, name = getattr(module, _OBSERVER, (None, None, "sdpa"))
    out, _ = exact_attention_forward(
        name, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    if observer is None:
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return observer(number, query, key, value, scale, out.transpose(1, 2)).transpose(1, 2), None
