"""Which block is to blame: for the approximation by making blocks FNA one by one, for later steps by looking inside."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from fna.engines.look_inside.debug_tensors import how_to_build
from fna.observing import NystromCall
from fna.runtime import Arrays
from fna.validate.budget.block_parts import BlockPart, Capture, captured, find_block_parts
from fna.validate.budget.chain import DEPLOYED, ENGINE, EXACT, FNA, PORTABLE, UNDONE, Chain, Say, inspect_engine
from fna.validate.budget.fna_nodes import (
    FnaNode,
    NodeProbe,
    expected_output,
    list_fna_nodes,
    mark_outputs,
    planned_output,
    planned_settings,
)
from fna.validate.budget.rounding import has_low_types, round_everywhere
from fna.validate.budget.runners import OnnxRunner, patched, run_torch
from fna.validate.budget.undoing import undo_nodes
from fna.validate.metrics import ErrorMeter, measure

Pixels = NDArray[np.float32]
PartArrays = dict[BlockPart, NDArray[np.float32]]

_BASELINE = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-2}
"""Errors as small as this are rounding and no sign of anything; growth is counted from here."""

_SAME = 1e-3
"""Relative L2 error under which two results of one formula count as the same when a cause is looked for."""

_ORDERS = {
    ("query", "value", "key"): "its key and value are exchanged",
    ("key", "query", "value"): "its query and key are exchanged",
    ("value", "key", "query"): "its query and value are exchanged",
}


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


class Divergence(BaseModel):
    """Where a step first goes wrong.

    Attributes:
        step: of the budget.
        block: the block to blame; None when all blocks agree, so that what comes after them is.
        part: as in `BlockPartError`.
        tensor: its name in the file.
        relative_l2: the error there.
        before: the error at the same part of the block before.
        cause: what is different, where that could be found out.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    block: int | None
    part: str | None = None
    tensor: str | None = None
    relative_l2: float | None = None
    before: float | None = None
    cause: str | None = None

    def describe(self) -> str:
        """Say it in one line."""
        if self.block is None:
            return f"{self.step}: every block agrees, so the error arises after the last block"
        cause = f": {self.cause}" if self.cause else ""
        return (
            f"{self.step}: first divergence in {BlockPart(self.block, self.part or 'output')} (tensor {self.tensor}), relative L2 "
            f"error {self.relative_l2:.1e} after {self.before:.1e} in the block before{cause}"
        )


class Bisection(BaseModel):
    """What `--bisect` found.

    Attributes:
        images: the images that were looked at.
        effects: of each FNA block, on each output.
        places: errors inside the model, by step.
        not_measured: why a step was not looked into, by step.
        divergences: the first per step that is out of tolerance.
    """

    model_config = ConfigDict(frozen=True)

    images: tuple[str, ...]
    effects: tuple[BlockEffect, ...] = ()
    places: dict[str, tuple[BlockPartError, ...]] = {}
    not_measured: dict[str, str] = {}
    divergences: tuple[Divergence, ...] = ()


def bisect(chain: Chain, images: Sequence[tuple[str, Pixels]], failing: Mapping[str, float], on_step: Say) -> Bisection:
    """Look into every step, and name the block to blame for those that are out of tolerance.

    Args:
        chain: from `open_chain`.
        images: names and pixels `[1, 3, H, W]`.
        failing: the tolerances of the steps that are out of tolerance.
        on_step: called with what is being done, how much of it is done, and how much there is.
    """
    pixels = [values for _, values in images]
    effects = block_effects(chain, pixels, on_step)
    places: dict[str, tuple[BlockPartError, ...]] = {}
    not_measured: dict[str, str] = {}
    divergences = []
    for comparison in chain.comparisons:
        reason = comparison.not_measured or why_not_located(chain, comparison.step)
        if reason is None:
            on_step(f"looking into the {comparison.step} step")
            found = compare_block_parts(chain, comparison.step, pixels)
            reason = None if found else _nothing_to_see(chain, comparison.step)
        if reason is not None:
            not_measured[comparison.step] = reason
            continue
        places[comparison.step] = found
        if comparison.step in failing:
            divergences.append(find_divergence(chain, comparison.step, found, failing[comparison.step], pixels[0]))
    return Bisection(
        images=tuple(name for name, _ in images),
        effects=effects,
        places=places,
        not_measured=not_measured,
        divergences=tuple(divergences),
    )


def why_not_located(chain: Chain, step: str) -> str | None:
    """Say why a step that was measured cannot be looked into; None where it can be."""
    if step != "engine" or chain.engine is None or chain.engine.manifest.debug_tensors is not None:
        return None
    file = chain.file.engine
    assert file is not None
    return f"{file.name} was built without debug tensors; {how_to_build(chain.file.onnx.name, file.name)}"


def _nothing_to_see(chain: Chain, step: str) -> str:
    if step != "engine" or chain.file.engine is None:
        return "none of the file's tensors can be told to be a block boundary"
    how = how_to_build(chain.file.onnx.name, chain.file.engine.name)
    return f"none of the tensors that the engine handed out has the name of a block boundary; {how}"


def locate(chain: Chain, step: str, tolerance: float, pixels: Pixels) -> Divergence | None:
    """Name the block to blame for one step on one image; None where the step cannot be looked into."""
    if why_not_located(chain, step) is not None:
        return None
    places = compare_block_parts(chain, step, [pixels])
    return find_divergence(chain, step, places, tolerance, pixels) if places else None


# ---------------------------------------------------------------- the approximation, block by block


def block_effects(chain: Chain, images: Sequence[Pixels], on_step: Say) -> tuple[BlockEffect, ...]:
    """Make each FNA block FNA alone, and all but it, and measure the outputs.

    In PyTorch by plans; a grafted file's nodes compute exact attention again instead (`fna.validate.budget.undoing`).
    """
    numbers = _fna_blocks(chain)
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


def _fna_blocks(chain: Chain) -> list[int]:
    if chain.model is not None:
        return [entry.block for entry in chain.metadata.plan.blocks]
    return [node.block for node in list_fna_nodes(chain.proto)]


def _run_with_fna_in(chain: Chain, blocks: Collection[int], images: Sequence[Pixels]) -> list[Arrays]:
    if chain.model is None:
        others = set(_fna_blocks(chain)) - set(blocks)
        run = OnnxRunner(undo_nodes(chain.proto, others), chain.folder, chain.file.onnx.name).run
        return [run(pixels, chain.outputs) for pixels in images]
    plan = chain.metadata.plan
    part = plan.model_copy(update={"blocks": tuple(entry for entry in plan.blocks if entry.block in blocks)})
    with patched(chain.model, part):
        return [run_torch(chain.model, pixels) for pixels in images]


def _output_errors(exact: Sequence[Arrays], actual: Sequence[Arrays], outputs: Sequence[str]) -> dict[str, float]:
    meters = {name: ErrorMeter(name) for name in outputs}
    for reference, given in zip(exact, actual, strict=True):
        for name, meter in meters.items():
            meter.add(reference[name], given[name])
    return {name: meter.result().judged for name, meter in meters.items()}


# ---------------------------------------------------------------- inside the model


def compare_block_parts(chain: Chain, step: str, images: Sequence[Pixels]) -> tuple[BlockPartError, ...]:
    """Measure a step's error at the output of every FNA operator and every block, in the model's order."""
    if chain.reference is not None and step == "export":
        return _compare_nodes(chain, images)
    comparison = next(comparison for comparison in chain.comparisons if comparison.step == step)
    names = _engine_names(chain) if step == "engine" else _part_names(chain)
    reference, actual = _part_runner(chain, comparison.reference, names), _part_runner(chain, comparison.actual, names)
    meters: dict[BlockPart, ErrorMeter] = {}
    for pixels in images:
        expected, given = reference(pixels), actual(pixels)
        for part in names:
            if part in expected and part in given and expected[part].shape == given[part].shape:
                meters.setdefault(part, ErrorMeter(str(part))).add(expected[part], given[part])
    return tuple(
        BlockPartError(block=part.block, part=part.part, tensor=names[part], relative_l2=meter.result().judged)
        for part, meter in meters.items()
    )


def _compare_nodes(chain: Chain, images: Sequence[Pixels]) -> tuple[BlockPartError, ...]:
    """A grafted file's export step: what each node computes of its inputs, and whether those are the original's."""
    names = _part_names(chain)
    probe = NodeProbe(chain.proto, chain.folder, chain.file.onnx.name)
    tensors = {BlockPart(node.block, "fna"): node.output for node in probe.nodes}
    original = undone = None
    if UNDONE in chain.stages:
        tensors |= {BlockPart(node.block, "attention"): names[BlockPart(node.block, "fna")] for node in probe.nodes}
        assert chain.reference is not None
        original = _marked(chain.reference, chain, names)
        undone = _marked(undo_nodes(chain.proto, _fna_blocks(chain), keep_masks=False), chain, names)
    meters = {
        part: ErrorMeter(str(part)) for part in sorted(tensors, key=lambda part: (part.block, part.part == "attention"))
    }
    for pixels in images:
        arrays = probe.run(pixels)
        for node in probe.nodes:
            expected = planned_output(node, arrays, chain.metadata)
            meters[BlockPart(node.block, "fna")].add(expected, arrays[node.output].astype(np.float32))
        if original is not None and undone is not None:
            wanted, given = original(pixels), undone(pixels)
            for part in wanted:
                meters[BlockPart(part.block, "attention")].add(wanted[part], given[part])
    return tuple(
        BlockPartError(block=part.block, part=part.part, tensor=tensors[part], relative_l2=meter.result().judged)
        for part, meter in meters.items()
    )


def _engine_names(chain: Chain) -> dict[BlockPart, str]:
    assert chain.engine is not None
    return {BlockPart(place.block, place.part): place.tensor for place in chain.engine.manifest.places}


def _part_names(chain: Chain) -> dict[BlockPart, str]:
    """The places by their tensors' names, in order, in the deployed file."""
    if chain.model is not None:
        return find_block_parts(chain.proto, chain.model.module)
    assert chain.reference is not None
    return {BlockPart(node.block, "fna"): _first_common(chain, node) for node in list_fna_nodes(chain.proto)}


def _first_common(chain: Chain, node: FnaNode) -> str:
    """The first tensor behind a grafted FNA node that the original has as well: the block's attention, laid out as it was."""
    assert chain.reference is not None
    known = {name for item in chain.reference.graph.node for name in item.output}
    readers = {name: item for item in reversed(chain.proto.graph.node) for name in item.input}
    name = node.output
    while name not in known and name in readers:
        name = readers[name].output[0]
    return name


def _part_runner(chain: Chain, stage: str, names: dict[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    if chain.model is not None and stage in (EXACT, FNA):
        return lambda pixels: dict(_capture(chain, stage == FNA, pixels).arrays)
    if stage == ENGINE:
        return _inspected(chain, names)
    if stage == EXACT:
        assert chain.reference is not None
        return _marked(chain.reference, chain, names)
    if stage == DEPLOYED:
        proto = round_everywhere(chain.proto) if has_low_types(chain.proto) else chain.proto
        return _marked(proto, chain, names)
    if stage == PORTABLE and chain.portable is not None and chain.model is not None:
        return _marked(chain.portable, chain, find_block_parts(chain.portable, chain.model.module))
    return _marked(chain.proto, chain, names)


def _inspected(chain: Chain, names: Mapping[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    engine = chain.engine
    assert engine is not None

    def run(pixels: Pixels) -> PartArrays:
        arrays = inspect_engine(engine, pixels)
        return {part: arrays[name] for part, name in names.items() if name in arrays}

    return run


def _capture(chain: Chain, is_fna: bool, pixels: Pixels) -> Capture:
    assert chain.model is not None
    module, plan = chain.model.module, chain.metadata.plan
    if not is_fna:
        with captured(module) as seen:
            run_torch(chain.model, pixels)
        return seen
    with patched(chain.model, plan), captured(module) as seen:
        run_torch(chain.model, pixels)
    return seen


def _marked(model: ModelProto, chain: Chain, names: Mapping[BlockPart, str]) -> Callable[[Pixels], PartArrays]:
    """Run a model with its block boundaries handed out; onnxruntime still fuses what lies between them."""
    wanted = dict(names)
    runner = OnnxRunner(mark_outputs(model, list(wanted.values())), chain.folder, chain.file.onnx.name)

    def run(pixels: Pixels) -> PartArrays:
        arrays = runner.run(pixels, list(dict.fromkeys(wanted.values())))
        return {part: arrays[name] for part, name in wanted.items()}

    return run


# ---------------------------------------------------------------- blame


def find_divergence(
    chain: Chain, step: str, places: Sequence[BlockPartError], tolerance: float, pixels: Pixels
) -> Divergence:
    """Name the place where the error jumps, up to the first that is out of tolerance; and for FNA operators why.

    The place that is out of tolerance first may only amplify what an earlier one did, so among it and those before it
    the one with the largest growth over the same part of the block before is blamed.
    """
    precision = "fp32" if step in ("approximation", "export") else chain.file.precision
    baseline = _BASELINE.get(precision, 1e-6)
    last: dict[str, float] = {}
    worst: tuple[float, BlockPartError, float] | None = None
    for place in places:
        before = max(last.get(place.part, baseline), baseline)
        error = place.relative_l2 if np.isfinite(place.relative_l2) else float("inf")
        if worst is None or error / before > worst[0]:
            worst = (error / before, place, before)
        last[place.part] = error
        if not error <= tolerance:
            break
    else:
        return Divergence(step=step, block=None)
    assert worst is not None
    _, place, before = worst
    return Divergence(
        step=step,
        block=place.block,
        part=place.part,
        tensor=place.tensor,
        relative_l2=place.relative_l2,
        before=before,
        cause=_find_cause(chain, step, place, pixels),
    )


def _find_cause(chain: Chain, step: str, place: BlockPartError, pixels: Pixels) -> str | None:
    """Say what is wrong with the FNA node to blame."""
    proto = chain.portable if step == "export" and chain.portable is not None else chain.proto
    node = next((node for node in list_fna_nodes(proto) if node.block == place.block), None)
    if node is None:
        return None
    if step == "engine":
        return _engine_cause(chain, node, place)
    if chain.model is None:
        return next(_grafted_causes(chain, step, node, place, pixels), None)
    if step not in ("export", "precision"):
        return None
    if place.part != "fna":
        return "its FNA operator agrees, so its linear layers or norms differ"
    call = next(call for call in _capture(chain, True, pixels).calls if call.block == place.block)
    arrays = NodeProbe(proto, chain.folder, chain.file.onnx.name).run(pixels)
    return next(_causes(node, call, arrays), None)


def _engine_cause(chain: Chain, node: FnaNode, place: BlockPartError) -> str | None:
    """What the block's FNA became in the engine; nothing more can be seen from outside."""
    assert chain.engine is not None
    layer = next((layer for layer in chain.engine.manifest.layers if layer.name == node.name), None)
    if place.part != "fna" or layer is None:
        return None
    how = "the plugin's kernels" if layer.implementation == "plugin" else "TensorRT's own operators"
    return f"node {node.name} runs on {how} in {layer.precision or layer.requested}"


def _grafted_causes(chain: Chain, step: str, node: FnaNode, place: BlockPartError, pixels: Pixels) -> Iterator[str]:
    """Against what graft wrote down about the original, and against exact attention in the original itself."""
    if place.part == "output":
        return
    yield from _setting_causes(
        node, planned_settings(node, chain.metadata), "the file's plan and table of the original say"
    )
    arrays = NodeProbe(chain.proto, chain.folder, chain.file.onnx.name).run(pixels)
    error = _error(expected_output(node, arrays), arrays[node.output].astype(np.float32))
    if not error <= 10 * _SAME:
        yield f"node {node.name} does not return FNA of its inputs (relative L2 error {error:.1e})"
    if step == "precision":
        return
    part = BlockPart(node.block, "fna")
    names = {part: _part_names(chain)[part]}
    assert chain.reference is not None
    wanted = _marked(chain.reference, chain, names)(pixels)[part]
    # everything before this node is the original's, then
    undone = undo_nodes(chain.proto, _fna_blocks(chain), keep_masks=False)
    error = _error(wanted, _marked(undone, chain, names)(pixels)[part])
    if error <= 10 * _SAME:
        return
    for order, text in _ORDERS.items():
        exchanged = _exchange_inputs(undone, node, order)
        if _error(wanted, _marked(exchanged, chain, names)(pixels)[part]) <= 10 * _SAME:
            yield f"node {node.name}: {text}"
    yield (
        f"exact attention on what node {node.name} is given is not the original's (relative L2 error {error:.1e}), so its query, "
        "key or value is another"
    )


def _exchange_inputs(model: ModelProto, node: FnaNode, order: Sequence[str]) -> ModelProto:
    exchanged = ModelProto()
    exchanged.CopyFrom(model)
    target = next(item for item in exchanged.graph.node if item.name == node.name)
    target.input[:3] = [node.inputs[name] for name in order]
    return exchanged


def _setting_causes(node: FnaNode, needed: Mapping[str, float], whose: str) -> Iterator[str]:
    given = {"scale": node.scale, "iterations": node.iterations, "exact_rows": int(node.exact_rows)}
    for name, value in needed.items():
        if abs(given[name] - value) > 1e-6 * abs(value):
            yield f"node {node.name} has {name} {given[name]:g}, but {whose} {value:g}"


def _causes(node: FnaNode, call: NystromCall, arrays: Arrays) -> Iterator[str]:
    needed = {"scale": call.scale, "iterations": call.iterations, "exact_rows": int(call.exact_rows)}
    yield from _setting_causes(node, needed, "the model has")
    own = expected_output(node, arrays)
    out = arrays[node.output]
    if not _error(own, out) <= 10 * _SAME:
        yield f"node {node.name} does not return FNA of its inputs (relative L2 error {_error(own, out):.1e})"
    wanted = call.out.numpy()
    for order, text in _ORDERS.items():
        if _error(wanted, expected_output(node, arrays, order=order)) <= 10 * _SAME:
            yield f"node {node.name}: {text}"
    landmarks = arrays[node.inputs["landmarks"]]
    if landmarks.shape[-1] != call.landmarks.shape[-1] or (landmarks[0] != call.landmarks[0].numpy()).any():
        yield f"node {node.name} has other landmarks than the model"
    if not _same_mask(node, call, arrays):
        yield f"node {node.name} has another key mask than the model"
    errors = {
        name: _error(getattr(call, name).numpy(), arrays[node.inputs[name]]) for name in ("query", "key", "value")
    }
    worst = max(errors, key=lambda name: errors[name])
    yield f"what node {node.name} is given differs, most of all its {worst} (relative L2 error {errors[worst]:.1e})"


def _same_mask(node: FnaNode, call: NystromCall, arrays: Arrays) -> bool:
    name = node.inputs.get("key_mask")
    if name is None or call.key_mask is None:
        return (name is None) == (call.key_mask is None)
    given, needed = np.atleast_2d(arrays[name])[0], np.atleast_2d(call.key_mask.numpy())[0]
    return node.sink == call.sink and given.shape == needed.shape and bool((given == needed).all())


def _error(reference: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    if reference.shape != actual.shape:
        return float("inf")
    return measure("", reference, actual).judged
