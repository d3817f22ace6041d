"""A tiny DINOv2 as FNA files: traced by `fna export`'s code, and exported by TorchScript and grafted."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

SIDE = 56


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter, biases and norms included, a random value, so that a lost one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def make_tiny_dinov2() -> nn.Module:
    """A DINOv2 of four blocks with 4x4 patches at its own 56 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=14)
    return randomise(Dinov2Model(config))


def write_traced(
    path: Path, *, layers: str = "2-3", sampler: str = "grid", dynamic_size: bool = False, opset: int = 18
) -> Path:
    """Traced: norms as operators, a linear layer as MatMul and Add."""
    from fna.export.sources.loading import wrap_model
    from fna.export.trace import TraceOptions, export_onnx
    from fna.plan import uniform_plan

    model = wrap_model("tests:tiny_dinov2", make_tiny_dinov2())
    plan = uniform_plan(4, layers=layers, landmarks=5, sampler=sampler)
    export_onnx(model, plan, TraceOptions(SIDE, SIDE, opset, dynamic_size=dynamic_size), path)
    return path


def write_grafted(path: Path) -> Path:
    """From TorchScript at opset 14: norms written out, many constants and shape computations."""
    from fna.export.surgery.graft import GraftOptions, graft

    class LastHiddenState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_tiny_dinov2()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels).last_hidden_state

    source = path.with_suffix(".source.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            LastHiddenState().eval(),
            (torch.zeros(2, 3, SIDE, SIDE),),
            str(source),
            dynamo=False,
            opset_version=14,
            input_names=["pixels"],
            output_names=["tokens"],
            dynamic_axes={"pixels": {0: "batch"}},
        )
    graft(source, path, GraftOptions(landmarks=5, layers="2-3"))
    return path
