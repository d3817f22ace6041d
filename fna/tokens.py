"""Which tokens of a Vision Transformer are not image patches."""

from __future__ import annotations

from torch import nn

_PREFIX_PARAMETERS = ("cls_token", "class_embedding", "class_token", "distillation_token", "dist_token")
_PREFIX_ROWS = ("register_tokens", "reg_token", "storage_tokens")


def detect_prefix_tokens(vision_model: nn.Module) -> int:
    """Count the class, distillation and register tokens that a model puts before its patch tokens.

    Found by the parameters that hold them: one token each for class and distillation tokens, one per row for registers.

    Args:
        vision_model: the model or the tower whose patch tokens are meant, not a model with further towers.

    Returns:
        0 for models without such tokens (SigLIP), 1 for ViT, CLIP and DINOv2, 2 for distilled DeiT, 5 for DINOv2 with registers
        and DINOv3.
    """
    count = 0
    for name, parameter in vision_model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in _PREFIX_PARAMETERS:
            count += 1
        elif leaf in _PREFIX_ROWS:
            count += parameter.shape[-2]
    return count
