"""Tiny models that call PyTorch's attention functions themselves, of every kind that is told apart; random weights."""

from __future__ import annotations

import torch
from model_families import randomise
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

DIM, HEADS, SIDE, PATCH = 32, 4, 32, 4
GRID = SIDE // PATCH


def build(model: nn.Module) -> nn.Module:
    """Give every parameter random values, in evaluation mode."""
    randomise(model)
    return model.eval()


class Attention(nn.Module):
    """Fused projections, a norm of query and key, one call; as timm writes it."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.q_norm, self.k_norm = nn.LayerNorm(DIM // HEADS), nn.LayerNorm(DIM // HEADS)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.kind == "explicit":
            weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
            out = nn.functional.dropout(weights, 0.1, self.training) @ v
        elif self.kind == "biased":
            out = scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(HEADS, tokens, tokens))
        elif self.kind == "masked":
            out = scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(tokens, tokens, dtype=torch.bool))
        elif self.kind == "pooled keys":
            out = scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])
        elif self.kind in ("flat", "flat windowed"):  # as SAM has it: heads in the batch
            out = scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(
                0, (batch, -1)
            )
        elif self.kind == "grouped":
            out = scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        elif self.kind == "unseen":
            out = torch.sigmoid(q @ k.transpose(-2, -1)) @ v
        elif self.kind == "twice":
            out = scaled_dot_product_attention(q, k, v) + scaled_dot_product_attention(k, q, v, scale=0.3)
        else:
            out = scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, DIM))


class Block(nn.Module):
    """A pre-norm transformer block; a windowed one cuts the patches into windows of four."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(DIM), Attention(kind), nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.windowed = "windowed" in kind

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm1(x)
        if self.windowed:
            inner = inner.unflatten(1, (4, -1)).flatten(0, 1)
        x = x + self.attn(inner).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    """A Vision Transformer of its own code, with class and register tokens; `kinds` are those of its blocks."""

    def __init__(self, *kinds: str, prefix: int = 1) -> None:
        super().__init__()
        self.img_size = SIDE
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.front = nn.Parameter(torch.zeros(1, prefix, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID * GRID + prefix, DIM))
        self.blocks = nn.Sequential(*(Block(kind) for kind in kinds or ("plain",) * 3))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


class SharedViT(OwnViT):
    """One block, run twice, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__("plain")

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(self.blocks(x)))


class EncoderViT(nn.Module):
    """A Vision Transformer of PyTorch's own encoder layers."""

    def __init__(self, batch_first: bool = True, pool: bool = False) -> None:
        super().__init__()
        self.img_size = SIDE
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.batch_first = batch_first
        if pool:
            self.pool = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return x


class MapViT(nn.Module):
    """Blocks that pass maps `[B, h, w, C]` on, as SAM's encoder does."""

    class MapBlock(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1, 2)).reshape(x.shape)

    def __init__(self) -> None:
        super().__init__()
        self.img_size = SIDE
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.blocks = nn.ModuleList(self.MapBlock() for _ in range(2))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return x


class CrossViT(OwnViT):
    """Its last block attends from its tokens to as many tokens of another image: equal lengths, yet cross-attention."""

    def __init__(self) -> None:
        super().__init__("plain", "plain")
        self.cross = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = super().forward(pixel_values)
        return self.cross(x, x.flip(0), x.flip(0), need_weights=False)[0]


class Unrunnable(OwnViT):
    """Takes another input than images."""

    def forward(self, pixel_values: Tensor, text: Tensor) -> Tensor:
        return super().forward(pixel_values)


class ValueDependent(OwnViT):
    """Looks at its own values, so it cannot be traced."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        out = super().forward(pixel_values)
        return out if out.sum() > 0 else -out


class SceneViT(nn.Module):
    """Several images of a scene at once, as VGGT has them: blocks of each image and of all images take turns."""

    def __init__(self, frames: int, depth: int = 2, prefix: int = 2) -> None:
        super().__init__()
        self.example_shape = (frames, 3, SIDE, SIDE)
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.front = nn.Parameter(torch.zeros(1, prefix, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID * GRID + prefix, DIM))
        self.frame_blocks = nn.ModuleList(Block() for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, frames = pixel_values.shape[:2]
        patches = self.patch_embed(pixel_values.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat([self.front.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        tokens = x.shape[1]
        for alone, together in zip(self.frame_blocks, self.global_blocks, strict=True):
            x = together(alone(x).reshape(batch, frames * tokens, DIM)).reshape(batch * frames, tokens, DIM)
        return self.norm(x).reshape(batch, frames * tokens, DIM)


def make_scene(frames: int = 4, depth: int = 2) -> nn.Module:
    """A factory for commands: a model of several images."""
    return build(SceneViT(frames, depth))


class TwoTowers(nn.Module):
    """Two Vision Transformers, one after the other on the same image."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size = SIDE
        self.vision = OwnViT("plain", "plain", prefix=1)
        self.depth = OwnViT("plain", "plain", "plain", prefix=3)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        return self.vision(pixel_values), self.depth(pixel_values)


def make_towers() -> nn.Module:
    """A factory for commands: a model of two towers."""
    return build(TwoTowers())


def make_encoder() -> nn.Module:
    """A factory for commands: PyTorch's own encoder layers."""
    return build(EncoderViT())
