"""Looking into a model's attention while it runs: what each block computes, and the hidden states between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from fna.chebyshev import chebyshev_from, core_settings
from fna.errors import InvalidPlanError
from fna.patching import AttentionBlock, exact_attention_forward, find_attention_blocks, is_patched, make_mask
from fna.patching.calls import CallHandler, intercept, release
from fna.patching.record import as_tokens, entering_tokens

OBSERVED_NAME = "fna-observed"
_OBSERVER = "_fna_observer"


@dataclass(frozen=True)
class AttentionCall:
    """A block's exact attention, as it runs.

    Attributes:
        block: the block's number.
        query: `[B, H, N, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, D]`.
        scale: factor on the scores.
        out: exact attention's output, `[B, H, N, D]`.
        is_plain: whether it is self-attention without a mask.
    """

    block: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    out: Tensor
    is_plain: bool


@dataclass(frozen=True)
class FocalCall:
    """A focal attention operator of a patched model, as it runs; the fields are the operator's arguments, see `fna.focal`."""

    block: int
    out: Tensor  # [B, H, N, D]
    query: Tensor
    key: Tensor
    value: Tensor
    tile_keys: Tensor  # [T, K]
    prefix_tokens: int
    hot: int
    scale: float
    key_mask: Tensor | None = None  # [B, N] or [1, N]

    @property
    def settings(self) -> dict[str, float]:
        """The operator's attributes besides the scale."""
        return {"prefix_tokens": self.prefix_tokens, "hot": self.hot}


@dataclass(frozen=True)
class NystromCall:
    """An FNA operator of a patched model, as it runs; the fields are the operator's arguments, see `fna.attention`."""

    block: int
    out: Tensor  # [B, H, N, D]
    query: Tensor
    key: Tensor
    value: Tensor
    landmarks: Tensor  # [B, S] or [1, S]
    landmark_bias: Tensor | None
    scale: float
    iterations: int
    exact_rows: bool
    key_mask: Tensor | None = None  # [B, N] or [1, N]
    sink: bool = False
    steps: int = 0
    low: float = 0.0

    @property
    def settings(self) -> dict[str, float]:
        """The operator's attributes besides the scale."""
        return {
            **core_settings(self.iterations, chebyshev_from(self.steps, self.low)),
            "exact_rows": int(self.exact_rows),
        }


ReplacedCall = NystromCall | FocalCall
"""An operator that takes the place of exact attention."""

AttentionObserver = Callable[[AttentionCall], Tensor | None]
"""Returns what takes the place of the attention's output; None leaves it."""

HiddenObserver = Callable[[int, Tensor], object]
"""Called with a block's number and hidden states `[B, N, C]`."""


@contextmanager
def observed(
    model: nn.Module,
    attention: AttentionObserver | None = None,
    *,
    entering: HiddenObserver | None = None,
    leaving: HiddenObserver | None = None,
    replaced: Callable[[ReplacedCall], object] | None = None,
) -> Iterator[list[AttentionBlock]]:
    """Call observers in every attention block that runs within the context, in the order in which they run.

    Args:
        model: as for `fna.patch`; as it was afterwards.
        attention: of exact attention; the model must not be patched then.
        entering: of the hidden states that enter a block.
        leaving: of those that leave it.
        replaced: of the FNA and focal operators of a patched model.

    Raises:
        InvalidPlanError: if exact attention is to be observed in a patched model.
        UnsupportedAttentionError: if the model has no attention blocks.
    """
    blocks = find_attention_blocks(model)
    with ExitStack() as stack:
        if attention is not None:
            if is_patched(model):
                raise InvalidPlanError("the model is patched; call fna.unpatch(model) to look into the model itself")
            stack.enter_context(_exact_attention_observed(blocks, attention))
        running: list[int] = [-1]
        for block in blocks:
            hook = _before_layer(block, running, entering)
            stack.callback(block.layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if leaving is not None:
                stack.callback(block.layer.register_forward_hook(_after_layer(block, leaving)).remove)
        if replaced is not None:
            stack.enter_context(_OperatorMode(replaced, running))
        yield blocks


def _before_layer(block: AttentionBlock, running: list[int], observer: HiddenObserver | None) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: Any, kwargs: Any) -> None:
        running[0] = block.number
        if observer is not None and block.entering is not None:
            observer(block.number, entering_tokens(block.entering, args, kwargs))

    return hook


def _after_layer(block: AttentionBlock, observer: HiddenObserver) -> Callable[..., None]:
    def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(hidden, Tensor) and block.entering is not None:
            observer(block.number, as_tokens(hidden, block.entering))

    return hook


class _OperatorMode(TorchDispatchMode):
    """Sees every operator that PyTorch runs, and hands on the calls of ours that take the place of exact attention."""

    def __init__(self, observer: Callable[[ReplacedCall], object], running: list[int]) -> None:
        super().__init__()
        self.observer, self.running = observer, running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        call: type[NystromCall] | type[FocalCall] | None = {
            torch.ops.fna.attention.default: NystromCall,
            torch.ops.fna.attention_with_key_mask.default: NystromCall,
            torch.ops.fna.focal_attention.default: FocalCall,
        }.get(func)
        if call is not None:
            names = [argument.name for argument in func._schema.arguments]
            arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            known = {field.name: arguments[field.name] for field in fields(call) if field.name in arguments}
            self.observer(call(block=self.running[0], out=result, **known))
        return result


@contextmanager
def _exact_attention_observed(blocks: list[AttentionBlock], observer: AttentionObserver) -> Iterator[None]:
    with ExitStack() as stack:
        interface = [block for block in blocks if block.call is None]
        if interface:
            stack.enter_context(_interface_observed(interface, observer))
        handlers: dict[nn.Module, dict[int, CallHandler]] = {}
        for block in blocks:
            if block.call is not None and block.refusal is None:
                handlers.setdefault(block.attention, {})[block.call] = _ObservedCall(block.number, observer)
        for module, answers in handlers.items():
            intercept(module, answers)
            stack.callback(release, module)
        yield


@dataclass
class _ObservedCall:
    """Answers an intercepted call of `scaled_dot_product_attention` by itself, or what the observer returns."""

    number: int
    observer: AttentionObserver

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, /, **options: Any) -> Tensor:
        """See `fna.patching.calls.CallHandler`."""
        out = scaled_dot_product_attention(query, key, value, **options)
        scale = options.get("scale")
        factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
        is_plain = options.get("attn_mask") is None and not options.get("is_causal") and key.shape == query.shape
        replaced = self.observer(AttentionCall(self.number, query, key, value, factor, out, is_plain))
        return out if replaced is None else replaced


@contextmanager
def _interface_observed(blocks: list[AttentionBlock], observer: AttentionObserver) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(OBSERVED_NAME, _observed_forward)
    AttentionMaskInterface.register(OBSERVED_NAME, make_mask)
    configs = list({id(block.attention.config): block.attention.config for block in blocks}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for block in blocks:
            exact = block.attention.config._attn_implementation or "sdpa"
            setattr(block.attention, _OBSERVER, (block.number, observer, exact))
        for config in configs:
            config._attn_implementation = OBSERVED_NAME
        yield
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
    number, observer, name = getattr(module, _OBSERVER, (-1, None, "sdpa"))
    out, _ = exact_attention_forward(
        name, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    if observer is None:
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    is_plain = attention_mask is None and key.shape == query.shape
    replaced = observer(AttentionCall(number, query, key, value, scale, out.transpose(1, 2), is_plain))
    return out if replaced is None else replaced.transpose(1, 2), None
