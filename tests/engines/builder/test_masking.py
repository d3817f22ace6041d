"""Files with masked keys, and landmarks that include and exclude tokens, through the builder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.targets import find_targets
from fna.export.sources.loading import wrap_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import BlockPlan, MaskPlan, Plan, TokenRange


def test_tensorrt_rtx_builds_a_file_with_masks_and_guided_landmarks(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx")
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    model = wrap_model("tests:tiny", Dinov2Model(config))
    masks = (MaskPlan(blocks="0-1", tokens="artifact"), MaskPlan(blocks="2-3", tokens="massive", sink=True))
    blocks = tuple(
        BlockPlan(block=1 + i, landmarks=6, sampler=name) for i, name in enumerate(("grid", "norm-grid", "fps"))
    )
    ranges = (TokenRange(blocks="all", tokens="massive"),), (TokenRange(blocks="all", tokens="artifact"),)
    plan = Plan(num_blocks=4, blocks=blocks, masks=masks, landmarks_include=ranges[0], landmarks_exclude=ranges[1])
    path = tmp_path / "masked.onnx"
    export_onnx(model, plan, TraceOptions(56, 56), path)
    manifest = build_engine(
        path, tmp_path / "masked.engine", BuildOptions(targets=find_targets("rtx-ada"), batch=BatchRange(1, 1, 1))
    )
    assert (tmp_path / "masked.engine").stat().st_size > 0
    assert manifest.lowering == "portable"  # it chooses landmarks by a loop after an FNA block
