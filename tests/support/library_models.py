"""Tiny models of other libraries (timm, open_clip, torchvision, vit-pytorch, transformers 4), exported by a process of its own.

These packages want another build of torchvision, or another transformers, than the project's environment holds, so they live in a
folder of their own that only this script's process sees: `python library_models.py FOLDER NAME...` writes `FOLDER/NAME.onnx`.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import surgery_zoo as zoo
import torch
from torch import Tensor, nn

TRANSFORMERS_4 = (
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface_hub==0.36.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "idna==3.20",
)

IMAGE = torch.zeros(2, 3, zoo.IMAGE, zoo.IMAGE)
VIT = {"img_size": zoo.IMAGE, "patch_size": zoo.PATCH, "embed_dim": zoo.DIM, "depth": 2, "num_heads": zoo.HEADS}


class Last(nn.Module):
    """A transformers model that returns its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state


def timm_vit(fused: bool = True, **settings: Any) -> nn.Module:
    import timm.layers
    from timm.models.vision_transformer import VisionTransformer

    timm.layers.set_fused_attn(fused)
    return VisionTransformer(**{**VIT, "num_classes": 5, **settings})


def timm_module(module: str, name: str, **settings: Any) -> nn.Module:
    from importlib import import_module

    return getattr(import_module(f"timm.models.{module}"), name)(**settings)


def open_clip_tower(**settings: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": zoo.IMAGE, "patch_size": zoo.PATCH, "width": zoo.DIM, "layers": 2, "heads": zoo.HEADS}
    return VisionTransformer(**sizes, mlp_ratio=2.0, output_dim=16, **settings)


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(zoo.IMAGE, zoo.PATCH, 2, zoo.HEADS, zoo.DIM, 2 * zoo.DIM, num_classes=5)


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], zoo.DIM, [2], [zoo.HEADS], [4, 4], num_classes=5)


def vit_pytorch(module: str, name: str, **settings: Any) -> nn.Module:
    from importlib import import_module

    sizes = {"image_size": zoo.IMAGE, "patch_size": zoo.PATCH, "dim": zoo.DIM, "heads": zoo.HEADS, "dim_head": zoo.HEAD}
    made = getattr(import_module(f"vit_pytorch.{module}"), name)
    return made(**sizes, depth=2, mlp_dim=2 * zoo.DIM, num_classes=5, **settings)


def transformers_4(model: str, config: str, implementation: str, **settings: Any) -> nn.Module:
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    sizes = {"hidden_size": zoo.DIM, "num_hidden_layers": 2, "num_attention_heads": zoo.HEADS}
    sizes |= {"intermediate_size": 64, "image_size": zoo.IMAGE, "patch_size": zoo.PATCH}
    made = getattr(transformers, config)(**{**sizes, **settings})
    return Last(getattr(transformers, model)._from_config(made, attn_implementation=implementation))


@dataclass(frozen=True)
class Library:
    """One model of a library: its replaced and refused attention blocks, known by construction; `reason` is a pattern."""

    make: Callable[[], nn.Module]
    replaced: int
    refused: int = 0
    reason: str = ""
    exporter: str = "torchscript"
    opset: int = 17
    half: bool = False


def dynamo(make: Callable[[], nn.Module], replaced: int, refused: int = 0, reason: str = "") -> Library:
    return Library(make, replaced, refused, reason, exporter="dynamo", opset=18)


LIBRARIES = {
    "timm_vit_fused": Library(timm_vit, 2),
    "timm_vit_unfused": Library(lambda: timm_vit(fused=False), 2),
    "timm_vit_opset14": Library(lambda: timm_vit(fused=False), 2, opset=14),
    "timm_vit_half": Library(lambda: timm_vit(fused=False), 2, half=True),
    "torchvision_vit_half_dynamo": Library(torchvision_vit, 2, exporter="dynamo", opset=18, half=True),
    "timm_vit_query_key_norm": Library(lambda: timm_vit(qk_norm=True), 2),
    "timm_vit_registers": Library(lambda: timm_vit(reg_tokens=3, no_embed_class=True), 2),
    "timm_vit_layer_scale": dynamo(lambda: timm_vit(init_values=0.5), 2),
    "timm_vit_map_pooling": Library(
        lambda: timm_vit(global_pool="map", class_token=False), 2, 1, "learned query"
    ),
    "timm_deit_distilled": Library(lambda: timm_module("deit", "VisionTransformerDistilled", **VIT), 2),
    "timm_eva_rotary_dynamo": dynamo(lambda: timm_module("eva", "Eva", **VIT, use_rot_pos_emb=True), 2),
    "timm_beit": Library(lambda: timm_module("beit", "Beit", **VIT, use_rel_pos_bias=True), 0, 2, "position bias"),
    "timm_swin": Library(
        lambda: timm_module(
            "swin_transformer", "SwinTransformer", img_size=32, patch_size=2, window_size=4, embed_dim=32,
            depths=(2,), num_heads=(4,), num_classes=5,
        ), 0, 2, "position bias",
    ),
    "timm_xcit": Library(
        lambda: timm_module("xcit", "Xcit", **VIT, cls_attn_layers=1, num_classes=5), 0, 3, "per head|queries but",
    ),
    "timm_cait": Library(
        lambda: timm_module("cait", "Cait", **VIT, depth_token_only=1, num_classes=5), 0, 3, "head mixing before|queries but",
    ),
    "timm_pvt": Library(
        lambda: timm_module(
            "pvt_v2", "PyramidVisionTransformerV2", depths=(1, 1), embed_dims=(32, 32), num_heads=(2, 4), sr_ratios=(4, 2),
            mlp_ratios=(2, 2), num_classes=5,
        ), 0, 2, "queries but",
    ),
    "open_clip_tower": Library(open_clip_tower, 2),
    "open_clip_tower_attentional_pool": Library(
        lambda: open_clip_tower(attentional_pool=True, attn_pooler_queries=4), 2, 1, "learned query"
    ),
    "torchvision_vit": Library(torchvision_vit, 2),
    "torchvision_swin": Library(torchvision_swin, 0, 2, "position bias"),
    "vit_pytorch_vit": Library(lambda: vit_pytorch("vit", "ViT"), 2),
    "vit_pytorch_simple_dynamo": dynamo(lambda: vit_pytorch("simple_vit", "SimpleViT"), 2),
    "vit_pytorch_deepvit": Library(lambda: vit_pytorch("deepvit", "DeepViT"), 0, 2, "head mixing after"),
    "vit_pytorch_parallel": Library(lambda: vit_pytorch("parallel_vit", "ViT", num_parallel_branches=2), 4),
}  # fmt: skip

TRANSFORMERS_4_MODELS = {
    f"transformers4_{name}_{implementation}_{exporter}": Library(
        lambda model=model, config=config, implementation=implementation, extra=extra: transformers_4(
            model, config, implementation, **extra
        ),
        2,
        refused,
        reason,
        exporter=exporter,
        opset=18 if exporter == "dynamo" else 17,
    )
    for name, model, config, extra, refused, reason, exports in (
        ("vit", "ViTModel", "ViTConfig", {}, 0, "", ("eager torchscript", "sdpa dynamo")),
        ("dinov2", "Dinov2Model", "Dinov2Config", {}, 0, "", ("sdpa torchscript",)),
        ("clip", "CLIPVisionModel", "CLIPVisionConfig", {}, 0, "", ("eager torchscript", "sdpa dynamo")),
        ("siglip", "SiglipVisionModel", "SiglipVisionConfig", {"vision_use_head": False}, 0, "", ("sdpa torchscript",)),
    )
    for implementation, exporter in map(str.split, exports)
}


def export(library: Library, path: Path) -> None:
    """Write one model with random weights, batch left open."""
    model = zoo.randomise(library.make())
    image = IMAGE
    if library.half:
        model, image = model.half(), image.half()
    settings: dict[str, Any] = {
        "input_names": ["x"], "output_names": ["y"], "opset_version": library.opset, "verbose": False,
    }  # fmt: skip
    if library.exporter == "dynamo":
        settings |= {"dynamo": True, "dynamic_shapes": ({0: "batch"},), "external_data": False}
    else:
        settings |= {"dynamo": False, "dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    torch.onnx.export(model, (image,), str(path), **settings)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    warnings.simplefilter("ignore")
    gc.freeze()  # half a million objects of PyTorch, which every collection of a trace would walk
    for name in names:
        library = {**LIBRARIES, **TRANSFORMERS_4_MODELS}[name]
        try:
            export(library, folder / f"{name}.onnx")
        except Exception as error:
            (folder / f"{name}.error").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
