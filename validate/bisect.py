"""Which block is to blame: for the approximation by making blocks FNA one by one, for later steps by looking inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from fna.plan import Plan
from fna.validate.chain import DEPLOYED, EXACT, FNA, PORTABLE, Chain, Say
from fna.validate.fna_nodes import FnaNode, NodeProbe, expected_output, list_fna_nodes, mark_outputs
from fna.validate.metrics import ErrorMeter, measure
from fna.validate.points import AttentionCall, Capture, Point, captured, find_tensors
from fna.validate.rounding import has_low_types, round_everywhere
from fna.validate.runners import Arrays, OnnxRunner, patched, run_torch

Pixels = NDArray[np.float32]
Places = dict[Point, NDArray[np.float32]]

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


class PlaceError(BaseModel):
    """The error of a step at one place inside the model.

    Attributes:
        block: its number.
        part: `fna`, what the FNA operator returns, or `output`, the hidden states that leave the block.
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
        part: as in `PlaceError`.
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
            f"{self.step}: first divergence in {Point(self.block, self.part or 'output')} (tensor {self.tensor}), relative L2 "
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
    places: dict[str, tuple[PlaceError, ...]] = {}
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
    places: dict[str, tuple[PlaceError, ...]] = {}
    not_measured: dict[str, str] = {}
    divergences = []
    for link in chain.links:
        reason = link.not_measured or _why_not(chain, link.step)
        if reason is not None:
            not_measured[link.step] = reason
            continue
        on_step(f"looking into the {link.step} step")
        places[link.step] = compare_places(chain, link.step, pixels)
        if link.step in failing:
            divergences.append(find_divergence(chain, link.step, places[link.step], failing[link.step], pixels[0]))
    return Bisection(
        images=tuple(name for name, _ in images),
        effects=effects,
        places=places,
        not_measured=not_measured,
        divergences=tuple(divergences),
    )


def _why_not(chain: Chain, step: str) -> str | None:
    if step == "engine":
        return "engines are looked into on their own GPU only: build one with debug tensors (docs/validate.md)"
    if chain.reference is not None and step == "export":
        return "a grafted file's export step is measured node by node already"
    return None


def locate(chain: Chain, step: str, tolerance: float, pixels: Pixels) -> Divergence | None:
    """Name the block to blame for one step on one image; None where the step cannot be looked into."""
    if _why_not(chain, step) is not None:
        return None
    return find_divergence(chain, step, compare_places(chain, step, [pixels]), tolerance, pixels)


# ---------------------------------------------------------------- the approximation, block by block


def block_effects(chain: Chain, images: Sequence[Pixels], on_step: Say) -> tuple[BlockEffect, ...]:
    """Make each FNA block FNA alone, and all but it, and measure the outputs. Needs the PyTorch model."""
    if chain.model is None:
        return ()
    plan = chain.metadata.plan
    plans: dict[tuple[str, int], Plan] = {}
    for entry in plan.blocks:
        others = tuple(other for other in plan.blocks if other.block != entry.block)
        plans["alone", entry.block] = plan.model_copy(update={"blocks": (entry,)})
        plans["all_but", entry.block] = plan.model_copy(update={"blocks": others})
    plans["everything", -1] = plan
    exact = [run_torch(chain.model, pixels) for pixels in images]
    errors: dict[tuple[str, int], dict[str, float]] = {}
    for index, (key, chosen) in enumerate(plans.items()):
        on_step(f"FNA in {'block' if key[0] == 'alone' else 'all blocks but'} {key[1]}", index, len(plans))
        with patched(chain.model, chosen):
            errors[key] = _output_errors(exact, [run_torch(chain.model, pixels) for pixels in images])
    return tuple(
        BlockEffect(
            block=entry.block,
            output=output,
            alone=errors["alone", entry.block][output],
            all_but=errors["all_but", entry.block][output],
            everything=errors["everything", -1][output],
        )
        for entry in plan.blocks
        for output in chain.outputs
    )


def _output_errors(exact: Sequence[Arrays], actual: Sequence[Arrays]) -> dict[str, float]:
    meters: dict[str, ErrorMeter] = {}
    for reference, given in zip(exact, actual, strict=True):
        for name, array in reference.items():
            meters.setdefault(name, ErrorMeter(name)).add(array, given[name])
    return {name: meter.result().relative_l2 for name, meter in meters.items()}


# ---------------------------------------------------------------- inside the model


def compare_places(chain: Chain, step: str, images: Sequence[Pixels]) -> tuple[PlaceError, ...]:
    """Measure a step's error at the output of every FNA operator and every block, in the model's order."""
    link = next(link for link in chain.links if link.step == step)
    names = _place_names(chain)
    reference, actual = _place_runner(chain, link.reference, names), _place_runner(chain, link.actual, names)
    meters: dict[Point, ErrorMeter] = {}
    for pixels in images:
        expected, given = reference(pixels), actual(pixels)
        for point in names:
            if point in expected and point in given and expected[point].shape == given[point].shape:
                meters.setdefault(point, ErrorMeter(str(point))).add(expected[point], given[point])
    return tuple(
        PlaceError(block=point.block, part=point.part, tensor=names[point], relative_l2=meter.result().relative_l2)
        for point, meter in meters.items()
    )


def _place_names(chain: Chain) -> dict[Point, str]:
    """The places by their tensors' names, in order, in the deployed file."""
    if chain.model is not None:
        return find_tensors(chain.proto, chain.model.module)
    assert chain.reference is not None
    return {Point(node.block, "fna"): _first_common(chain, node) for node in list_fna_nodes(chain.proto)}


def _first_common(chain: Chain, node: FnaNode) -> str:
    """The first tensor behind a grafted FNA node that the original has as well: the block's attention, laid out as it was."""
    assert chain.reference is not None
    known = {name for item in chain.reference.graph.node for name in item.output}
    readers = {name: item for item in reversed(chain.proto.graph.node) for name in item.input}
    name = node.output
    while name not in known and name in readers:
        name = readers[name].output[0]
    return name


def _place_runner(chain: Chain, stage: str, names: dict[Point, str]) -> Callable[[Pixels], Places]:
    if chain.model is not None and stage in (EXACT, FNA):
        return lambda pixels: dict(_capture(chain, stage == FNA, pixels).arrays)
    if stage == EXACT:
        assert chain.reference is not None
        return _marked(chain.reference, chain, names)
    if stage == DEPLOYED:
        proto = round_everywhere(chain.proto) if has_low_types(chain.proto) else chain.proto
        return _marked(proto, chain, names)
    if stage == PORTABLE and chain.portable is not None and chain.model is not None:
        return _marked(chain.portable, chain, find_tensors(chain.portable, chain.model.module))
    return _marked(chain.proto, chain, names)


def _capture(chain: Chain, is_fna: bool, pixels: Pixels) -> Capture:
    assert chain.model is not None
    module, plan = chain.model.module, chain.metadata.plan
    if not is_fna:
        with captured(module) as seen:
            run_torch(chain.model, pixels)
        return seen
    with patched(chain.model, plan), captured(module, [entry.block for entry in plan.blocks]) as seen:
        run_torch(chain.model, pixels)
    return seen


def _marked(model: ModelProto, chain: Chain, names: Mapping[Point, str]) -> Callable[[Pixels], Places]:
    """Run a model with its block boundaries handed out; onnxruntime still fuses what lies between them."""
    wanted = dict(names)
    runner = OnnxRunner(mark_outputs(model, list(wanted.values())), chain.folder, chain.subject.onnx.name)

    def run(pixels: Pixels) -> Places:
        arrays = runner.run(pixels, list(dict.fromkeys(wanted.values())))
        return {point: arrays[name] for point, name in wanted.items()}

    return run


# ---------------------------------------------------------------- blame


def find_divergence(
    chain: Chain, step: str, places: Sequence[PlaceError], tolerance: float, pixels: Pixels
) -> Divergence:
    """Name the place where the error jumps, up to the first that is out of tolerance; and for FNA operators why.

    The place that is out of tolerance first may only amplify what an earlier one did, so among it and those before it
    the one with the largest growth over the same part of the block before is blamed.
    """
    precision = "fp32" if step in ("approximation", "export") else chain.subject.precision
    baseline = _BASELINE.get(precision, 1e-6)
    last: dict[str, float] = {}
    worst: tuple[float, PlaceError, float] | None = None
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


def _find_cause(chain: Chain, step: str, place: PlaceError, pixels: Pixels) -> str | None:
    """Say what is wrong with the FNA node to blame."""
    proto = chain.portable if step == "export" and chain.portable is not None else chain.proto
    node = next((node for node in list_fna_nodes(proto) if node.block == place.block), None)
    if node is None or chain.model is None or step not in ("export", "precision"):
        return None
    if place.part != "fna":
        return "its FNA operator agrees, so its linear layers or norms differ"
    numbers = [entry.block for entry in chain.metadata.plan.blocks]
    call = _capture(chain, True, pixels).calls[numbers.index(place.block)]
    arrays = NodeProbe(proto, chain.folder, chain.subject.onnx.name).run(pixels)
    return next(_causes(node, call, arrays), None)


def _causes(node: FnaNode, call: AttentionCall, arrays: Arrays) -> Iterator[str]:
    for name, given, needed in (
        ("scale", node.scale, call.scale),
        ("iterations", node.iterations, call.iterations),
        ("exact_rows", int(node.exact_rows), int(call.exact_rows)),
    ):
        if abs(given - needed) > 1e-6 * abs(needed):
            yield f"node {node.name} has {name} {given:g}, but the model has {needed:g}"
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
    errors = {
        name: _error(getattr(call, name).numpy(), arrays[node.inputs[name]]) for name in ("query", "key", "value")
    }
    worst = max(errors, key=lambda name: errors[name])
    yield f"what node {node.name} is given differs, most of all its {worst} (relative L2 error {errors[worst]:.1e})"


def _error(reference: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    if reference.shape != actual.shape:
        return float("inf")
    return measure("", reference, actual).relative_l2
