"""Tiny models of other libraries, told apart and carried to onnxruntime: `python other_libraries.py OUT.json [TASK...]`.

It runs in a process of its own, which sees the libraries: see `library_packages`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from called_models import DIM, HEADS, PATCH, SIDE
from carried_models import carry, describe
from model_families import randomise
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fna
from fna.cli import main
from fna.default_plan import plan_without_photographs
from fna.export.metadata import read_metadata
from fna.export.sources.loading import load_model
from fna.export.sources.model_names import with_weights
from fna.files import load_onnx
from fna.plan import Plan

TIMM = f",img_size={SIDE},patch_size={PATCH},embed_dim={DIM},depth=2,num_heads={HEADS},pretrained=False"
MODELS = {
    "timm ViT": f"timm:vit_tiny_patch16_224{TIMM},num_classes=5",
    "timm DeiT III": f"timm:deit3_small_patch16_224{TIMM},num_classes=5",
    "timm EVA-02": f"timm:eva02_tiny_patch14_224{TIMM},num_classes=5",
    "timm DINOv2 with registers": f"timm:vit_small_patch14_reg4_dinov2{TIMM}",
    "timm DINOv3": f"timm:vit_small_patch16_dinov3{TIMM}",
    "timm SigLIP": f"timm:vit_base_patch16_siglip_224{TIMM}",
    "open_clip ViT": "other_libraries:open_clip_tower",
    "torchvision ViT": "other_libraries:torchvision_vit",
    "timm BEiT": f"timm:beit_base_patch16_224{TIMM}",
    "timm Swin": "timm:swin_tiny_patch4_window7_224,img_size=56,embed_dim=24,depths=(1,1),num_heads=(2,4),pretrained=False",
    "timm SAM": f"timm:samvit_base_patch16{TIMM},window_size=4,global_attn_indexes=(1,)",
}

DINOV2_SIDE = 518
"""The models' own: at another size the two libraries resize the position embedding each in its own way."""


def open_clip_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, DIM, 2, HEADS, mlp_ratio=2.0, output_dim=16)


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, 2, HEADS, DIM, 2 * DIM, num_classes=5)


def _timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' Dinov2Model under timm's names."""
    renamed: dict[str, torch.Tensor] = {}
    simple = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
    }
    inner = {"attention.o_proj": "attn.proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    for name, tensor in state.items():
        for old, new in simple.items():
            if name == old or name.startswith(f"{old}."):
                renamed[new + name.removeprefix(old)] = tensor
        if name.startswith("encoder.layer."):
            number, _, rest = name.removeprefix("encoder.layer.").partition(".")
            for old, new in inner.items():
                rest = rest.replace(old, new)
            if "_proj." not in rest:
                renamed[f"blocks.{number}.{rest}"] = tensor
    for number in range(12):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layer.{number}.attention.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def compare_dinov2() -> dict[str, Any]:
    """The default model's backbone by transformers and, its weights renamed, by timm: plans, layouts, the largest difference."""
    from fna.validate.planning.subject import TorchSubject

    ours = load_model("dinov2-small-saliency")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dinov2.safetensors"
        weights = _timm_names(ours.module.backbone.state_dict())
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path)
        theirs = load_model(with_weights("timm:vit_small_patch14_dinov2", path))
    plans, layouts, tokens = [], [], []
    for model in (ours, theirs):
        layout = TorchSubject(model, DINOV2_SIDE, DINOV2_SIDE).layout
        plan, _ = plan_without_photographs(layout.num_blocks, set(layout.refused), layout.patches, layout.prefix_tokens)
        plans.append(plan.dump_json())
        layouts.append([layout.num_blocks, layout.tokens, layout.heads, layout.head_size, layout.prefix_tokens])
        tokens.append(_tokens(model, plan))
    return {"plans": plans, "layouts": layouts, "difference": float((tokens[0] - tokens[1]).abs().max())}


def _tokens(model: Any, plan: Plan) -> torch.Tensor:
    pixels = torch.randn(1, 3, DINOV2_SIDE, DINOV2_SIDE, generator=torch.Generator().manual_seed(1))
    fna.patch(model.module, plan)
    try:
        with torch.inference_mode():
            return dict(zip(model.output_names, model.module(pixels), strict=True))[model.token_outputs[0]]
    finally:
        fna.unpatch(model.module)


SMALL = "timm:vit_small_patch14_dinov2,img_size=112,embed_dim=32,depth=2,num_heads=2"
"""The default model's class, small."""


def run_commands() -> dict[str, Any]:
    """The commands one after another, from weights in a file to a bundle, at another size than the model's own."""
    codes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name, chdir(name):
        model = load_model(f"{SMALL},pretrained=False").module.model.model
        randomise(model)
        save_file(model.state_dict(), "mine.safetensors")
        Path("photographs").mkdir()
        for number, noise in enumerate(np.random.default_rng(0).integers(0, 255, (2, 60, 80, 3), np.uint8)):
            Image.fromarray(noise).save(f"photographs/{number}.png")
        size, photographs = ["--resolution", "140"], ["--images", "photographs"]
        source = [SMALL, "--weights", "mine.safetensors"]
        tried = ["--samplers", "lattice", "--no-focal", "--no-corrections", "--min-cosine", "0.1", "--cache", "cache"]
        commands = {
            "export": [*source, *size, "-o", "first.onnx", "--layers", "1", "--landmarks", "12"],
            "build": ["first.onnx", "-o", "first.engine", "--target", "rtx-ada", "--optimization-level", "0"],
            "validate": ["first.onnx", *photographs, "--output", "report"],
            "plan": [*source, *size, *photographs, *tried, "-o", "plan.json"],
            "export by plan": [*source, "--plan", "plan.json", "-o", "planned.onnx"],
            "bundle": ["planned.onnx", *photographs, "-o", "bundle", "--target", "t4"],
            "bundle verified": ["bundle", "--verify"],
        }
        for step, arguments in commands.items():
            codes[step] = main([step.split()[0], *arguments, "--quiet"])
        record = json.loads(Path("report/errors.json").read_text())
        engine = json.loads(Path("first.engine.json").read_text())
        bundle = json.loads(Path("bundle/manifest.json").read_text())
        planned = read_metadata(load_onnx(Path("planned.onnx")), "planned.onnx")
        return {
            "codes": codes,
            "source": f"{SMALL},weights={Path('mine.safetensors').resolve()}",
            "blocks": [node.name for node in load_onnx(Path("first.onnx")).graph.node if node.domain == "fna"],
            "planned": planned.model_dump(mode="json", exclude_none=True),
            "plan": json.loads(Path("plan.json").read_text()),
            "sources": [record["validation"]["metadata"]["source"], bundle["metadata"]["source"], planned.source],
            "engine": engine,
            "errors": {
                step["step"]: max(error["relative_l2"] for error in step["errors"])
                for step in record["validation"]["steps"]
            },
        }


TASKS: dict[str, Callable[[], Any]] = {
    **{f"find {title}": lambda name=name: describe(name) for title, name in MODELS.items()},
    **{f"carry {title}": lambda name=name: carry(name) for title, name in MODELS.items()},
    "dinov2": compare_dinov2,
    "commands": run_commands,
    "unknown": lambda: describe("timm:no_such_model,pretrained=False"),
    "argument": lambda: describe("timm:vit_tiny_patch16_224,pretrained=False,colour=7"),
    "tag": lambda: describe("open_clip:ViT-B-16"),
}


def run_tasks() -> None:
    """Run those that are named, or all."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for name in sys.argv[2:] or TASKS:
        try:
            results[name] = TASKS[name]()
        except Exception as error:  # told by the test that reads it
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_tasks()
