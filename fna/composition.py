"""One attention block as its steps have it, in PyTorch: heads taken apart and joined, and the correction of what FNA leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fna.correction import Correction
from fna.samplers.common.spacing import patch_grid

HeadAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of some heads: query, key, value `[B, H', N, D]` to `[B, H', N, D]`."""


@dataclass
class TorchWiring:
    """How `fna.block_steps.wire_block` computes a block in PyTorch.

    Attributes:
        nystrom: FNA of some heads.
        exact: exact attention of some heads.
        landmarks: of the block, `[B or 1, S]`.
        prefix_tokens: tokens before the patches.
        patches: rows and columns of patches; None infers a square.
        exact_rows: whether the landmarks' rows are exact.
    """

    nystrom: HeadAttention
    exact: HeadAttention
    landmarks: Tensor
    prefix_tokens: int
    patches: tuple[int, int] | None
    exact_rows: bool

    def take_heads(self, tensor: Tensor, heads: Sequence[int], purpose: str) -> Tensor:
        """See `fna.block_steps.BlockWiring`."""
        return take_heads(tensor, heads)

    def join_heads(self, parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
        """See `fna.block_steps.BlockWiring`."""
        return take_heads(torch.cat(list(parts), dim=1), order)

    def correct(self, out: Tensor, value: Tensor, correction: Correction) -> Tensor:
        """See `fna.block_steps.BlockWiring`."""
        return correct(
            out,
            value,
            self.landmarks,
            correction,
            prefix_tokens=self.prefix_tokens,
            patches=patch_grid(out.shape[2], self.prefix_tokens, self.patches),
            exact_rows=self.exact_rows,
        )


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
