"""One attention block as a plan has it: some heads FNA, the others exact, with a correction of what FNA leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fna.errors import InvalidArgumentError
from fna.plan import Correction

HeadAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of some heads: query, key, value `[B, H', N, D]` to `[B, H', N, D]`."""


def compose_heads(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    heads: Sequence[int] | None,
    nystrom: HeadAttention,
    exact: HeadAttention,
) -> Tensor:  # [B, H, N, D]
    """Run `nystrom` on the heads listed and `exact` on the others; None is all of them.

    Raises:
        InvalidArgumentError: for heads that the block does not have.
    """
    count = query.shape[1]
    if heads is not None and heads[-1] >= count:
        raise InvalidArgumentError(f"the plan lists head {heads[-1]}, but the block has heads 0 to {count - 1}")
    if heads is None or len(heads) == count:
        return nystrom(query, key, value)
    others = [head for head in range(count) if head not in heads]
    parts = [
        attend(*(take_heads(tensor, chosen) for tensor in (query, key, value)))
        for attend, chosen in ((nystrom, heads), (exact, others))
    ]
    order = [*heads, *others]
    return take_heads(torch.cat(parts, dim=1), [order.index(head) for head in range(count)])


def take_heads(
    tensor: Tensor,  # [B, H, N, D]
    heads: Sequence[int],
) -> Tensor:  # [B, len(heads), N, D]
    """Return some heads in the order given; neighbours as a slice, which copies nothing."""
    first = heads[0]
    if list(heads) == list(range(first, first + len(heads))):
        return tensor if len(heads) == tensor.shape[1] else tensor[:, first : first + len(heads)]
    return tensor.index_select(1, torch.tensor(list(heads), device=tensor.device))


def correct(
    out: Tensor,  # [B, H', N, D]
    value: Tensor,  # [B, H', N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    correction: Correction,
    *,
    prefix_tokens: int,
    patches: tuple[int, int],
    exact_rows: bool,
) -> Tensor:  # [B, H', N, D]
    """Apply a correction to the output of the FNA heads; see `fna.plan.Correction`.

    Args:
        out: FNA's output.
        value: the same heads' values.
        landmarks: landmark tokens.
        correction: kernels and gains.
        prefix_tokens: tokens before the patches; they are left as they are.
        patches: rows and columns of patches.
        exact_rows: whether the landmarks' rows are exact, and therefore left as they are.
    """
    batch, heads, _, size = out.shape
    rows, columns = patches
    kernel = torch.tensor(correction.kernels, dtype=out.dtype, device=out.device)
    kernel = kernel.reshape(heads, 1, correction.size, correction.size).repeat_interleave(size, dim=0)
    image = value[:, :, prefix_tokens:].transpose(2, 3).reshape(batch, heads * size, rows, columns)
    local = torch.nn.functional.conv2d(image, kernel, padding=correction.size // 2, groups=heads * size)
    local = local.reshape(batch, heads, size, rows * columns).transpose(2, 3)
    gain = torch.tensor(correction.gains, dtype=out.dtype, device=out.device).reshape(1, heads, 1, 1)
    corrected = torch.cat([out[:, :, :prefix_tokens], out[:, :, prefix_tokens:] * gain + local], dim=2)
    if not exact_rows:
        return corrected
    known = torch.zeros(landmarks.shape[0], out.shape[2], device=out.device)
    known = known.scatter(1, landmarks.long(), torch.ones_like(landmarks, dtype=known.dtype))
    return torch.where(known[:, None, :, None] > 0.5, out, corrected)
