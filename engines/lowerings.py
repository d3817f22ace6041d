"""Which form of a file each runtime is given: one table, by runtime and version."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from fna.engines.targets import Flavour, Target
from fna.export.operators.registry import OPERATORS, fna_nodes
from fna.export.passes import KERNEL_FORM, Lowering
from fna.plugins.processor_library import find_processor_library

Runtime = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-cpu"]


@dataclass(frozen=True)
class LoweringRule:
    """What a runtime is given from one of its versions on.

    Attributes:
        runtime: TensorRT, TensorRT-RTX, or what runs ONNX files here and behind Triton, on a processor alone or wherever.
        since: the first version, as in `10.14`.
        lowering: where there is no plugin.
        kernels: where the plugin has kernels for all targets; on a processor, where the library of operators can be compiled.
        known: how the entry is known.
    """

    runtime: Runtime
    since: str
    lowering: Lowering
    kernels: Lowering
    known: str


@dataclass(frozen=True)
class ProcessorForm:
    """What onnxruntime is given on this machine's processor: the form of a file, and the library that the form needs, if any."""

    lowering: Lowering
    library: Path | None


# The first rule of a runtime whose version is not above the runtime's own applies.
LOWERING_RULES = (
    LoweringRule(
        "tensorrt-rtx", "1.7", "fused", "fused",
        "built with 1.7.1, without a GPU: its network has one attention layer for each attention of the file",
    ),
    LoweringRule(
        "tensorrt-rtx", "0", "portable", "portable",
        "has no plugin layers (tried); its documentation names the attention operator from 1.7 on; earlier not tried",
    ),
    LoweringRule(
        "tensorrt", "10.14", "fused", "plugin",
        "release notes of 10.14: an attention operator with a fused kernel; not tried, it takes a GPU",
    ),
    LoweringRule(
        "tensorrt", "0", "decomposed", "plugin",
        "no attention operator before 10.14; its documentation (Fused Attention) says what it fuses; not tried, it takes a GPU",
    ),
    LoweringRule(
        "onnxruntime", "0", "onnxruntime", "onnxruntime",
        "timed with 1.32 on a CPU: its own MultiHeadAttention is the fastest form of exact attention at 1370 and 5330 tokens",
    ),
    LoweringRule(
        "onnxruntime-cpu", "0", "onnxruntime-cpu", KERNEL_FORM,
        "timed with 1.32 at 1370 and 5330 tokens: this project's own operator is fastest; without it, focal attention in pieces",
    ),
)  # fmt: skip


def choose_lowering(runtime: Runtime, version: str, targets: Sequence[Target] = ()) -> Lowering:
    """Return which form of a file a runtime is given.

    Args:
        runtime: one of the table's.
        version: its own, as in `10.3.0`.
        targets: devices that are built for; the plugin is taken where it has kernels for all of them.
    """
    rule = find_rule(runtime, version)
    has_kernels = bool(targets) and all(target.lowering == "plugin" for target in targets)
    return rule.kernels if has_kernels else rule.lowering


@cache
def processor_form() -> ProcessorForm:
    """Return what onnxruntime is given on this machine's processor; the first time, its library may be compiled, in seconds."""
    import onnxruntime

    rule, library = find_rule("onnxruntime-cpu", onnxruntime.__version__), find_processor_library()
    return ProcessorForm(rule.lowering if library is None else rule.kernels, library)


def find_rule(runtime: Runtime, version: str) -> LoweringRule:
    """Return the rule for a version of a runtime."""
    return next(
        rule for rule in LOWERING_RULES if rule.runtime == runtime and _numbers(rule.since) <= _numbers(version)
    )


def rules_for(flavours: Mapping[Flavour, str], has_kernels: bool) -> tuple[tuple[Flavour, str, Lowering], ...]:
    """Return (runtime, first version, lowering) for every version of some runtimes that a device may have, newest first.

    Args:
        flavours: the lowest version of each runtime there.
        has_kernels: whether the plugin has kernels for the device, and the file has nodes for them.
    """
    chosen: list[tuple[Flavour, str, Lowering]] = []
    for runtime, lowest in flavours.items():
        oldest = find_rule(runtime, lowest)
        for rule in (rule for rule in LOWERING_RULES if rule.runtime == runtime):
            if _numbers(rule.since) >= _numbers(oldest.since):
                chosen.append((runtime, rule.since, rule.kernels if has_kernels else rule.lowering))
    return tuple(chosen)


def check_fused(model: ModelProto) -> str | None:
    """Return why TensorRT-RTX cannot be given a file in the fused form; None where nothing is known against it.

    Its builder ends the process where a loop follows an FNA block (tried with 1.7.1; a loop before the first one builds).
    """
    loops = {
        (body.name, body.overload) for body in model.functions if any(node.op_type == "Loop" for node in body.node)
    }
    attended = False
    for node in fna_nodes(model.graph):
        if attended and (node.op_type, node.overload) in loops:
            return f"{node.name} ({node.op_type}) chooses landmarks in a loop after an FNA block, on which the builder fails"
        attended = attended or OPERATORS[node.op_type].attends
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
