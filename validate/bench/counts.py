"""Operations and bytes of a model and of its attention, exact and FNA: what no measurement on one machine can say.

The formulas are `fna.arithmetic`'s.
"""

from __future__ import annotations

import copy

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils.flop_counter import FlopCounterMode

from fna.arithmetic import (
    OPERATIONS_PER_PRODUCT,
    exact_bytes,
    exact_products,
    fused_bytes,
    plan_bytes,
    plan_products,
)
from fna.export.sources.loading import LoadedModel
from fna.patching import find_attention_blocks
from fna.plan import Plan
from fna.quiet import quiet_loggers

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Counts(BaseModel):
    """Counts for one image.

    Attributes:
        dense_gflop: of the whole model with exact attention, in 1e9 operations.
        fna_gflop: of the whole model by the plan.
        dense_attention_gflop: of attention alone (scores and their product with the values), all blocks exact.
        fna_attention_gflop: the same by the plan: its blocks, heads, iterations, corrections, and choosing landmarks.
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


def count(model: LoadedModel, plan: Plan, height: int, width: int, precision: str = "fp32") -> Counts:
    """Count a model's operations and bytes for one image, without running it.

    Args:
        model: whose operators are counted on tensors without data.
        plan: which blocks are FNA.
        height: of the image, in pixels.
        width: of the image, in pixels.
        precision: of weights and activations.
    """
    block = find_attention_blocks(model.module)[0]
    heads, head_size = block.heads, block.head_size
    tokens = (height // model.patch_size) * (width // model.patch_size) + (plan.prefix_tokens or 0)
    size = BYTES[precision]
    total = total_flop(model, height, width)
    shape = (tokens, heads, head_size)
    dense = OPERATIONS_PER_PRODUCT * plan.num_blocks * exact_products(*shape)
    planned = OPERATIONS_PER_PRODUCT * plan_products(plan, *shape)
    return Counts(
        dense_gflop=total / 1e9,
        fna_gflop=(total - dense + planned) / 1e9,
        dense_attention_gflop=dense / 1e9,
        fna_attention_gflop=planned / 1e9,
        attention_share=dense / total,
        dense_attention_mib=plan.num_blocks * exact_bytes(*shape, size) / 2**20,
        fna_attention_mib=plan_bytes(plan, *shape, size) / 2**20,
        fused_attention_mib=plan.num_blocks * fused_bytes(*shape, size) / 2**20,
    )


def total_flop(model: LoadedModel, height: int, width: int) -> int:
    """Operations of the exact model for one image, by PyTorch's counter."""
    module = copy.deepcopy(model.module).to("meta")
    with (
        quiet_loggers("torch.utils.flop_counter"),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        module(torch.empty(1, *model.input_shape(height, width), device="meta"))
    return int(counter.get_total_flops())
