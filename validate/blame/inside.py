"""A step's error inside the model: at the output of every FNA operator and of every block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from fna.export.sources.running import patched, run_torch
from fna.validate.blame.effects import Pixels, fna_blocks
from fna.validate.budget.block_parts import BlockPart, Capture, captured, find_block_parts
from fna.validate.budget.chain import DEPLOYED, ENGINE, EXACT, FNA, PORTABLE, UNDONE, Chain, inspect_engine
from fna.validate.budget.fna_nodes import (
    FnaNode,
    NodeProbe,
    list_fna_nodes,
    mark_outputs,
    planned_output,
)
from fna.validate.budget.rounding import has_low_types, round_everywhere
from fna.validate.budget.runners import OnnxRunner
from fna.validate.budget.undoing import undo_nodes
from fna.validate.metrics import ErrorMeter

PartArrays = dict[BlockPart, NDArray[np.float32]]


class BlockPartError(BaseModel):
    """The error of a step at one place inside the model.

    Attributes:
        block: its number.
        part: `fna`, what the FNA operator returns; `output`, the hidden states that leave the block; of a grafted file's export step
            `attention`, what exact attention gives on the FNA operator's inputs, where all blocks are exact.
        tensor: the place's name in the file.
        relative_l2: over all images looked at.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    part: str
    tensor: str
    relative_l2: float


def compare_block_parts(chain: Chain, step: str, images: Sequence[Pixels]) -> tuple[BlockPartError, ...]:
    """Measure a step's error at the output of every FNA operator and every block, in the model's order."""
    if chain.reference is not None and step == "export":
        return _compare_nodes(chain, images)
    comparison = next(comparison for comparison in chain.comparisons if comparison.step == step)
    names = _engine_names(chain) if step == "engine" else part_names(chain)
    reference, actual = _part_runner(chain, comparison.reference, names), _part_runner(chain, comparison.actual, names)
    meters: dict[BlockPart, ErrorMeter] = {}
    for pixels in images:
        expected, computed = reference(pixels), actual(pixels)
        for part in names:
            if part in expected and part in computed and expected[part].shape == computed[part].shape:
                meters.setdefault(part, ErrorMeter(str(part))).add(expected[part], computed[part])
    return tuple(
        BlockPartError(block=part.block, part=part.part, tensor=names[part], relative_l2=meter.result().judged)
        for part, meter in meters.items()
    )


def _compare_nodes(chain: Chain, images: Sequence[Pixels]) -> tuple[BlockPartError, ...]:
    """A grafted file's export step: what each node computes of its inputs, and whether those are the original's."""
    names = part_names(chain)
    probe = NodeProbe(chain.proto, chain.folder, chain.file.onnx.name)
    tensors = {BlockPart(node.block, "fna"): node.output for node in probe.nodes}
    original = undone = None
    if UNDONE in chain.stages:
        tensors |= {BlockPart(node.block, "attention"): names[BlockPart(node.block, "fna")] for node in probe.nodes}
        assert chain.reference is not None
        original = run_marked(chain.reference, chain, names)
        undone = run_marked(undo_nodes(chain.proto, fna_blocks(chain), keep_masks=False), chain, names)
    meters = {
        part: ErrorMeter(str(part)) for part in sorted(tensors, key=lambda part: (part.block, part.part == "attention"))
    }
    for pixels in images:
        arrays = probe.run(pixels)
        for node in probe.nodes:
            expected = planned_output(node, arrays, chain.metadata)
            meters[BlockPart(node.block, "fna")].add(expected, arrays[node.output].astype(np.float32))
        if original is not None and undone is not None:
            wanted, computed = original(pixels), undone(pixels)
            for part in wanted:
                meters[BlockPart(part.block, "attention")].add(wanted[part], computed[part])
    return tuple(
        BlockPartError(block=part.block, part=part.part, tensor=tensors[part], relative_l2=meter.result().judged)
        for part, meter in meters.items()
    )


def _engine_names(chain: Chain) -> dict[BlockPart, str]:
    assert chain.engine is not None
    return {BlockPart(place.block, place.part): place.tensor for place in chain.engine.manifest.places}


def part_names(chain: Chain) -> dict[BlockPart, str]:
    """The places by their tensors' names, in order, in the deployed file."""
    if chain.model is not None:
        return find_block_parts(chain.proto, chain.model.module)
    assert chain.reference is not None
    return {BlockPart(node.block, "fna"): _first_common(chain, node) for node in list_fna_nodes(chain.proto)}


def _first_common(chain: Chain, node: FnaNode) -> str:
    """The first tensor behind a grafted FNA node that the original has as well: the block's attention, laid out as it was."""
    assert chain.reference is not None
    known = {name for writer in chain.reference.graph.node for name in writer.output}
    readers = {name: reader for reader in reversed(chain.proto.graph.node) for name in reader.input}
    name = node.output
    while name not in known and name in readers:
        name = readers[name].output[0]
    return name


def _part_runner(chain: Chain, stage: str, names: dict[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    if chain.model is not None and stage in (EXACT, FNA):
        return lambda pixels: dict(capture(chain, stage == FNA, pixels).arrays)
    if stage == ENGINE:
        return _inspected(chain, names)
    if stage == EXACT:
        assert chain.reference is not None
        return run_marked(chain.reference, chain, names)
    if stage == DEPLOYED:
        proto = round_everywhere(chain.proto) if has_low_types(chain.proto) else chain.proto
        return run_marked(proto, chain, names)
    if stage == PORTABLE and chain.portable is not None and chain.model is not None:
        return run_marked(chain.portable, chain, find_block_parts(chain.portable, chain.model.module))
    return run_marked(chain.proto, chain, names)


def _inspected(chain: Chain, names: Mapping[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    engine = chain.engine
    assert engine is not None

    def run(pixels: Pixels) -> PartArrays:
        arrays = inspect_engine(engine, pixels)
        return {part: arrays[name] for part, name in names.items() if name in arrays}

    return run


def capture(chain: Chain, is_fna: bool, pixels: Pixels) -> Capture:
    """Run the PyTorch model, exact or by the plan, and return what was seen inside."""
    assert chain.model is not None
    module, plan = chain.model.module, chain.metadata.plan
    if not is_fna:
        with captured(module) as seen:
            run_torch(chain.model, pixels)
        return seen
    with patched(chain.model, plan), captured(module) as seen:
        run_torch(chain.model, pixels)
    return seen


def run_marked(model: ModelProto, chain: Chain, names: Mapping[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    """Run a model with its block boundaries handed out; onnxruntime still fuses what lies between them."""
    runner = OnnxRunner(mark_outputs(model, list(names.values())), chain.folder, chain.file.onnx.name)

    def run(pixels: Pixels) -> PartArrays:
        arrays = runner.run(pixels, list(dict.fromkeys(names.values())))
        return {part: arrays[name] for part, name in names.items()}

    return run
