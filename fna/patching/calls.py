"""Taking the place of attention that a module computes by calling PyTorch's attention function, while it runs.

The module's own forward runs as it is, with everything around the call (fused projections, norms of query and key, rotary
embeddings); only the call itself is answered by a handler. All of it is kept on the module, so that copies of a model work too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fna.errors import UnsupportedAttentionError

CALLS = "_fna_calls"


class CallHandler(Protocol):
    """Answers one call of `scaled_dot_product_attention`."""

    def __call__(
        self,
        query: Tensor,  # [B, H, N, D]
        key: Tensor,  # [B, H, N, D]
        value: Tensor,  # [B, H, N, D]
        /,
        **options: Any,
    ) -> Tensor:  # [B, H, N, D]
        """Take the function's arguments; the options are those that the module gave by name or further on."""


@dataclass
class InterceptedCalls:
    """What an intercepted module keeps.

    Attributes:
        handlers: by the place of a call among those of one forward.
        forward: the module's own, where it had one set on itself and not on its class.
        hook: keeps `nn.TransformerEncoderLayer` off its fast path, which does not run the module; None for other modules.
    """

    handlers: Mapping[int, CallHandler]
    forward: Callable[..., Any] | None
    hook: RemovableHandle | None


def intercept(module: nn.Module, handlers: Mapping[int, CallHandler]) -> None:
    """Have handlers answer a module's calls of PyTorch's attention function until `release`."""
    multi_head = is_multi_head(module)
    hook = module.register_forward_pre_hook(_be_run) if multi_head else None
    setattr(module, CALLS, InterceptedCalls(handlers, module.__dict__.get("forward"), hook))
    forward = _multi_head_forward if multi_head else _watched_forward
    module.forward = MethodType(forward, module)


def release(module: nn.Module) -> None:
    """Undo `intercept`."""
    calls: InterceptedCalls = getattr(module, CALLS)
    del module.__dict__["forward"]
    if calls.forward is not None:
        module.forward = calls.forward
    if calls.hook is not None:
        calls.hook.remove()
    delattr(module, CALLS)


def _be_run(_module: nn.Module, _args: Any) -> None:
    """A hook that does nothing but be there."""


def is_multi_head(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own `nn.MultiheadAttention`, forward and all."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


_OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Calls(TorchFunctionMode):
    def __init__(self, handlers: Mapping[int, CallHandler]) -> None:
        super().__init__()
        self.handlers, self.ordinal = handlers, -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.ordinal += 1
        handler = self.handlers.get(self.ordinal)
        if handler is None:
            return func(*args, **kwargs)
        options = {**dict(zip(("query", "key", "value", *_OPTIONS), args, strict=False)), **kwargs}
        query, key, value = (options.pop(name) for name in ("query", "key", "value"))
        return handler(query, key, value, **options)


def _watched_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    calls: InterceptedCalls = getattr(self, CALLS)
    with _Calls(calls.handlers):
        if calls.forward is not None:
            return calls.forward(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)


def _multi_head_forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """`nn.MultiheadAttention` for self-attention whose weights nobody uses, its attention answered by the handler.

    Its own forward calls PyTorch's function inside another one that a mode cannot look into.
    """
    if is_causal or attn_mask is not None or key_padding_mask is not None:
        raise UnsupportedAttentionError(
            "a torch.nn.MultiheadAttention was called causally or with a mask, but not when it was found; call fna.patch with an "
            "example of how the model is called"
        )
    packed = query is key and key is value
    tensors = (query, key, value)
    if not self.batch_first:
        tensors = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
    biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
    if not self._qkv_same_embed_dim:
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        projected = [linear(*parts) for parts in zip(tensors, weights, biases, strict=True)]
    elif packed:
        projected = list(linear(tensors[0], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
    else:
        projected = [linear(*parts) for parts in zip(tensors, self.in_proj_weight.chunk(3), biases, strict=True)]
    heads = [tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for tensor in projected]
    dropout = self.dropout if self.training else 0.0
    out = getattr(self, CALLS).handlers[0](*heads, dropout_p=dropout)
    out = self.out_proj(out.transpose(1, 2).flatten(2))
    return (out if self.batch_first else out.transpose(0, 1)), None
