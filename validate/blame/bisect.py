"""Which block is to blame: for the approximation by making blocks FNA one by one, for later steps by looking inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from fna.engines.look_inside.debug_tensors import how_to_build
from fna.validate.blame.causes import find_cause
from fna.validate.blame.effects import BlockEffect, Pixels, block_effects
from fna.validate.blame.inside import BlockPartError, compare_block_parts
from fna.validate.budget.block_parts import BlockPart
from fna.validate.budget.chain import Chain, Say

_BASELINE = {"fp32": 1e-6, "fp16": 5e-4, "bf16": 4e-3, "int8": 1e-2, "fp8": 1e-2, "int8+fp8": 1e-2}
"""Errors as small as this are rounding and no sign of anything; growth is counted from here."""


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
            errors = compare_block_parts(chain, comparison.step, pixels)
            reason = None if errors else _nothing_to_see(chain, comparison.step)
        if reason is not None:
            not_measured[comparison.step] = reason
            continue
        places[comparison.step] = errors
        if comparison.step in failing:
            divergences.append(find_divergence(chain, comparison.step, errors, failing[comparison.step], pixels[0]))
    return Bisection(
        images=tuple(name for name, _ in images),
        effects=effects,
        places=places,
        not_measured=not_measured,
        divergences=tuple(divergences),
    )


def why_not_located(chain: Chain, step: str) -> str | None:
    """Say why a step that was measured cannot be looked into; None where it can be."""
    if step == "processor":
        return "the file with this processor's kernels hands out its outputs only; FNA_INSTRUCTIONS=none runs it without them"
    if step == "plugin":
        return "the emulated file hands out its outputs only; its kernels are checked one by one: python -m fna.plugins.ptx check"
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
        cause=find_cause(chain, step, place, pixels),
    )
