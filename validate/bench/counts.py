"""Operations and bytes of a model and of its attention, exact and FNA: what no measurement on one machine can say.

A product and its addition are two operations; softmax and other elementwise work, a few percent, is not counted.
"""

from __future__ import annotations

import copy
import logging

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils.flop_counter import FlopCounterMode

from fna.export.sources.loading import LoadedModel
from fna.patching import find_attention_blocks
from fna.plan import Plan

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Counts(BaseModel):
    """Counts for one image.

    Attributes:
        dense_gflop: of the whole model with exact attention, in 1e9 operations.
        fna_gflop: of the whole model by the plan.
        dense_attention_gflop: of attention alone (scores and their product with the values), all blocks exact.
        fna_attention_gflop: the same, with the plan's blocks FNA and the others exact.
        attention_share: attention's share of the dense model's operations; FNA can save no more than this.
        dense_attention_mib: bytes that exact attention moves if scores and weights are written out, in MiB.
        fna_attention_mib: the same by the plan.
        fused_attention_mib: the least that either moves: query, key, value and output once.
    """

    model_config = ConfigDict(frozen=True)

    dense_gflop: float
    fna_gflop: float
    dense_attention_gflop: float
    fna_attention_gflop: float
    attention_share: float
    dense_attention_mib: float
    fna_attention_mib: float
    fused_attention_mib: float


def exact_flop(
    tokens: int,  # N
    heads: int,
    head_size: int,  # D
) -> int:
    """Operations of exact attention in one block: two products of N x N x D per head."""
    return heads * 4 * tokens * tokens * head_size


def fna_flop(
    tokens: int,  # N
    landmarks: int,  # S
    heads: int,
    head_size: int,  # D
    iterations: int = 6,
) -> int:
    """Operations of FNA in one block.

    Per head: Bv and the output, each two products of N x S x D; A, one of S x S x D; all Newton-Schulz iterations but the last, four
    products of S x S x S each; the last, applied to Bv, one of S x S x S and four of S x S x D.
    """
    n, s, d = tokens, landmarks, head_size
    linear = 8 * n * s * d
    core = 2 * s * s * d + 8 * s**3 * (iterations - 1) + 2 * s**3 + 8 * s * s * d
    return heads * (linear + core)


def exact_bytes(tokens: int, heads: int, head_size: int, size: int) -> int:
    """Bytes of exact attention in one block: four token tensors, and scores and weights written and read."""
    return size * heads * (4 * tokens * head_size + 4 * tokens * tokens)


def fna_bytes(tokens: int, landmarks: int, heads: int, head_size: int, size: int) -> int:
    """Bytes of FNA in one block, as `exact_bytes`: query and key are read twice, two N x S score matrices take the place of one."""
    return size * heads * (6 * tokens * head_size + 8 * tokens * landmarks)


def count(model: LoadedModel, plan: Plan, height: int, width: int, precision: str = "fp32") -> Counts:
    """Count a model's operations and bytes for one image, without running it.

    Args:
        model: whose operators are counted on tensors without data.
        plan: which blocks are FNA.
        height: of the image, in pixels.
        width: of the image, in pixels.
        precision: of weights and activations.
    """
    config = find_attention_blocks(model.module)[0].attention.config
    heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = (height // model.patch_size) * (width // model.patch_size) + (plan.prefix_tokens or 0)
    size = BYTES[precision]
    total = total_flop(model, height, width)
    one = exact_flop(tokens, heads, head_size)
    dense, approximated = one * plan.num_blocks, one * (plan.num_blocks - len(plan.blocks))
    one_bytes = exact_bytes(tokens, heads, head_size, size)
    dense_bytes, approximated_bytes = one_bytes * plan.num_blocks, one_bytes * (plan.num_blocks - len(plan.blocks))
    for entry in plan.blocks:
        approximated += fna_flop(tokens, entry.landmarks, heads, head_size, plan.iterations)
        approximated_bytes += fna_bytes(tokens, entry.landmarks, heads, head_size, size)
    return Counts(
        dense_gflop=total / 1e9,
        fna_gflop=(total - dense + approximated) / 1e9,
        dense_attention_gflop=dense / 1e9,
        fna_attention_gflop=approximated / 1e9,
        attention_share=dense / total,
        dense_attention_mib=dense_bytes / 2**20,
        fna_attention_mib=approximated_bytes / 2**20,
        fused_attention_mib=plan.num_blocks * size * heads * 4 * tokens * head_size / 2**20,
    )


def total_flop(model: LoadedModel, height: int, width: int) -> int:
    """Operations of the exact model for one image, by PyTorch's counter."""
    module = copy.deepcopy(model.module).to("meta")
    logger = logging.getLogger("torch.utils.flop_counter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.empty(1, 3, height, width, device="meta"))
    finally:
        logger.setLevel(level)
    return int(counter.get_total_flops())
