"""Tiny random-weight models of every family that `fna` supports, for the tests and for the table in docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "num_hidden_layers": 2, "vocab_size": 99, "max_position_embeddings": 16}
IMAGE = {"image_size": 32, "patch_size": 4}  # 64 patches


@dataclass(frozen=True)
class Family:
    """One supported model.

    Attributes:
        name: as users know it.
        build: makes a tiny instance.
        prefix_tokens: class, distillation and register tokens; known here, detected by `fna`.
        vision: picks the module that takes images.
        any_resolution: whether it takes other sizes than its native one.
        outputs: that the exported file has.
        note: what a user should know.
    """

    name: str
    build: Callable[[], nn.Module]
    prefix_tokens: int
    outputs: tuple[str, ...]
    vision: Callable[[Any], nn.Module] = lambda model: model
    any_resolution: bool = True
    resolution: int = 32
    note: str = ""

    @property
    def num_tokens(self) -> int:
        return 64 + self.prefix_tokens


def build_tiny(family: Family, seed: int = 0) -> nn.Module:
    """Make a family's tiny model, in eval mode, every parameter random: a lost bias or layer scale changes the output."""
    torch.manual_seed(seed)
    model = family.build().eval()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values, those that start as zeros or ones included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and parameter.shape[0] > 1:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.3 + (1.0 if parameter.mean() > 0.5 else 0.0))


def sample_pixels(batch: int = 2, size: int = 32, seed: int = 1) -> Tensor:  # [batch, 3, size, size]
    """Random images."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def siglip2_inputs(pixels: Tensor, patch: int = 4) -> dict[str, Tensor]:
    """Cut images into SigLIP 2's own input: flat patches, channels last in each, and the grid's shape; nothing is padded."""
    batch, channels, height, width = pixels.shape
    grid = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)
    shapes = torch.tensor([[height // patch, width // patch]]).expand(batch, 2)
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}  # type: ignore[dict-item]


def run_vision(family: Family, model: nn.Module, pixels: Tensor) -> Tensor:
    """Run a family's vision part and return its main output."""
    tower = family.vision(model)
    if "SigLIP 2" in family.name:
        output = tower(**siglip2_inputs(pixels))
    else:
        output = tower(pixels)
    return output.predicted_depth if "predicted_depth" in output else output.last_hidden_state


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, **IMAGE))


def _vit_classifier() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **IMAGE, num_labels=5))


def _deit() -> nn.Module:
    return transformers.DeiTModel(transformers.DeiTConfig(**SIZES, **IMAGE))


def _dinov2() -> nn.Module:
    sizes = {**SIZES, "mlp_ratio": 2}
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes, **IMAGE))


def _dinov2_with_registers() -> nn.Module:
    sizes = {**SIZES, "mlp_ratio": 2}
    config = transformers.Dinov2WithRegistersConfig(**sizes, **IMAGE, num_register_tokens=4)
    return transformers.Dinov2WithRegistersModel(config)


def _dinov3() -> nn.Module:
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, **IMAGE, num_register_tokens=4))


def _clip_vision() -> nn.Module:
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **IMAGE))


def _clip_projection() -> nn.Module:
    config = transformers.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16)
    return transformers.CLIPVisionModelWithProjection(config)


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config={**SIZES, **IMAGE}, projection_dim=16)
    return transformers.CLIPModel(config)


def _siglip_vision() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **IMAGE))


def _siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=TEXT, vision_config={**SIZES, **IMAGE})
    return transformers.SiglipModel(config)


def _siglip2_vision() -> nn.Module:
    config = transformers.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=64)
    return transformers.Siglip2VisionModel(config)


def _siglip2() -> nn.Module:
    vision = {**SIZES, "patch_size": 4, "num_patches": 64}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=vision))


def _depth_anything() -> nn.Module:
    backbone = transformers.Dinov2Config(
        **{**SIZES, "num_hidden_layers": 4, "mlp_ratio": 2},
        **IMAGE,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def _llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=98,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


TOKENS = ("last_hidden_state",)
POOLED = ("last_hidden_state", "pooler_output")

FAMILIES: tuple[Family, ...] = (
    Family("ViT", _vit, 1, POOLED),
    Family("ViT, classifier", _vit_classifier, 1, ("logits",), vision=lambda model: model.vit),
    Family("DeiT, distilled", _deit, 2, POOLED),
    Family("DINOv2", _dinov2, 1, POOLED),
    Family("DINOv2 with registers", _dinov2_with_registers, 5, POOLED),
    Family("DINOv3", _dinov3, 5, POOLED),
    Family("CLIP vision", _clip_vision, 1, POOLED),
    Family("CLIP vision with projection", _clip_projection, 1, ("image_embeds", "last_hidden_state")),
    Family("CLIP", _clip, 1, POOLED, vision=lambda model: model.vision_model),
    Family("SigLIP vision", _siglip_vision, 0, POOLED),
    Family("SigLIP", _siglip, 0, POOLED, vision=lambda model: model.vision_model),
    Family("SigLIP 2 vision", _siglip2_vision, 0, POOLED),
    Family("SigLIP 2", _siglip2, 0, POOLED, vision=lambda model: model.vision_model),
    Family("Depth Anything", _depth_anything, 1, ("predicted_depth",)),
    Family("LLaVA", _llava, 1, ("image_features", *POOLED), vision=lambda model: model.model.vision_tower),
)


@dataclass(frozen=True)
class Refused:
    """A model that `fna` refuses, with the words that say why."""

    name: str
    build: Callable[[], nn.Module]
    reason: str


def _beit(**settings: Any) -> nn.Module:
    sizes = {**SIZES, "num_hidden_layers": 2}
    return transformers.BeitModel(transformers.BeitConfig(**sizes, **IMAGE, **settings))


def _swin() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return transformers.SwinModel(transformers.SwinConfig(**IMAGE, **sizes))


def _swin2() -> nn.Module:
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return transformers.Swinv2Model(transformers.Swinv2Config(**IMAGE, **sizes))


def _vitdet() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.VitDetModel(
        transformers.VitDetConfig(**sizes, **IMAGE, window_size=4, window_block_indices=[0, 1])
    )


def _sam_vision() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_channels": 16, "mlp_dim": 64}
    config = transformers.SamVisionConfig(**sizes, **IMAGE, window_size=4, global_attn_indexes=[1])
    return transformers.SamVisionModel(config)


def _data2vec() -> nn.Module:
    config = transformers.Data2VecVisionConfig(**SIZES, **IMAGE, use_relative_position_bias=True)
    return transformers.Data2VecVisionModel(config)


def _llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(**TEXT))


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**TEXT))


def _resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    return transformers.ResNetModel(transformers.ResNetConfig(**sizes))


REFUSED: tuple[Refused, ...] = (
    Refused("BEiT", lambda: _beit(use_relative_position_bias=True), "relative position bias"),
    Refused(
        "BEiT, shared bias", lambda: _beit(use_shared_relative_position_bias=True), "shared relative position bias"
    ),
    Refused("Data2Vec vision", _data2vec, "relative position bias"),
    Refused("Swin", _swin, "windows"),
    Refused("Swin v2", _swin2, "windows"),
    Refused("ViTDet", _vitdet, "windows"),
    Refused("SAM vision", _sam_vision, "windows"),
    Refused("Llama (text)", _llama, "causal"),
    Refused("BERT (text)", _bert, "attention interface"),
    Refused("ResNet", _resnet, "no attention modules"),
)
