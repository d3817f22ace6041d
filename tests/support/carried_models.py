"""What is found in a model, and how near its traced file comes to the patched model, as JSON; for the table of docs/models.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnxruntime
import torch
from model_families import randomise

import fna
from fna.block_numbers import format_layers
from fna.errors import FnaError
from fna.export.sources.loading import LoadedModel, load_model
from fna.export.trace import TraceOptions, trace_model
from fna.patching import find_attention_blocks
from fna.plan import BlockPlan, Plan

LANDMARKS = 12


def describe(name: str) -> dict[str, Any]:
    """What is found in a model, without running it by a plan; `{"error": ...}` where it is refused."""
    try:
        return _describe(load_model(name))
    except FnaError as error:
        return {"error": str(error)}


def carry(name: str, batch: int | None = None) -> dict[str, Any]:
    """Have every block that can be FNA be it, trace, and compare on onnxruntime, at another batch size where that is open."""
    loaded = load_model(name)
    found = _describe(loaded)
    randomise(loaded.module)
    plan = make_plan(loaded)
    proto, _ = trace_model(loaded, plan, TraceOptions(*loaded.native_size, batch=batch))
    shape = loaded.input_shape(*loaded.native_size)
    pixels = torch.randn(batch or 3, *shape, generator=torch.Generator().manual_seed(7))
    got = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        exact = [tensor.numpy() for tensor in loaded.module(pixels)]
        fna.patch(loaded.module, plan)
        expected = [tensor.numpy() for tensor in loaded.module(pixels)]
        fna.unpatch(loaded.module)
    nodes = [node.name for node in proto.graph.node if node.domain == "fna"]
    found |= {"nodes": nodes, "error": _largest(got, expected), "effect": _largest(got, exact)}
    return found


def make_plan(loaded: LoadedModel) -> Plan:
    """FNA in every block that can be it; landmarks from the tokens where they are those of one image."""
    blocks = [block for block in find_attention_blocks(loaded.module) if block.refusal is None]
    one = all(block.frames == 1 for block in blocks) and not loaded.towers
    planned = tuple(
        BlockPlan(block=block.number, landmarks=LANDMARKS, sampler="fps" if one else "grid") for block in blocks
    )
    return Plan(num_blocks=loaded.num_blocks, towers=loaded.towers, blocks=planned)


def table_row(title: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "class" not in found:
        return f"| {title} | | 0 | none | {found['error']} | | |"
    refused = "; ".join(f"{numbers}: {reason}" for reason, numbers in found["refused"].items())
    error = found.get("error")
    agrees = "" if error is None else f"< {10.0 ** max(-5, math.ceil(math.log10(error))):g}"
    towers = "".join(f", {name} {numbers}" for name, numbers in found["towers"].items())
    return (
        f"| {title} | `{found['class']}`, `{found['first']}` | {found['blocks']}{towers} | {found['replaced']} | {refused} | "
        f"{found['prefix']} | {agrees} |"
    )


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    blocks = find_attention_blocks(loaded.module)
    inner: Any = loaded.module.model
    path = "model."
    if type(inner).__name__ == "FeatureModel":
        inner, path = inner.model, "model.model."
    refused: dict[str, list[int]] = {}
    for block in blocks:
        if block.refusal is not None:
            refused.setdefault(block.refusal, []).append(block.number)
    return {
        "class": type(inner).__name__,
        "first": blocks[0].name.removeprefix(path),
        "blocks": len(blocks),
        "replaced": format_layers(block.number for block in blocks if block.refusal is None),
        "refused": {reason: format_layers(numbers) for reason, numbers in refused.items()},
        "towers": loaded.towers,
        "prefix": blocks[0].prefix_tokens,
        "preprocessing": [loaded.preprocessing.mean, loaded.preprocessing.resize],
    }


def _largest(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Relative L2, of the output where it is largest."""
    return max(
        float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)) for ours, theirs in zip(left, right, strict=True)
    )
