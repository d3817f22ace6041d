"""Which linear layers of a file in 8 bits cost most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fna.export.blocks import find_blocks
from fna.export.passes.layer_costs import LayerCost, measure_layer_costs
from fna.validate.budget.chain import Chain, Say
from fna.validate.budget.rounding import has_low_types, round_everywhere

KEPT = (1, 2, 4, 8)
"""How many of the costliest inputs the summary keeps out of 8 bits."""


def measure_linear_layers(chain: Chain, pixels: Sequence[NDArray[np.float32]], on_step: Say) -> tuple[LayerCost, ...]:
    """Measure each linear layer of a file in 8 bits on the first output, the costliest alone first; nothing of other files."""
    if chain.metadata.quantized is None:
        return ()
    model = round_everywhere(chain.proto) if has_low_types(chain.proto) else chain.proto
    output = next((name for name in chain.outputs if name in chain.metadata.token_outputs), chain.outputs[0])
    costs = measure_layer_costs(
        model,
        pixels,
        output,
        lambda done, of: on_step("measuring each linear layer in 8 bits", done, of),
        most=KEPT[-1],
        blocks=_blocks_by_node(chain),
    )
    return tuple(costs)


def _blocks_by_node(chain: Chain) -> dict[str, int]:
    blocks = find_blocks(chain.proto, chain.metadata.plan.num_blocks)
    nodes = ((node.name, blocks.get(node.output[0])) for node in chain.proto.graph.node)
    return {name: block for name, block in nodes if block is not None}


def describe_linear_layers(costs: Sequence[LayerCost]) -> list[str]:
    """Say which layers cost most alone, and what keeping the costliest gains; nothing where nothing was measured."""
    if not costs:
        return []
    worst = costs[0]
    kept = ", ".join(f"{costs[count - 1].without:.6f} without {count}" for count in KEPT if count < len(costs))
    blocks = sorted({(cost.block_alone, cost.block) for cost in costs if cost.block_alone is not None})
    by_block = ", ".join(f"{alone:.6f} block {block}" for alone, block in blocks[:4])
    return [
        f"linear layers in 8 bits, mean cosine: {worst.everything:.6f} with all, {kept} of the costliest inputs "
        "(--keep-fp16-linear)",
        *(f"  {', '.join(cost.layers)}: {cost.alone:.6f} alone" for cost in costs[:3]),
        *([f"  by block, alone: {by_block}"] if by_block else []),
    ]
