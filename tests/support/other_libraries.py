"""Tiny models of other libraries and of own code, carried from their names to onnxruntime; `python other_libraries.py OUT.json`.

It runs in a process of its own, which sees the libraries: see `library_packages`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from called_models import DIM, HEADS, PATCH, SIDE, EncoderViT
from library_packages import define_torchvision_operators
from model_families import randomise
from torch import nn

import fna
from fna.default_plan import plan_without_photographs
from fna.errors import FnaError
from fna.export.sources.loading import load_model
from fna.export.sources.model_names import with_weights
from fna.export.trace import TraceOptions, trace_model
from fna.patching import find_attention_blocks
from fna.plan import BlockPlan, Plan

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
    "torch.nn.TransformerEncoder": "other_libraries:encoder",
    "timm BEiT": f"timm:beit_base_patch16_224{TIMM}",
    "timm Swin": "timm:swin_tiny_patch4_window7_224,img_size=56,embed_dim=24,depths=(1,1),num_heads=(2,4),pretrained=False",
    "timm SAM": f"timm:samvit_base_patch16{TIMM},window_size=4,global_attn_indexes=(1,)",
}


def open_clip_tower() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, DIM, 2, HEADS, mlp_ratio=2.0, output_dim=16)


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(SIDE, PATCH, 2, HEADS, DIM, 2 * DIM, num_classes=5)


def encoder() -> nn.Module:
    return EncoderViT()


def measure(name: str) -> dict[str, Any]:
    """Load, trace with the last replaceable block as FNA, and compare at another batch size than the traced."""
    try:
        loaded = load_model(name)
    except FnaError as error:
        return {"error": str(error)}
    blocks = find_attention_blocks(loaded.module)
    randomise(loaded.module)
    last = max(block.number for block in blocks if block.refusal is None)
    plan = Plan(num_blocks=len(blocks), blocks=(BlockPlan(block=last, landmarks=12, sampler="fps"),))
    side = loaded.native_resolution
    proto, _ = trace_model(loaded, plan, TraceOptions(side, side))
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(7))
    got = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"pixel_values": pixels.numpy()})
    fna.patch(loaded.module, plan)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in loaded.module(pixels)]
        fna.unpatch(loaded.module)
        exact = [tensor.numpy() for tensor in loaded.module(pixels)]
    return {
        "class": type(getattr(loaded.module.model, "model", loaded.module.model)).__name__,
        "first": blocks[0].name.removeprefix("model.").removeprefix("model."),
        "blocks": len(blocks),
        "refused": [[block.number, block.refusal] for block in blocks if block.refusal],
        "prefix": blocks[0].prefix_tokens,
        "preprocessing": [loaded.preprocessing.mean, loaded.preprocessing.resize],
        "any_size": loaded.any_resolution,
        "nodes": [node.name for node in proto.graph.node if node.domain == "fna"],
        "error_against_torch": max(map(difference, got, expected)),
        "effect": max(map(difference, got, exact)),
    }


def difference(left: np.ndarray, right: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


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
    """The default model's backbone by transformers and, its weights renamed, by timm."""
    from safetensors.torch import save_file

    from fna.validate.planning.subject import TorchSubject

    ours = load_model("dinov2-small-saliency")
    backbone = ours.module.backbone
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dinov2.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in _timm_names(backbone.state_dict()).items()}, path)
        theirs = load_model(with_weights("timm:vit_small_patch14_dinov2", path))
    pixels = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(1))
    results: dict[str, Any] = {"layouts": [], "plans": [], "differences": {}}
    layouts = [TorchSubject(model, 518, 518).layout for model in (ours, theirs)]
    for layout in layouts:
        plan, _ = plan_without_photographs(layout.num_blocks, set(layout.refused), layout.patches, layout.prefix_tokens)
        results["plans"].append(plan.dump_json())
        results["layouts"].append(
            [layout.num_blocks, layout.tokens, layout.heads, layout.head_size, layout.prefix_tokens]
        )
    for name, chosen in (("exact", None), ("planned", Plan.model_validate_json(results["plans"][0]))):
        tokens = []
        for model in (ours, theirs):
            if chosen is not None:
                fna.patch(model.module, chosen)
            with torch.inference_mode():
                outputs = dict(zip(model.output_names, model.module(pixels), strict=True))
            tokens.append(outputs[model.token_outputs[0]])
        results["differences"][name] = float((tokens[0] - tokens[1]).abs().max())
    return results


def carry_through() -> dict[str, Any]:
    """`fna export` and `fna validate` of a timm model, as a user gives them."""
    from fna.cli import main

    with tempfile.TemporaryDirectory() as folder:
        path, report = f"{folder}/model.onnx", Path(folder) / "report.json"
        name = MODELS["timm DINOv2 with registers"]
        codes = [
            main(["export", name, "-o", path, "--layers", "1", "--landmarks", "12", "--quiet"]),
            main(["validate", path, "--output", folder, "--quiet", "--json", str(report)]),
        ]
        return {"codes": codes, "report": sorted(json.loads(report.read_text())) if report.exists() else []}


TASKS: dict[str, Callable[[], Any]] = {
    **{title: lambda name=name: measure(name) for title, name in MODELS.items()},
    "dinov2": compare_dinov2,
    "carried": carry_through,
    "unknown": lambda: measure("timm:no_such_model,pretrained=False"),
    "argument": lambda: measure("timm:vit_tiny_patch16_224,pretrained=False,colour=7"),
    "tag": lambda: measure("open_clip:ViT-B-16"),
}


def main() -> None:
    warnings.simplefilter("ignore")
    schemas = define_torchvision_operators()
    wanted = sys.argv[2:] or list(TASKS)
    results = {}
    for name in wanted:
        try:
            results[name] = TASKS[name]()
        except Exception as error:  # told by the test that reads it
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
    Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    del schemas


if __name__ == "__main__":
    main()
