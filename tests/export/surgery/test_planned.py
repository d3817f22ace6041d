"""Plans that name heads, lattices and corrections, in surgery: proven like everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from fna.chebyshev import ChebyshevSteps
from fna.cli import main
from fna.correction import Correction
from fna.errors import InvalidPlanError
from fna.export.metadata import read_metadata
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION, core_of
from fna.export.operators.registry import fna_nodes, node_attributes
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel, wrap_model
from fna.export.surgery.graft import GraftOptions, graft, inspect_file
from fna.export.surgery.graph.files import import_model
from fna.export.surgery.graph.shapes import infer_point
from fna.export.surgery.graph.view import GraphView
from fna.export.trace import TraceOptions, trace_model
from fna.files import load_onnx, save_model
from fna.patching import patch, unpatch
from fna.plan import BlockPlan, FocalBlockPlan, Plan, uniform_plan


def correction(heads: int) -> Correction:
    generator = torch.Generator().manual_seed(heads)
    kernels = (torch.randn(heads, 9, generator=generator) / 5).tolist()
    return Correction(size=3, kernels=tuple(map(tuple, kernels)), gains=tuple([0.7] * heads))


PLANS = {
    "some heads, corrected": BlockPlan(block=1, landmarks=5, heads=(0, 2), correction=correction(2)),
    "neighbouring heads": BlockPlan(block=1, landmarks=5, heads=(1, 2), iterations=3),
    "all heads, corrected": BlockPlan(block=1, landmarks=6, sampler="lattice", correction=correction(4)),
    "landmarks of the image": BlockPlan(block=1, landmarks=5, sampler="norm-grid", correction=correction(4)),
    "focal": FocalBlockPlan(block=1, tile=2, levels=((1, 0), (2, 1)), hot=3, seed=9),
}


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return wrap_model("tests:tiny", model)


@pytest.fixture(scope="module")
def dense(source: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planned") / "dense.onnx"
    model, _ = trace_model(source, uniform_plan(3, layers="none"), TraceOptions(56, 84))
    save_model(model, path)
    return path


@pytest.mark.parametrize("entry", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("method", ["weighted", "published"])
def test_a_grafted_plan_computes_what_the_patched_model_computes(
    source: LoadedModel, dense: Path, entry: BlockPlan | FocalBlockPlan, method: str, tmp_path: Path
) -> None:
    blocks = {"focal" if isinstance(entry, FocalBlockPlan) else "blocks": (entry,)}
    plan = Plan(num_blocks=3, **blocks, method=method, prefix_tokens=1, patches=(4, 6))
    output = tmp_path / "planned.onnx"
    result = graft(dense, output, GraftOptions(plan=plan))
    assert result.replaced == 1
    named = [row.reason for row in inspect_file(output, {}) if row.family == "focal"]
    assert named == ["it is focal attention already"] * isinstance(entry, FocalBlockPlan)
    assert result.proof is not None
    assert not result.proof.failed
    pixels = torch.randn(2, 3, 56, 84)
    session = onnxruntime.InferenceSession(str(output))
    given = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    inlined = onnxruntime.InferenceSession(lower(load_onnx(output), "portable").SerializeToString())
    portable = inlined.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    patch(source.module, plan)
    try:
        with torch.inference_mode():
            expected = source.module(pixels)
    finally:
        unpatch(source.module)
    for array, same, tensor in zip(given, portable, expected, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(same, tensor.numpy(), rtol=1e-3, atol=1e-4)


def test_traced_and_grafted_files_have_the_plans_core(source: LoadedModel, dense: Path, tmp_path: Path) -> None:
    entry = BlockPlan(block=1, landmarks=9, heads=(0, 2), core="chebyshev", steps=4, low=0.1)
    plan = Plan(num_blocks=3, blocks=(entry, BlockPlan(block=2, landmarks=9)), prefix_tokens=1, patches=(4, 6))
    output = tmp_path / "core.onnx"
    result = graft(dense, output, GraftOptions(plan=plan))
    assert result.proof is not None
    assert not result.proof.failed
    traced, metadata = trace_model(source, plan, TraceOptions(56, 84))
    assert metadata.plan.version == read_metadata(load_onnx(output), "core.onnx").plan.version == 3
    assert [row.reason for row in inspect_file(output, {}) if row.family == "FNA"] == [
        "it is FNA already, with 4 Chebyshev steps from 0.1",
        "it is FNA already",
    ]
    pixels = torch.randn(2, 3, 56, 84)
    outputs = {}
    without = entry.model_copy(update={"core": None, "steps": None, "low": None})
    other = plan.model_copy(update={"blocks": (without, plan.blocks[1])})
    for name, chosen in (("chebyshev", plan), ("newton_schulz", other)):
        patch(source.module, chosen)
        try:
            with torch.inference_mode():
                outputs[name] = source.module(pixels)[0].numpy()
        finally:
            unpatch(source.module)
    assert np.abs(outputs["chebyshev"] - outputs["newton_schulz"]).max() > 1e-2
    for model in (load_onnx(output), traced):
        nodes = [node for node in fna_nodes(model.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node)]
        assert [core_of(node_attributes(node)) for node in nodes] == [ChebyshevSteps(4, 0.1), None]
        assert [node_attributes(node)["plugin_version"] for node in nodes] == ["3", "1"]
        for form in (model, lower(model, "portable"), lower(model, "fused")):
            session = onnxruntime.InferenceSession(form.SerializeToString())
            given = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
            np.testing.assert_allclose(given, outputs["chebyshev"], rtol=1e-3, atol=1e-4)


def test_heads_that_a_block_does_not_have_are_named(dense: Path, tmp_path: Path) -> None:
    plan = Plan(num_blocks=3, blocks=(BlockPlan(block=1, landmarks=5, heads=(1, 4)),))
    with pytest.raises(InvalidPlanError, match="head 4 of block 1, but the block has heads 0 to 3"):
        graft(dense, tmp_path / "out.onnx", GraftOptions(plan=plan))


@pytest.mark.parametrize(
    ("focal", "message"),
    [
        (FocalBlockPlan(block=1, tile=2, hot=25), "block 1 cannot be focal attention: hot is 25"),
        (FocalBlockPlan(block=1, tile=7, hot=3), "block 1 cannot be focal attention: tile is 7"),
    ],
)
def test_focal_blocks_that_do_not_fit_the_file_are_named(
    dense: Path, focal: FocalBlockPlan, message: str, tmp_path: Path
) -> None:
    plan = Plan(num_blocks=3, focal=(focal,), prefix_tokens=1, patches=(4, 6))
    with pytest.raises(InvalidPlanError, match=message):
        graft(dense, tmp_path / "out.onnx", GraftOptions(plan=plan))


def test_a_plan_for_another_size_is_refused_by_both(dense: Path, tmp_path: Path) -> None:
    plan = Plan(num_blocks=3, blocks=(BlockPlan(block=1, landmarks=5),), resolution=(518, 518))
    with pytest.raises(InvalidPlanError, match="518x518 images, but the resolution is 56x84"):
        graft(dense, tmp_path / "out.onnx", GraftOptions(plan=plan))
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_takes_the_size_from_the_plan(source: LoadedModel, tmp_path: Path) -> None:
    model, _ = trace_model(source, uniform_plan(3, layers="none"), TraceOptions(56, 56, dynamic_size=True))
    save_model(model, tmp_path / "open.onnx")
    plan = Plan(num_blocks=3, blocks=(PLANS["neighbouring heads"],), prefix_tokens=1, resolution=(56, 84))
    (tmp_path / "plan.json").write_text(plan.dump_json())
    files = [str(tmp_path / name) for name in ("open.onnx", "out.onnx", "plan.json")]
    assert main(["graft", files[0], "-o", files[1], "--plan", files[2], "--quiet"]) == 0
    session = onnxruntime.InferenceSession(files[1], providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[2:] == [56, 84]


@pytest.mark.parametrize("operator", ["FastNystromAttention", "FocalAttention", "MaskedAttention"])
def test_an_operator_of_ours_has_the_shape_of_its_query(operator: str) -> None:
    """A plugin file has no function bodies that would say so."""
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 18, "fna" : 1]>
        g (float[1, 2, 9, 4] query, int32[1, 3] landmarks) => (float[1, 9, 2, 4] out) {{
            attention = fna.{operator} (query, query, query, landmarks)
            out = Transpose <perm = [0, 2, 1, 3]> (attention)
        }}""")
    point = infer_point(GraphView(import_model(model, Path())), {"query": (1, 2, 9, 4), "landmarks": (1, 3)}, 1)
    assert point.shapes["attention"] == (1, 2, 9, 4)
    assert point.shapes["out"] == (1, 9, 2, 4)
