"""What several tests of surgery do with a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import transformers
from torch import nn

from fna.export.surgery.graft import GraftOptions, GraftResult, graft

SETTINGS = GraftOptions(landmarks=3)

Export = Callable[..., Path]
"""Exports a model once per test run: `export(name, make, exporter="torchscript", opset=17, batch="dynamic")`."""


def graft_and_compare(path: Path, tmp_path: Path, options: GraftOptions = SETTINGS) -> GraftResult:
    """Graft a file; what was replaced must be proven, and the result must still run and look like its original."""
    output = tmp_path / "out.onnx"
    result = graft(path, output, options)
    assert result.proof is not None
    assert len(result.proof.block_errors) == result.replaced
    onnx.checker.check_model(str(output), full_check=True)
    before, after = onnx.load(path), onnx.load(output)
    assert [item.name for item in after.graph.output] == [item.name for item in before.graph.output]
    assert sum(node.domain == "fna" for node in after.graph.node) >= result.replaced
    return result


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, object], int, int, int | None]] = {
    # name: model, config, extra settings, replaced, refused, prefix tokens
    "vit": ("ViTModel", "ViTConfig", {}, 2, 0, 1),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2, 0, 2),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}, 2, 0, 1),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 3}, 2, 0, 4),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, 2, 0, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 2, 1, 0),
    "ijepa": ("IJepaModel", "IJepaConfig", {}, 2, 0, 0),
    "dpt": ("DPTModel", "DPTConfig", {"backbone_out_indices": [0, 1]}, 2, 0, 1),
    "yolos": ("YolosModel", "YolosConfig", {"image_size": [32, 32], "num_detection_tokens": 3}, 2, 0, 1),
    "beit": ("BeitModel", "BeitConfig", {"use_relative_position_bias": True}, 0, 2, None),
}


def build_transformers_model(name: str, implementation: str) -> nn.Module:
    model, config, extra, *_ = TRANSFORMERS[name]
    settings = getattr(transformers, config)(**{**SIZES, **extra})
    built = getattr(transformers, model)._from_config(settings, attn_implementation=implementation)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = built

        def forward(self, x):
            output = self.model(x)
            return output.last_hidden_state, output.pooler_output if output.get("pooler_output") is not None else None

    return Plain()
