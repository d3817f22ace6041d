"""Fast Nyström Attention (FNA, arXiv 2507.16018) in plain PyTorch, and as a `torch.library` operator.

`fast_nystrom_attention` checks its arguments and calls the operator `fna::attention`, which `torch.compile` and
`torch.export` see as one node. `nystrom_attention_reference` is the arithmetic itself, and the twin that every kernel of
this project is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fna.chebyshev import CHEBYSHEV_COLUMN_FLOOR, ChebyshevSteps, chebyshev_coefficients, chebyshev_from
from fna.cuda_kernels import load_cuda_kernels
from fna.errors import (
    InvalidArgumentError,
    InvalidDtypeError,
    InvalidLandmarksError,
    InvalidShapeError,
    UnsupportedAttentionError,
)
from fna.special_tokens import masked_scores

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)

NEWTON_SCHULZ_ITERATIONS = 6
"""Part of the method's definition: it regularises, so more iterations are not closer to exact attention."""


def fast_nystrom_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S], int32 or int64
    *,
    landmark_bias: Tensor | None = None,  # [B, S] or [1, S]
    scale: float | None = None,
    iterations: int = NEWTON_SCHULZ_ITERATIONS,
    chebyshev: ChebyshevSteps | None = None,
    exact_rows: bool = False,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], bool or int32
    sink: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor:  # [B, H, N, D]
    """Approximate softmax self-attention through S landmark tokens, in time linear in the number of tokens N.

    Args:
        query: queries, fp16, bf16, fp32 or fp64; the result has this type. Sums and softmax are fp32 (fp64 for fp64).
        key: keys, of the query's type and shape.
        value: values, of the query's type and shape.
        landmarks: indices of the landmark tokens, shared by all heads; distinct within a row.
        landmark_bias: added to the scores of each landmark column, `log(weight)`; see `fna.landmark_bias`.
            None is the published method.
        scale: factor on the scores; `D ** -0.5` if None.
        iterations: Newton-Schulz iterations. Those by default are the definition of the method.
        chebyshev: take these steps (`chebyshev_core`) instead of Newton-Schulz; `iterations` then means nothing.
        exact_rows: write the exactly known output of the landmark tokens over their approximation.
        key_mask: tokens (non-zero) that nobody attends to, in all three softmaxes; see `fna.special_tokens`.
            One of zeros changes no bit.
        sink: let masked tokens, as queries, keep all their keys.
        attn_mask: must be None. Accepted so that a call ported from `scaled_dot_product_attention` is refused by name.

    Returns:
        The attention output, `[B, H, N, D]`, of the query's type.

    Raises:
        InvalidShapeError, InvalidDtypeError, InvalidLandmarksError, InvalidArgumentError: naming what was given.
        UnsupportedAttentionError: for a mask.
    """
    if attn_mask is not None:
        raise UnsupportedAttentionError(
            f"attn_mask of shape {list(attn_mask.shape)} was given, but FNA approximates unmasked self-attention only; "
            "use exact attention for masked, causal or padded blocks"
        )
    _check_inputs(query, key, value, landmarks, landmark_bias)
    if iterations < 1:
        raise InvalidArgumentError(
            f"iterations is {iterations}, but at least 1 is needed (the method is defined with {NEWTON_SCHULZ_ITERATIONS})"
        )
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    index, rows = landmarks.to(torch.int32), bool(exact_rows)
    core = (int(iterations), rows)
    steps = () if chebyshev is None else (chebyshev.steps, chebyshev.low)
    if key_mask is None:
        return torch.ops.fna.attention(query, key, value, index, landmark_bias, factor, *core, *steps)
    _check_key_mask(key_mask, query)
    mask = key_mask.ne(0).to(torch.int32) if key_mask.dtype != torch.int32 else key_mask
    return torch.ops.fna.attention_with_key_mask(
        query, key, value, index, landmark_bias, mask, factor, *core, bool(sink), *steps
    )


def nystrom_attention_reference(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    landmark_bias: Tensor | None,  # [B, S] or [1, S]
    scale: float,
    iterations: int,
    exact_rows: bool,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    sink: bool = False,
    chebyshev: ChebyshevSteps | None = None,
) -> Tensor:  # [B, H, N, D]
    """Compute FNA from checked arguments; the formula of `fast_nystrom_attention`, nothing else.

    With `chebyshev` the core is `chebyshev_core`, and `iterations` means nothing.
    """
    return nystrom_attention_iterates(
        query,
        key,
        value,
        landmarks,
        landmark_bias,
        scale,
        [iterations],
        exact_rows,
        key_mask,
        sink,
        chebyshev=chebyshev,
    )[0]


def nystrom_attention_iterates(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    landmark_bias: Tensor | None,  # [B, S] or [1, S]
    scale: float,
    iterations: Sequence[int],
    exact_rows: bool,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    sink: bool = False,
    known_rows: Tensor | None = None,  # [B, H, S, D]
    chebyshev: ChebyshevSteps | None = None,
) -> list[Tensor]:  # each [B, H, N, D]
    """Compute FNA for several numbers of iterations, at little more than the price of the largest.

    `known_rows` is exact attention's output at the landmarks, where it is known; it is computed otherwise. With `chebyshev` there
    is one result, and `iterations` means nothing.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query_full, key_full, value_full = query.to(dtype), key.to(dtype), value.to(dtype)
    index = landmarks.long()[:, None, :, None].expand(query.shape[0], query.shape[1], -1, query.shape[3])
    query_landmarks = query_full.gather(2, index)  # [B, H, S, D]
    key_landmarks = key_full.gather(2, index) * scale
    bias = 0.0 if landmark_bias is None else landmark_bias.to(dtype)[:, None, None, :]

    whole = at_landmarks = None
    if key_mask is not None:
        whole = (key_mask != 0).expand(query.shape[0], -1)  # [B, N]
        at_landmarks = whole.gather(1, landmarks.long().expand(query.shape[0], -1))  # [B, S]

    def mask(scores: Tensor, keys: Tensor | None, queries: Tensor | None) -> Tensor:
        return scores if keys is None or queries is None else scores - masked_scores(keys, queries, sink, dtype)

    core_scores = mask(query_landmarks @ key_landmarks.mT + bias, at_landmarks, at_landmarks)
    core = torch.softmax(core_scores, dim=-1)  # A: [B, H, S, S]
    if known_rows is None:
        exact_scores = mask((query_landmarks * scale) @ key_full.mT, whole, at_landmarks)
        exact = torch.softmax(exact_scores, dim=-1) @ value_full  # Bv: [B, H, S, D]
    else:
        exact = known_rows.to(dtype)
    if chebyshev is None:
        mixed = newton_schulz_iterates(core, exact, iterations)
    else:
        mixed = [chebyshev_core(core, exact, value_full.gather(2, index), chebyshev.steps, chebyshev.low)]
    weights = torch.softmax(mask(query_full @ key_landmarks.mT + bias, at_landmarks, whole), dim=-1)  # [B, H, N, S]
    outputs = [weights @ rows for rows in mixed]
    if exact_rows:
        outputs = [out.scatter(2, index, exact) for out in outputs]
    return [out.to(query.dtype) for out in outputs]


def apply_newton_schulz(
    core: Tensor,  # [B, H, S, S]
    exact: Tensor,  # [B, H, S, D]
    iterations: int,
) -> Tensor:  # [B, H, S, D]
    """Return `Z @ exact`, with Z the Newton-Schulz iterate of `core` (third order, eq. 11 of arXiv 2102.03902)."""
    return newton_schulz_iterates(core, exact, [iterations])[0]


def newton_schulz_iterates(
    core: Tensor,  # [B, H, S, S]
    exact: Tensor,  # [B, H, S, D]
    iterations: Sequence[int],
) -> list[Tensor]:  # each [B, H, S, D]
    """Return `apply_newton_schulz` for several numbers of iterations, in one run of them.

    The last iteration is applied to `exact` directly: `S * S * D` products instead of `S * S * S` three times.
    """
    inverse = core.mT / core.sum(dim=-2).amax(dim=-1)[..., None, None]
    identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
    results: dict[int, Tensor] = {}
    for count in range(1, max(iterations) + 1):
        product = core @ inverse
        if count in iterations:
            step = 7 * exact - product @ exact
            step = 15 * exact - product @ step
            step = 13 * exact - product @ step
            results[count] = 0.25 * inverse @ step
        if count < max(iterations):
            inner = 15 * identity - product @ (7 * identity - product)
            inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return [results[count] for count in iterations]


def chebyshev_core(
    core_matrix: Tensor,  # A [B, H, S, S]; its rows sum to 1
    exact: Tensor,  # Bv [B, H, S, D]
    value_landmarks: Tensor,  # Vp [B, H, S, D]
    steps: int,
    low: float,
) -> Tensor:  # [B, H, S, D]
    """Return what stands for `Z @ exact` in the cheaper core: the landmarks' values, corrected until A reproduces `exact`.

    The residual Bv - A Vp, less its mean, is solved for by `steps` Chebyshev steps on T = w A^T A, with w the inverse column sums
    of A: `2 S S (S + D (steps + 1))` operations instead of Newton-Schulz's `32 S S S`. Each column of the values is on its own.

    Args:
        core_matrix: the softmax among landmarks.
        exact: the exact attention output of the landmark tokens.
        value_landmarks: the values at the landmarks.
        steps: Chebyshev steps, at least 1.
        low: the lowest eigenvalue of T that the steps aim at, above 0 and below 1. Smaller ones are left alone, which regularises.
    """
    column_weight = 1 / core_matrix.sum(dim=-2).clamp_min(CHEBYSHEV_COLUMN_FLOOR)[..., None]  # w: [B, H, S, 1]
    normal = column_weight * (core_matrix.mT @ core_matrix)  # T: entries in 0..1, spectrum in [0, 1]
    residual = exact - core_matrix @ value_landmarks
    mean = residual.mean(dim=-2, keepdim=True)
    residual = column_weight * (core_matrix.mT @ (residual - mean))
    (alpha, _), *rest = chebyshev_coefficients(steps, low)
    total = step = alpha * residual
    for alpha, beta in rest:
        residual = residual - normal @ step
        step = beta * step + alpha * residual
        total = total + step
    return value_landmarks + mean + total


@torch.library.custom_op("fna::attention", mutates_args=())
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    landmark_bias: Tensor | None,
    scale: float,
    iterations: int,
    exact_rows: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:
    if query.is_cuda and load_cuda_kernels():
        return torch.ops.fna.attention(
            query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows, steps, low
        )
    check_index_range(landmarks, query.shape[2])
    core = chebyshev_from(steps, low)
    return nystrom_attention_reference(
        query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows, chebyshev=core
    )


@_attention_op.register_fake
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    landmark_bias: Tensor | None,
    scale: float,
    iterations: int,
    exact_rows: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, landmarks, bias, ctx.scale, ctx.iterations, ctx.exact_rows, steps, low = inputs
    _save(ctx, query, key, value, landmarks, bias, None, False, chebyshev_from(steps, low))


def _save_masked_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, landmarks, bias, mask, ctx.scale, ctx.iterations, ctx.exact_rows, sink, steps, low = inputs
    _save(ctx, query, key, value, landmarks, bias, mask, sink, chebyshev_from(steps, low))


def _save(ctx, query, key, value, landmarks, bias, mask, sink, chebyshev) -> None:  # type: ignore[no-untyped-def]
    ctx.has_bias, ctx.has_mask, ctx.sink, ctx.chebyshev = bias is not None, mask is not None, sink, chebyshev
    ctx.save_for_backward(query, key, value, landmarks, *(t for t in (bias, mask) if t is not None))


def _attention_backward(ctx, grad):  # type: ignore[no-untyped-def]
    query, key, value, landmarks, *rest = ctx.saved_tensors
    bias = rest.pop(0).detach().requires_grad_(True) if ctx.has_bias else None
    mask = rest.pop(0) if ctx.has_mask else None
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(True) for tensor in (query, key, value)]
        out = nystrom_attention_reference(
            leaves[0], leaves[1], leaves[2], landmarks, bias, ctx.scale, ctx.iterations, ctx.exact_rows, mask, ctx.sink,
            ctx.chebyshev,
        )  # fmt: skip
        wanted = [*leaves, bias] if bias is not None else leaves
        grads = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    gradients = (*grads[:3], None, grads[3] if bias is not None else None)
    return (*gradients, *[None] * (7 if ctx.has_mask else 5))


_attention_op.register_autograd(_attention_backward, setup_context=_save_for_backward)


@torch.library.custom_op("fna::attention_with_key_mask", mutates_args=())
def _masked_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    landmark_bias: Tensor | None,
    key_mask: Tensor,
    scale: float,
    iterations: int,
    exact_rows: bool,
    sink: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:
    if query.is_cuda and load_cuda_kernels():
        return torch.ops.fna.attention_with_key_mask(
            query, key, value, landmarks, landmark_bias, key_mask, scale, iterations, exact_rows, sink, steps, low
        )
    check_index_range(landmarks, query.shape[2])
    core = chebyshev_from(steps, low)
    return nystrom_attention_reference(
        query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows, key_mask, sink, core
    )


@_masked_op.register_fake
def _masked_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    landmarks: Tensor,
    landmark_bias: Tensor | None,
    key_mask: Tensor,
    scale: float,
    iterations: int,
    exact_rows: bool,
    sink: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_masked_op.register_autograd(_attention_backward, setup_context=_save_masked_for_backward)


def check_index_range(landmarks: Tensor, num_tokens: int) -> None:
    """Raise `InvalidLandmarksError` if a landmark is not a token index; only looks at tensors on the CPU.

    Reading a CUDA tensor would wait for the device, so those are left to the caller.
    """
    if landmarks.device.type != "cpu" or landmarks.numel() == 0:
        return
    low, high = int(landmarks.min()), int(landmarks.max())
    if low < 0 or high >= num_tokens:
        raise InvalidLandmarksError(
            f"landmarks hold index {low if low < 0 else high}, but there are {num_tokens} tokens; "
            f"every index must lie in 0..{num_tokens - 1}"
        )


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, bias: Tensor | None) -> None:
    if query.dim() != 4:
        raise InvalidShapeError(f"query has shape {list(query.shape)}, but [B, H, N, D] (4 dimensions) is needed")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != query.shape:
            raise InvalidShapeError(
                f"{name} has shape {list(tensor.shape)}, but query has {list(query.shape)}: FNA is self-attention, "
                "so all three must be equal (repeat grouped heads first; cross-attention is not supported)"
            )
        if tensor.dtype != query.dtype:
            raise InvalidDtypeError(f"{name} is {tensor.dtype}, but query is {query.dtype}; cast them to one type")
        if tensor.device != query.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device}, but query is on {query.device}")
    if query.dtype not in FLOAT_DTYPES:
        raise InvalidDtypeError(f"query is {query.dtype}, but one of fp16, bf16, fp32, fp64 is needed")
    batch, _, num_tokens, _ = query.shape
    if landmarks.dtype not in INDEX_DTYPES:
        hint = "; a boolean mask is not a list of indices (use mask.nonzero())" if landmarks.dtype == torch.bool else ""
        raise InvalidDtypeError(f"landmarks are {landmarks.dtype}, but int32 or int64 token indices are needed{hint}")
    _check_per_landmark("landmarks", landmarks, batch)
    num_landmarks = landmarks.shape[1]
    if num_landmarks < 1 or num_landmarks > num_tokens:
        raise InvalidLandmarksError(
            f"{num_landmarks} landmarks were given for {num_tokens} tokens, but 1 to {num_tokens} are needed"
        )
    if bias is not None:
        if not bias.is_floating_point():
            raise InvalidDtypeError(f"landmark_bias is {bias.dtype}, but a floating-point log(weight) is needed")
        _check_per_landmark("landmark_bias", bias, batch)
        if bias.shape[1] != num_landmarks:
            raise InvalidShapeError(
                f"landmark_bias has {bias.shape[1]} columns, but there are {num_landmarks} landmarks"
            )


def _check_key_mask(key_mask: Tensor, query: Tensor) -> None:
    batch, tokens = query.shape[0], query.shape[2]
    if key_mask.is_floating_point() or key_mask.is_complex():
        raise InvalidDtypeError(f"key_mask is {key_mask.dtype}, but a boolean or int32 mask over the tokens is needed")
    if key_mask.dim() != 2 or key_mask.shape[0] not in (1, batch) or key_mask.shape[1] != tokens:
        needed = f"[1, {tokens}]" if batch == 1 else f"[1, {tokens}] or [{batch}, {tokens}]"
        raise InvalidShapeError(f"key_mask has shape {list(key_mask.shape)}, but {needed} is needed")


def _check_per_landmark(name: str, tensor: Tensor, batch: int) -> None:
    if tensor.dim() != 2 or tensor.shape[0] not in (1, batch):
        needed = "[1, S]" if batch == 1 else f"[1, S] or [{batch}, S]"
        raise InvalidShapeError(f"{name} has shape {list(tensor.shape)}, but {needed} is needed")
