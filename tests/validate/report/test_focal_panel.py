"""Focal blocks in the report: the keys of one tile on the photograph, and the table of what each block is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fna.cli import main
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.focal_keys import focal_keys
from fna.plan import FocalBlockPlan, Plan
from fna.validate.report.focal_panel import FAR, NEAR, draw_focal_keys


def test_near_keys_and_sampled_keys_stand_where_the_lists_have_them() -> None:
    block = FocalBlockPlan(block=0, tile=2, levels=((1, 0), (2, 2)), hot=0, seed=3)
    picture = np.asarray(draw_focal_keys(Image.new("RGB", (320, 320)), block, (8, 8), 1))
    lists = focal_keys((8, 8), 1, 2, block.levels, 3)
    tile = len(lists.queries) // 2
    keys = {int(key) - 1: float(bias) for key, bias in zip(lists.keys[tile], lists.bias[tile], strict=True) if key}
    assert {bias > 0 for bias in keys.values()} == {True, False}
    for patch in range(64):
        colour = tuple(picture[patch // 8 * 40 + 20, patch % 8 * 40 + 20])
        assert colour == ((0, 0, 0) if patch not in keys else FAR if keys[patch] > 0 else NEAR)


def test_the_report_shows_focal_blocks(tmp_path: Path, tiny_files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_files.folder)
    model = load_model("tiny_files:make_tiny_dinov2")
    side = model.native_resolution
    focal = (FocalBlockPlan(block=1, tile=2, levels=((1, 0), (2, 2)), hot=1, seed=7),)
    patches = (side // model.patch_size,) * 2
    plan = Plan(num_blocks=model.num_blocks, focal=focal, prefix_tokens=1, patches=patches)
    export_onnx(model, plan, TraceOptions(side, side), tmp_path / "focal.onnx")
    report = tmp_path / "out" / "report.html"
    arguments = [
        tmp_path / "focal.onnx",
        "--images",
        "images",
        "--report",
        report,
        "--output",
        tmp_path / "out",
        "--quiet",
    ]
    assert main(["validate", *map(str, arguments)]) == 0
    page = report.read_text(encoding="utf-8")
    assert page.count("keys of one tile of the first focal block") == len(list(Path("images").iterdir()))
    assert "<h3>Focal blocks</h3>" in page
    assert 'data-path="validation.metadata.plan.focal.0.seed" data-format="">7<' in page
