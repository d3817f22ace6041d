"""The attention implementation `fna` of transformers' models: what a patched block computes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fna.attention import fast_nystrom_attention
from fna.block_steps import FocalStep, wire_block
from fna.composition import TorchWiring
from fna.errors import InvalidArgumentError, InvalidPlanError, UnsupportedAttentionError
from fna.focal import focal_attention
from fna.patching.state import BlockState
from fna.samplers.common.spacing import patch_grid

ATTENTION_NAME = "fna"
STATE = "_fna_block"
EXACT = "_fna_exact"
"""On blocks that the plan leaves alone: the implementation that they had."""


def fna_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # [B, N, H, D]
    """The function registered as attention implementation `fna`; blocks that the plan leaves exact run as before the patch.

    Raises:
        UnsupportedAttentionError: if the block is called with a mask, a position bias, causally or as cross-attention.
    """
    state: BlockState | None = getattr(module, STATE, None)
    if state is None:
        exact_name = getattr(module, EXACT, "sdpa")
        return exact_attention_forward(
            exact_name, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _refuse_call(state.name, query, key, attention_mask, dropout, kwargs)
    return planned_attention(state, query, key, value, scaling).transpose(1, 2), None


def planned_attention(
    state: BlockState,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    scaling: float | None,
) -> Tensor:  # [B, H, N, D]
    """Compute a block's plain self-attention by its plan: FNA, focal, masked, some heads exact."""
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if state.artifact_finder is not None:
        state.artifact_finder.find(query, key, factor)
    key_mask = None if state.masked is None else state.masked.mask(query.shape[2], query.device)
    sink = state.steps.key_masking is not None and state.steps.key_masking.sink

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if key_mask is not None:
            return torch.ops.fna.masked_attention(query, key, value, key_mask, factor, sink)
        return scaled_dot_product_attention(query, key, value, scale=scaling)

    if state.steps.focal is not None:
        return _focal(state.name, state.steps.focal, query, key, value, state.prefix_tokens, factor, key_mask)
    step = state.steps.nystrom
    if step is None:
        return exact(query, key, value)
    landmarks, bias = state.landmarks_for(query, key, value)

    def nystrom(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fast_nystrom_attention(
            query,
            key,
            value,
            landmarks,
            landmark_bias=bias,
            scale=factor,
            iterations=step.iterations,
            chebyshev=step.chebyshev,
            exact_rows=step.exact_rows,
            key_mask=key_mask,
            sink=sink,
        )

    wiring = TorchWiring(nystrom, exact, landmarks, state.prefix_tokens, step.landmarks.patches, step.exact_rows)
    return wire_block(state.steps, query.shape[1], query, key, value, wiring)


@dataclass
class PlannedCall:
    """Answers an intercepted call of `scaled_dot_product_attention` by the plan."""

    state: BlockState

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        /,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        """See `fna.patching.calls.CallHandler`.

        Raises:
            UnsupportedAttentionError: if the block is called with a mask, causally or as cross-attention.
        """
        _refuse_call(self.state.name, query, key, attn_mask, dropout_p, options)
        return planned_attention(self.state, query, key, value, scale)


def _focal(
    name: str,
    step: FocalStep,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    prefix_tokens: int,
    scale: float,
    key_mask: Tensor | None,
) -> Tensor:  # [B, H, N, D]
    try:
        return focal_attention(
            query,
            key,
            value,
            patches=patch_grid(query.shape[2], prefix_tokens, step.patches),
            prefix_tokens=prefix_tokens,
            tile=step.tile,
            levels=step.levels,
            hot=step.hot,
            seed=step.seed,
            scale=scale,
            key_mask=key_mask,
        )
    except InvalidArgumentError as error:
        raise InvalidPlanError(f"{name} cannot be focal attention: {error}") from None


def exact_attention_forward(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Run the attention function of one of transformers' implementations; `eager` is the module's own file's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":  # not in the registry
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[name]
    result: tuple[Tensor, Tensor | None] = attend(module, *args, **kwargs)
    return result


def register_with_transformers() -> None:
    """Make `fna` an attention implementation that models can be switched to."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, fna_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, make_mask)


def make_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Make no mask where nothing is masked, while tracing too (`sdpa_mask` writes one of ones into every traced file)."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and allow_is_bidirectional_skip:
        return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs
    )


def _refuse_call(
    name: str, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    reason = None
    if mask is not None:
        reason = f"it was called with an attention mask of shape {list(mask.shape)}"
    elif kwargs.get("position_bias") is not None:
        reason = "it adds a position bias to the scores"
    elif kwargs.get("is_causal"):
        reason = "it is causal"
    elif key.shape != query.shape:
        reason = f"its queries {list(query.shape)} and keys {list(key.shape)} differ (cross-attention or grouped heads)"
    elif kwargs.get("softcap") is not None:
        reason = "it caps its scores"
    elif kwargs.get("sliding_window") is not None:
        reason = "it attends within a window"
    elif dropout:
        reason = f"it drops attention weights at random (p = {dropout}); call model.eval() first"
    if reason is not None:
        raise UnsupportedAttentionError(
            f"{name} cannot be FNA: {reason}; FNA approximates unmasked, full self-attention only. "
            "Leave the block out of the plan's layers"
        )
