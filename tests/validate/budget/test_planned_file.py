"""A file made by a plan with everything that depends on its resolution: heads, corrections and a lattice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fna.cli import main
from fna.correction import Correction
from fna.errors import InvalidPlanError
from fna.export.blocks import attention_block
from fna.export.operators.registry import fna_nodes
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.files import load_onnx, save_model
from fna.plan import BlockPlan, Plan
from fna.validate.bench.models import bench
from fna.validate.task.digits_probe import shrink_plan

from ..conftest import TINY_SIDE, Tiny

KERNEL = (0.0, 0.02, 0.0, 0.02, 0.1, 0.02, 0.0, 0.02, 0.0)


def plan_for(side: int) -> Plan:
    patches = side // 14
    blocks = (
        BlockPlan(block=1, landmarks=12, sampler="lattice", heads=(1,),
                  correction=Correction(size=3, kernels=(KERNEL,), gains=(0.9,))),
        BlockPlan(block=2, landmarks=10, sampler="norm-grid", iterations=3),
    )  # fmt: skip
    return Plan(num_blocks=3, blocks=blocks, prefix_tokens=1, resolution=(side, side), patches=(patches, patches))


def test_every_part_of_the_validation_takes_it(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings and the probe on digits run at sizes that the plan was not made for."""
    monkeypatch.setattr("fna.validate.bench.models.QUICK_RUNS", 1)
    model = load_model("validate_tiny:tiny")
    path, record = tmp_path / "planned.onnx", tmp_path / "record.json"
    export_onnx(model, plan_for(TINY_SIDE), TraceOptions(TINY_SIDE, TINY_SIDE), path)
    arguments = ["validate", path, "--images", "images", "--bisect", "--task", "--bench", "quick", "--json", record]
    assert main([*map(str, arguments), "--quiet"]) == 0
    found = json.loads(record.read_text())
    assert {effect["block"] for effect in found["bisection"]["effects"]} == {1, 2}
    assert {row["height"] for row in found["bench"]["rows"]} - {TINY_SIDE}
    assert "digits probe" in {measure["task"] for measure in found["task"]["measures"]}


def mixed_plan() -> Plan:
    return Plan.model_validate({
        "num_blocks": 3,
        "blocks": [{"block": 2, "landmarks": 12}],
        "focal": [{"block": 0, "tile": 4, "hot": 4, "seed": 3}, {"block": 1, "tile": 2, "levels": [[1, 0], [2, 1]], "hot": 0}],
    })  # fmt: skip


def test_focal_and_fna_blocks_are_validated_alike(tiny: Tiny, tmp_path: Path) -> None:
    path, record = tmp_path / "mixed.onnx", tmp_path / "record.json"
    export_onnx(load_model("validate_tiny:tiny"), mixed_plan(), TraceOptions(TINY_SIDE, TINY_SIDE), path)
    assert main(["validate", str(path), "--images", "images", "--bisect", "--json", str(record), "--quiet"]) == 0
    document = json.loads(record.read_text())
    assert {effect["block"] for effect in document["bisection"]["effects"]} == {0, 1, 2}
    export = next(step for step in document["validation"]["steps"] if step["step"] == "export")
    assert all(error["relative_l2"] < 1e-4 for error in export["errors"])


def test_a_broken_focal_node_is_named_with_its_cause(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    export_onnx(load_model("validate_tiny:tiny"), mixed_plan(), TraceOptions(TINY_SIDE, TINY_SIDE), path)
    model = load_onnx(path)
    node = next(node for node in fna_nodes(model.graph) if attention_block(node) == 1)
    node.input[1], node.input[2] = node.input[2], node.input[1]
    save_model(model, path)
    assert main(["validate", str(path), "--images", "images", "--bisect", "--quiet"]) == 1
    assert "its key and value are exchanged" in capsys.readouterr().err


def test_a_bench_at_another_size_than_the_plans_is_refused(tiny: Tiny) -> None:
    with pytest.raises(InvalidPlanError, match="the plan is for 112x112 images, but the resolution is 140x140"):
        bench(load_model("validate_tiny:tiny"), [plan_for(112)], [(140, 140)], backend="torch")


def test_a_plan_for_smaller_images_has_their_own_grid_of_patches() -> None:
    small = shrink_plan(plan_for(518), (5, 10), 37 * 37)
    assert (small.patches, small.resolution) == ((5, 10), None)
    assert {entry.landmarks for entry in small.blocks} == {3}
