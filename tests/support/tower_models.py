"""Tiny random-weight models of several towers, of joined windows and of several images, for the tests and docs/models.md."""

from __future__ import annotations

import transformers
from torch import nn

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = 64


def depth_pro() -> nn.Module:
    """Three encoders of one image: of its patches at two scales, of the whole, and of its field of view."""
    encoder = {
        **VISION,
        "num_hidden_layers": 1,
        "mlp_ratio": 2,
        "model_type": "dinov2",
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.DepthProConfig(
        patch_size=32,
        fusion_hidden_size=16,
        intermediate_hook_ids=[0],
        intermediate_feature_dims=[16],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[16, 16],
        image_model_config=encoder,
        patch_model_config=encoder,
        fov_model_config=encoder,
        use_fov_model=True,
        num_fov_head_layers=0,
    )
    return transformers.DepthProForDepthEstimation(config)


def rf_detr_config() -> transformers.RfDetrDinov2Config:
    """Two blocks, of which the second joins the windows of the first."""
    return transformers.RfDetrDinov2Config(
        **VISION,
        mlp_ratio=2,
        image_size=IMAGE,
        patch_size=8,
        num_windows=2,
        window_block_indexes=[0],
        out_indices=[1, 2],
    )


def rf_detr_backbone() -> nn.Module:
    """RF-DETR's DINOv2."""
    return transformers.RfDetrDinov2Backbone(rf_detr_config())


def rf_detr() -> nn.Module:
    """A DINOv2 whose second block joins the windows of the first, and a decoder of object queries."""
    config = transformers.RfDetrConfig(
        backbone_config=rf_detr_config(),
        d_model=32,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        num_queries=20,
        group_detr=1,
        num_labels=3,
        intermediate_size=32,
    )
    return transformers.RfDetrForObjectDetection(config)


def eomt() -> nn.Module:
    """A segmenter whose last blocks take its queries among the patches."""
    config = transformers.EomtConfig(
        **VISION, mlp_ratio=2, image_size=IMAGE, patch_size=8, num_blocks=1, num_queries=6, num_upscale_blocks=1
    )
    return transformers.EomtForUniversalSegmentation(config)


def vitpose() -> nn.Module:
    """A ViT and a head for poses."""
    backbone = transformers.VitPoseBackboneConfig(
        **VISION, mlp_ratio=2, image_size=[IMAGE, IMAGE], patch_size=[8, 8], out_indices=[2]
    )
    return transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))


def sam3() -> nn.Module:
    """SAM 3's image encoder: windows, and global attention now and then."""
    config = transformers.Sam3ViTConfig(
        **VISION,
        intermediate_size=64,
        image_size=IMAGE,
        pretrain_image_size=IMAGE,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
    )
    return transformers.Sam3ViTModel(config)
