"""Everything that one call of `fna validate` found, as one document: the JSON file, and what the report shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fna.errors import InvalidArgumentError
from fna.export.passes.layer_costs import LayerCost
from fna.machine import describe_machine, tool_versions
from fna.plugins.ptx.emulated_plugin import emulated_plugin
from fna.validate.bench.models import bench_quickly, read_bench
from fna.validate.blame.bisect import Bisection, Divergence, bisect, locate, why_not_located
from fna.validate.blame.linear_layers import describe_linear_layers, measure_linear_layers
from fna.validate.budget.chain import Chain, Say, open_chain, open_validated_file
from fna.validate.budget.measure import Outputs, Validation, last_stage, measure_chain
from fna.validate.photographs import Photographs
from fna.validate.task.measure import measure_tasks
from fna.validate.task.results import TaskResult

BISECT_IMAGES = 1
"""Photographs that `--bisect` looks at: each costs two runs per FNA block."""


@dataclass(frozen=True)
class Extras:
    """What to measure beside the error budget.

    Attributes:
        bisect: every block, and places inside the model.
        task: retrieval, classification, segmentation, saliency.
        bench: a JSON file of `fna bench`, `quick` to measure now, or None.
        command: the command line, for the record.
        emulate_plugin: a step with the plugin library in the PTX machine.
    """

    bisect: bool = False
    task: bool = False
    bench: str | None = None
    command: str = ""
    emulate_plugin: bool = False


class Document(BaseModel):
    """What was found.

    Attributes:
        version: of this format.
        command: that reproduces it.
        date: when it was run, UTC.
        machine: what it was run on.
        versions: of the packages that took part.
        image_source: where the images come from.
        validation: the error budget.
        bisection: of `--bisect`.
        linear_layers: of a file in 8 bits, the costliest first.
        divergences: the block to blame for each step that is out of tolerance.
        not_located: why that is not known, by step.
        task: of `--task`.
        bench: of `--bench`, as `fna bench` writes it.
    """

    model_config = ConfigDict(frozen=True)

    version: int = 1
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    image_source: str
    validation: Validation
    bisection: Bisection | None = None
    linear_layers: tuple[LayerCost, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    not_located: dict[str, str] = {}
    task: TaskResult | None = None
    bench: dict[str, Any] | None = None

    def failures(self) -> list[str]:
        """Say what is out of tolerance, and which block is to blame where that was found."""
        lines = self.validation.failures()
        if not lines:
            return []
        blame = [divergence.describe() for divergence in self.divergences]
        return lines + blame + [f"{step}: which block is not known: {why}" for step, why in self.not_located.items()]

    def summary(self) -> list[str]:
        """What the extras found, a line each."""
        lines = []
        if self.bisection is not None and self.bisection.effects:
            first = self.bisection.effects[0].output
            effects = [effect for effect in self.bisection.effects if effect.output == first]
            worst = max(effects, key=lambda effect: effect.alone)
            gain = min(effects, key=lambda effect: effect.all_but)
            lines.append(
                f"approximation by block, output {first}: block {worst.block} costs most alone ({worst.alone:.2e}); making block "
                f"{gain.block} exact gains most ({gain.everything:.2e} to {gain.all_but:.2e})"
            )
        if self.bisection is not None:
            measured = {step.step for step in self.validation.steps if step.not_measured is None}
            lines += [
                f"not looked into: {step}: {why}"
                for step, why in self.bisection.not_measured.items()
                if step in measured and step not in self.not_located
            ]
        lines += describe_linear_layers(self.linear_layers)
        if self.task is not None:
            lines += [
                f"{measure.task}: {measure.measure} {measure.value:.4f} ({measure.detail})"
                for measure in self.task.measures
            ]
            lines += [f"not measured: {line}" for line in self.task.skipped]
        return lines

    def dump_json(self) -> str:
        """Return the document as JSON, lists of numbers on one line each."""
        return dump_compactly(json.loads(self.model_dump_json()))


def dump_compactly(data: Any) -> str:
    """Return JSON for people: indented, but lists of numbers on one line each."""
    text = json.dumps(data, indent=2)
    return re.sub(r"\[\s+((?:[-\d.e+nul]+,\s+)*[-\d.e+nul]+)\s+\]", _joined, text) + "\n"


def _joined(match: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"


def make_document(
    file: Path,
    photographs: Photographs,
    tolerances: Mapping[str, float],
    resolution: tuple[int, int] | None,
    original: Path | None,
    extras: Extras,
    on_step: Say,
) -> tuple[Document, Outputs]:
    """Measure everything that was asked for.

    Raises:
        InputFileError, ModelSourceError: see `fna.validate.budget.measure.validate_file`.
    """
    bench_file = None if extras.bench in (None, "quick") else read_bench(Path(str(extras.bench)))
    with ExitStack() as stack:
        emulation = stack.enter_context(emulated_plugin()) if extras.emulate_plugin else None
        chain = open_chain(open_validated_file(file, original), resolution, on_step, emulation)
        return _measure_document(chain, bench_file, photographs, tolerances, extras, on_step)


def _measure_document(
    chain: Chain,
    bench_file: dict[str, Any] | None,
    photographs: Photographs,
    tolerances: Mapping[str, float],
    extras: Extras,
    on_step: Say,
) -> tuple[Document, Outputs]:
    if extras.bench == "quick" and chain.model is None:
        raise InvalidArgumentError(
            "--bench quick times the PyTorch model, which a grafted file has not; give a JSON file"
        )
    validation, outputs = measure_chain(
        chain, photographs.images, skipped=photographs.skipped, tolerances=tolerances, on_step=on_step
    )
    bisection, divergences, not_located = _find_blame(chain, validation, photographs, extras, on_step)
    first = [
        chain.metadata.preprocessing.apply(image, chain.height, chain.width)[None]
        for _, image in photographs.images[:BISECT_IMAGES]
    ]
    document = Document(
        command=extras.command,
        date=_today(),
        machine=describe_machine(),
        versions=tool_versions(
            "torch", "transformers", "onnx", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "numpy"
        ),
        image_source=photographs.source,
        validation=validation,
        bisection=bisection,
        linear_layers=measure_linear_layers(chain, first, on_step),
        divergences=divergences,
        not_located=not_located,
        task=measure_tasks(chain, last_stage(chain), photographs, outputs, on_step) if extras.task else None,
        bench=_bench_now(chain, on_step) if extras.bench == "quick" else bench_file,
    )
    return document, outputs


def _find_blame(
    chain: Chain, validation: Validation, photographs: Photographs, extras: Extras, on_step: Say
) -> tuple[Bisection | None, tuple[Divergence, ...], dict[str, str]]:
    failing = {step.step: step.tolerance or 0.0 for step in validation.steps if step.failures()}
    names = [name for name, _ in photographs.images]
    reasons = {step: why_not_located(chain, step) for step in failing}
    not_located = {step: reason for step, reason in reasons.items() if reason is not None}

    def pixels(index: int) -> Any:
        return chain.metadata.preprocessing.apply(photographs.images[index][1], chain.height, chain.width)[None]

    if extras.bisect:
        images = [(names[index], pixels(index)) for index in range(min(BISECT_IMAGES, len(names)))]
        bisection = bisect(chain, images, failing, on_step)
        return bisection, bisection.divergences, not_located
    divergences = []
    for step in validation.steps:
        if step.step in failing and step.step != "approximation":
            on_step(f"looking for the block to blame for the {step.step} error")
            worst = next(error.worst_item for error in step.errors)
            divergence = locate(chain, step.step, failing[step.step], pixels(worst))
            divergences += [divergence] if divergence is not None else []
    return None, tuple(divergences), not_located


def _bench_now(chain: Chain, on_step: Say) -> dict[str, Any]:
    assert chain.model is not None
    return bench_quickly(chain.model, chain.metadata.plan, (chain.height, chain.width), on_step)


def _today() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
