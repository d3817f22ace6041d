"""Vision models with plain tensors in and out, as `torch.export` and ONNX need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class VisionOutputs(nn.Module):
    """A vision model with plain tensors in and out, as `torch.export` and ONNX need it."""

    def __init__(
        self,
        model: nn.Module,
        fields: tuple[str, ...],
        arguments: dict[str, Any],
        example_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.example_shape = example_shape  # of one input; see `fna.patching.survey.guess_input`
        self.model = model
        self.fields = fields
        self.arguments = arguments

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> tuple[Tensor, ...]:
        """Run the model and return the chosen fields of its output, feature maps one by one."""
        output = self.model(pixel_values, **self.arguments)
        if isinstance(output, Tensor):
            return (output,)
        tensors: list[Tensor] = []
        for value in [output[name] for name in self.fields] if hasattr(output, "keys") else output:
            tensors.extend(value if isinstance(value, (tuple, list)) else [value])
        return tuple(tensors)


class ProjectedTokens(nn.Module):
    """LLaVA's vision part: the tower, and its tokens projected into the language model's space."""

    def __init__(self, tower: nn.Module, projector: nn.Module, layers: list[int], keep_class_token: bool) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.layers = layers
        self.first = 0 if keep_class_token else 1

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Return the tower's outputs and `image_features` `[B, T, C]`, what LLaVA's language model is given."""
        output = self.tower(pixel_values, output_hidden_states=True, **arguments)
        chosen = [output.hidden_states[layer][:, self.first :] for layer in self.layers]
        result = {"image_features": self.projector(torch.cat(chosen, dim=-1))}
        result.update({name: output[name] for name in ("last_hidden_state", "pooler_output") if name in output})
        return result


class PatchifiedVision(nn.Module):
    """SigLIP 2's vision model (NaFlex) for images of one size: nothing is padded, so nothing is masked.

    The model itself takes flat patches, a padding mask and each image's grid. For a batch of images of one size the grid is
    the same for all, so the position embedding is resized once, by fixed weights.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> dict[str, Tensor]:
        """Cut images into patches (channels last within each) and run the tower's own modules on them."""
        tower: Any = self.tower
        embeddings = tower.embeddings
        patch, side = embeddings.patch_size, embeddings.position_embedding_size
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        grid = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        patches = grid.reshape(batch, rows * columns, patch * patch * channels)
        hidden = embeddings.patch_embedding(patches)
        position = embeddings.position_embedding.weight
        if (rows, columns) != (side, side):
            table = position.reshape(side, side, -1)
            down = antialiased_bilinear(side, rows).to(position)
            across = antialiased_bilinear(side, columns).to(position)
            position = torch.einsum("rs,sto,ct->rco", down, table, across).reshape(rows * columns, -1)
        hidden = tower.encoder(inputs_embeds=hidden + position, attention_mask=None).last_hidden_state
        result = {"last_hidden_state": tower.post_layernorm(hidden)}
        if tower.use_head:
            result["pooler_output"] = tower.head(result["last_hidden_state"], None)
        return result


def antialiased_bilinear(size: int, new_size: int) -> Tensor:  # [new_size, size], fp32
    """Weights by which PyTorch resizes one axis with `mode="bilinear", antialias=True`: triangles, widened when shrinking."""
    step = size / new_size
    reach = max(step, 1.0)
    rows = []
    for index in range(new_size):
        centre = (index + 0.5) * step
        weights = [max(0.0, 1.0 - abs(source + 0.5 - centre) / reach) for source in range(size)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)
