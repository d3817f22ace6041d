"""What each FNA block costs: blocks made FNA one by one, and all but one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fna.export.sources.running import patched, run_torch
from fna.runtime import Arrays
from fna.validate.budget.chain import EXACT, Chain, Say
from fna.validate.budget.fna_nodes import (
    list_fna_nodes,
)
from fna.validate.budget.runners import OnnxRunner
from fna.validate.budget.undoing import undo_nodes
from fna.validate.metrics import ErrorMeter

Pixels = NDArray[np.float32]


class BlockEffect(BaseModel):
    """What one FNA block costs, on one output.

    Attributes:
        block: its number.
        output: the output that was looked at.
        alone: relative L2 error to exact attention when this block alone is FNA.
        all_but: the same when all FNA blocks but this one are.
        everything: the same with the whole plan; `everything - all_but` is what making this block exact would gain.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    output: str
    alone: float
    all_but: float
    everything: float


def block_effects(chain: Chain, images: Sequence[Pixels], on_step: Say) -> tuple[BlockEffect, ...]:
    """Make each FNA block FNA alone, and all but it, and measure the outputs.

    In PyTorch by plans; a grafted file's nodes compute exact attention again instead (`fna.validate.budget.undoing`).
    """
    numbers = fna_blocks(chain)
    chosen: dict[tuple[str, int], set[int]] = {}
    for number in numbers:
        chosen["alone", number] = {number}
        chosen["all_but", number] = set(numbers) - {number}
    chosen["everything", -1] = set(numbers)
    exact = [chain.stages[EXACT](pixels) for pixels in images]
    errors: dict[tuple[str, int], dict[str, float]] = {}
    for index, (key, blocks) in enumerate(chosen.items()):
        on_step(f"FNA in {'block' if key[0] == 'alone' else 'all blocks but'} {key[1]}", index, len(chosen))
        errors[key] = _output_errors(exact, _run_with_fna_in(chain, blocks, images), chain.outputs)
    return tuple(
        BlockEffect(
            block=number,
            output=output,
            alone=errors["alone", number][output],
            all_but=errors["all_but", number][output],
            everything=errors["everything", -1][output],
        )
        for number in numbers
        for output in chain.outputs
    )


def fna_blocks(chain: Chain) -> list[int]:
    """Return the numbers of the blocks that are FNA or focal attention, in order."""
    if chain.model is not None:
        return chain.metadata.plan.replaced_blocks
    return [node.block for node in list_fna_nodes(chain.proto)]


def _run_with_fna_in(chain: Chain, blocks: Collection[int], images: Sequence[Pixels]) -> list[Arrays]:
    if chain.model is None:
        others = set(fna_blocks(chain)) - set(blocks)
        run = OnnxRunner(undo_nodes(chain.proto, others), chain.folder, chain.file.onnx.name).run
        return [run(pixels, chain.outputs) for pixels in images]
    with patched(chain.model, chain.metadata.plan.only(blocks)):
        return [run_torch(chain.model, pixels) for pixels in images]


def _output_errors(exact: Sequence[Arrays], actual: Sequence[Arrays], outputs: Sequence[str]) -> dict[str, float]:
    meters = {name: ErrorMeter(name) for name in outputs}
    for reference, outputs_of_image in zip(exact, actual, strict=True):
        for name, meter in meters.items():
            meter.add(reference[name], outputs_of_image[name])
    return {name: meter.result().judged for name, meter in meters.items()}
