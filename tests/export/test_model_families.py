"""Every supported family, traced to ONNX and run on onnxruntime beside the patched PyTorch model; docs/models.md shows the result.

`python tests/export/test_model_families.py` writes the tables into docs/models.md.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from model_families import FAMILIES, REFUSED, Family, Refused, build_tiny, sample_pixels

import fna
from fna.errors import ModelSourceError, UnsupportedAttentionError
from fna.export.sources.loading import LoadedModel, wrap_model
from fna.export.trace import TraceOptions, trace_model
from fna.files import save_model
from fna.patching import find_attention_blocks
from fna.plan import uniform_plan
from fna.special_tokens import detect_prefix_tokens

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 1e-5
"""Relative L2; the worst measured on these models is below 3e-6."""


@dataclass(frozen=True)
class Result:
    """What tracing one family and running it gave."""

    model: LoadedModel
    class_name: str
    blocks: tuple[str, ...]
    prefix_tokens: int
    proto: onnx.ModelProto
    errors: dict[str, float]
    effects: dict[str, float]


@functools.cache
def measure(name: str) -> Result:
    """Trace a family with blocks 1 and 2 as FNA (fps on the hidden states) and compare at another batch size than the traced."""
    family = next(family for family in FAMILIES if family.name == name)
    original = build_tiny(family)
    loaded = wrap_model(family.name, original)
    plan = uniform_plan(loaded.num_blocks, layers="1-2", landmarks=12, sampler="fps")
    proto, _ = trace_model(loaded, plan, TraceOptions(family.resolution, family.resolution))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = sample_pixels(batch=3)
    got = session.run(list(loaded.output_names), {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        exact = loaded.module(pixels)
        blocks = fna.patch(loaded.module, plan)
        expected = loaded.module(pixels)
        fna.unpatch(loaded.module)
    return Result(
        model=loaded,
        class_name=type(original).__name__,
        blocks=tuple(block.name for block in find_attention_blocks(original)),
        prefix_tokens=detect_prefix_tokens(blocks[0].tower),
        proto=proto,
        errors=_errors(loaded, got, [tensor.numpy() for tensor in expected]),
        effects=_errors(loaded, got, [tensor.numpy() for tensor in exact]),
    )


def _errors(loaded: LoadedModel, got: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    return {
        name: float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        for name, ours, theirs in zip(loaded.output_names, got, expected, strict=True)
    }


def supported_row(family: Family) -> str:
    """One line of the table of supported models, from what was measured."""
    result = measure(family.name)
    sizes = "any multiple of the patch" if result.model.any_resolution else "its own only"
    agrees = f"< {TOLERANCE:g}" if max(result.errors.values()) < TOLERANCE else f"{max(result.errors.values()):.1g}"
    blocks = re.sub(r"\.0\.", ".*.", result.blocks[0])
    outputs = ", ".join(f"`{name}`" for name in result.model.output_names)
    return f"| {family.name} | `{result.class_name}` | `{blocks}` | {result.prefix_tokens} | {sizes} | {outputs} | {agrees} |"


def refused_row(refused: Refused) -> str:
    """One line of the table of refused models: the error itself."""
    model = refused.build()
    try:
        refusals = [f"block {block.number} ({block.name}): {block.refusal}" for block in find_attention_blocks(model)]
        return f"| {refused.name} | `{type(model).__name__}` | {refusals[0]} |"
    except UnsupportedAttentionError as error:
        return f"| {refused.name} | `{type(model).__name__}` | {error} |"


def make_tables() -> str:
    """Both tables of docs/models.md."""
    return "\n".join(
        [
            "| model | transformers class | FNA blocks | prefix tokens | image sizes | outputs | ONNX against PyTorch |",
            "|---|---|---|---|---|---|---|",
            *(supported_row(family) for family in FAMILIES),
            "",
            "| refused | transformers class | what `fna` says |",
            "|---|---|---|",
            *(refused_row(refused) for refused in REFUSED),
        ]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_traced_file_computes_what_the_patched_model_computes(family: Family, tmp_path: Path) -> None:
    result = measure(family.name)
    assert set(result.errors) == set(family.outputs)
    for name, error in result.errors.items():
        assert error < TOLERANCE, name
    assert min(result.effects.values()) > 1e-2  # or FNA was not in it
    nodes = [node for node in result.proto.graph.node if node.domain == "fna"]
    assert [node.name for node in nodes if node.op_type == "FastNystromAttention"] == [
        "/blocks.1/FastNystromAttention",
        "/blocks.2/FastNystromAttention",
    ]
    assert [node.name for node in nodes if node.op_type == "FarthestPointSampling"] == [
        "/blocks.1/FarthestPointSampling"
    ]
    save_model(result.proto, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_tracing_leaves_the_model_as_it_was(family: Family) -> None:
    result = measure(family.name)
    fresh = wrap_model(family.name, build_tiny(family))
    with torch.no_grad():
        for left, right in zip(result.model.module(sample_pixels()), fresh.module(sample_pixels()), strict=True):
            assert torch.equal(left, right)


def test_siglip2_traces_at_another_size_than_its_own() -> None:
    loaded = wrap_model("SigLIP 2", build_tiny(next(family for family in FAMILIES if family.name == "SigLIP 2 vision")))
    proto, _ = trace_model(loaded, uniform_plan(3, layers="2", landmarks=12), TraceOptions(24, 40))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(7))
    fna.patch(loaded.module, uniform_plan(3, layers="2", landmarks=12))
    with torch.no_grad():
        expected = loaded.module(pixels)
    got = session.run(None, {"pixel_values": pixels.numpy()})
    assert max(_errors(loaded, got, [tensor.numpy() for tensor in expected]).values()) < TOLERANCE
    assert "Resize" not in {node.op_type for node in proto.graph.node}


def test_siglip2_with_open_height_and_width_is_refused_in_one_line() -> None:
    loaded = wrap_model("SigLIP 2", build_tiny(next(family for family in FAMILIES if family.name == "SigLIP 2 vision")))
    with pytest.raises(ModelSourceError, match="height and width cannot be left open") as caught:
        trace_model(loaded, uniform_plan(3, landmarks=12), TraceOptions(32, 32, dynamic_size=True))
    assert "\n" not in str(caught.value)


def test_the_documented_tables_are_what_this_run_gives() -> None:
    assert make_tables() in DOCUMENT.read_text(encoding="utf-8"), (
        "docs/models.md differs from this run; write it anew: PYTHONPATH=tests/support python tests/export/test_model_families.py"
    )


def write_document() -> None:
    """Put the tables of a new run between the marks in docs/models.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split("<!-- tables -->\n")[0], text.split("<!-- end of tables -->")[1]
    DOCUMENT.write_text(f"{before}<!-- tables -->\n{make_tables()}\n<!-- end of tables -->{after}", encoding="utf-8")
    worst = max(error for family in FAMILIES for error in measure(family.name).errors.values())
    print(f"wrote {DOCUMENT}; the largest ONNX error is {worst:.2g} relative L2")


if __name__ == "__main__":
    write_document()
